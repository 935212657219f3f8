"""What must hold between stages; blocking where a later stage would train on or serve garbage.

Invariant: a check reads finished results only, and its description is the sentence a person needs when it fails.
"""

from pathlib import Path
from typing import Any

import dagster as dg

from assets.materialization import STAGES
from assets.resources import Platform
from gr_platform import storage
from gr_platform.models.config import Kind
from gr_platform.registry.versions import KINDS


def _verdict(name: str, faults: list[str], passed: str, **figures: Any) -> dg.AssetCheckResult:
    if faults:
        fields = {"name": name, "event": "check_failed", "reason": "; ".join(faults[:5])}
        STAGES.error("event=check_failed check=%s reason=%s", name, fields["reason"], extra={"stage": fields})
    return dg.AssetCheckResult(
        passed=not faults, description="; ".join(faults[:5]) if faults else passed, metadata=figures
    )


def _sequences(platform: Platform) -> Any:
    from gr_platform.sequences.dataset import SequenceDataset

    return SequenceDataset.current(platform.folder(), platform.dataset_name())


def _run_folder(platform: Platform, name: str) -> Path:
    return storage.current(platform.folder() / "runs" / platform.dataset_name(), name)


@dg.asset_check(asset="events", name="schema", blocking=True)
def events_schema(platform: Platform) -> dg.AssetCheckResult:
    """Clean events have the contract's columns and types, no NULL in them, and declared actions only."""
    from gr_platform.events.ingest import clean_events

    clean = clean_events(platform.folder(), platform.dataset_name())
    id_types = {"int64": "BIGINT", "string": "VARCHAR"}
    wanted = {
        "user_id": id_types[clean.declaration.user_id_type],
        "item_id": id_types[clean.declaration.item_id_type],
        "action": "VARCHAR",
        "event_ts": "BIGINT",
    }
    described = clean.query("SELECT column_name, column_type FROM (DESCRIBE events)").to_pylist()
    types = {row["column_name"]: row["column_type"] for row in described}
    faults = [
        f"{name} is {types.get(name, 'missing')}, not {kind}"
        for name, kind in wanted.items()
        if types.get(name) != kind
    ]
    if not faults:
        filled = clean.query("SELECT count(*) AS num_rows, count(COLUMNS(*)) FROM events").to_pylist()[0]
        missing = {name: filled["num_rows"] - filled[name] for name in wanted}
        faults = [f"{name} is NULL in {count} rows" for name, count in missing.items() if count]
        actions = set(clean.query("SELECT DISTINCT action FROM events")["action"].to_pylist())
        faults += [f"action {action!r} is not declared" for action in actions - set(clean.declaration.actions)]
    return _verdict("events schema", faults, "columns, types and actions are as declared")


@dg.asset_check(asset="events", name="conservation", blocking=True)
def events_conservation(platform: Platform) -> dg.AssetCheckResult:
    """Rows in = rows kept + quarantined + duplicates in every partition, and its files hold exactly those rows."""
    import pyarrow.parquet as pq

    faults, num_rows = [], 0
    for folder in sorted((platform.folder() / "events" / platform.dataset_name()).glob("ingest_date=*")):
        facts = storage.read_manifest(folder).facts
        quarantined, num_rows = sum(facts["quarantined"].values()), num_rows + facts["rows_in"]
        accounted = facts["rows_kept"] + facts["duplicates"] + quarantined
        if accounted != facts["rows_in"]:
            faults.append(f"{folder.name}: {facts['rows_in']} rows came in, {accounted} are accounted for")
        for pattern, expected in (("events-*.parquet", facts["rows_kept"]), ("quarantine-*.parquet", quarantined)):
            stored = sum(pq.read_metadata(file).num_rows for file in folder.glob(pattern))
            if stored != expected:
                faults.append(f"{folder.name}: {pattern} hold {stored} rows, the manifest says {expected}")
    return _verdict("events conservation", faults, f"all {num_rows} rows are accounted for")


@dg.asset_check(asset="sequences", name="no_leakage", blocking=True)
def no_leakage(platform: Platform) -> dg.AssetCheckResult:
    """No training history or target reaches a held-out exposure, by the split's own rule."""
    from gr_platform.sequences.splits import check_no_leak

    return _verdict("no_leakage", check_no_leak(_sequences(platform)), "no held-out exposure is seen in training")


def _finite_weights(platform: Platform, kind: Kind) -> dg.AssetCheckResult:
    import numpy as np
    from safetensors.numpy import load_file

    weights = load_file(_run_folder(platform, f"{kind}_model") / "model.safetensors")
    faults = [f"{name} holds NaN or infinity" for name, value in weights.items() if not np.isfinite(value).all()]
    return _verdict(
        f"{kind}_model finite_weights", faults, f"all {len(weights)} tensors are finite", num_tensors=len(weights)
    )


@dg.asset_check(asset="retrieval_model", name="finite_weights", blocking=True)
def retrieval_finite_weights(platform: Platform) -> dg.AssetCheckResult:
    """No weight of the retrieval model is NaN or infinite."""
    return _finite_weights(platform, "retrieval")


@dg.asset_check(asset="ranking_model", name="finite_weights", blocking=True)
def ranking_finite_weights(platform: Platform) -> dg.AssetCheckResult:
    """No weight of the ranking model is NaN or infinite."""
    return _finite_weights(platform, "ranking")


@dg.asset_check(asset="evaluation", name="finite_figures", blocking=True)
def finite_figures(platform: Platform) -> dg.AssetCheckResult:
    """Every test figure that the registry and the gate read is there and finite."""
    import math

    from gr_platform.registry.tracking import run_metrics

    facts = storage.read_manifest(_run_folder(platform, "evaluation")).facts
    figures = {name: value for kind in KINDS for name, value in run_metrics(kind, facts).items()}
    faults = [f"{name} is {value}" for name, value in figures.items() if not math.isfinite(value)]
    faults += [f"{kind} has no figures" for kind in KINDS if not run_metrics(kind, facts)]
    return _verdict("evaluation finite_figures", faults, f"all {len(figures)} figures are finite")


@dg.asset_check(asset="bundle", name="parity", blocking=True)
def bundle_parity(platform: Platform) -> dg.AssetCheckResult:
    """The exported graphs, run as serving runs them, give the trained models' scores."""
    from gr_platform.bundle.load import load
    from gr_platform.bundle.verify import parity

    bundles, faults, figures = platform.folder() / "bundles" / platform.dataset_name(), [], {}
    for kind in KINDS:
        found = parity(load(storage.current(bundles, kind)))
        figures[f"{kind}_max_abs_error"] = found.max_abs_error
        if not found.ok:
            faults.append(
                f"{kind} differs by {found.max_abs_error:.3g} where scores reach {found.max_abs_reference:.3g}"
            )
    return _verdict("bundle parity", faults, "the bundles' scores equal the models'", **figures)

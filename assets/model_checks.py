"""What must hold of models, figures and bundles; blocking, because a later stage would serve garbage.

Invariant: as in data_checks.py.
"""

from pathlib import Path

import dagster as dg

from assets.materialization import verdict
from assets.resources import Platform
from gr_platform import storage
from gr_platform.models.config import Kind
from gr_platform.registry.versions import KINDS


def _run_folder(platform: Platform, name: str) -> Path:
    return storage.current(platform.folder() / "runs" / platform.dataset_name(), name)


def _model_leakage(platform: Platform, kind: Kind) -> dg.AssetCheckResult:
    from gr_platform.evaluation.evaluate import split_of
    from gr_platform.sequences.dataset import SequenceDataset
    from gr_platform.sequences.splits import by_time, check_no_leak, leave_one_out, newest_time
    from gr_platform.training.loop import trained_ends

    dataset = SequenceDataset.current(platform.folder(), platform.dataset_name())
    folder = _run_folder(platform, f"{kind}_model")
    spec = storage.read_manifest(folder).spec
    if spec["sequences"] != dataset.digest:
        faults, figures = ["it was trained on other sequences than the current ones"], {}
    else:
        ends = trained_ends(folder, dataset.num_users)
        # A refit takes the validation targets in, so only the test targets are to be unknown to the model.
        refit = spec["recipe"]["training"]["refit"]
        split = split_of(folder)
        holdout = leave_one_out(dataset, "test", refit=True) if refit else None
        if split is not None:
            holdout = split.window(dataset)
        faults = check_no_leak(dataset, ends=ends, holdout=holdout)
        # By time, this model may only be judged on what came after all that it saw: how much of that is there?
        trained_until = newest_time(dataset, ends)
        after = by_time(dataset, trained_until + 1)
        figures = {"trained_until_ms": trained_until, "users_with_targets_after": len(after.targets)}
    return verdict(f"{kind}_model no_leakage", faults, "no held-out exposure was trained on", metadata=figures)


@dg.asset_check(asset="retrieval_model", name="no_leakage", blocking=True)
def retrieval_no_leakage(platform: Platform) -> dg.AssetCheckResult:
    """What the retrieval model trained on ends before every held-out exposure."""
    return _model_leakage(platform, "retrieval")


@dg.asset_check(asset="ranking_model", name="no_leakage", blocking=True)
def ranking_no_leakage(platform: Platform) -> dg.AssetCheckResult:
    """What the ranking model trained on ends before every held-out exposure."""
    return _model_leakage(platform, "ranking")


def _finite_weights(platform: Platform, kind: Kind) -> dg.AssetCheckResult:
    import numpy as np
    from safetensors.numpy import load_file

    weights = load_file(_run_folder(platform, f"{kind}_model") / "model.safetensors")
    faults = [f"{name} holds NaN or infinity" for name, value in weights.items() if not np.isfinite(value).all()]
    return verdict(
        f"{kind}_model finite_weights",
        faults,
        f"all {len(weights)} tensors are finite",
        metadata={"num_tensors": len(weights)},
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
    from gr_platform.registry.versions import trained_kinds

    facts = storage.read_manifest(_run_folder(platform, "evaluation")).facts
    by_kind = {kind: run_metrics(kind, facts) for kind in KINDS}
    figures = {name: value for of_kind in by_kind.values() for name, value in of_kind.items()}
    faults = [f"{name} is {value}" for name, value in figures.items() if not math.isfinite(value)]
    trained = trained_kinds(platform.folder(), platform.dataset_name())
    faults += [f"{kind} has no figures" for kind in trained if not by_kind[kind]]
    return verdict("evaluation finite_figures", faults, f"all {len(figures)} figures are finite")


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
    return verdict("bundle parity", faults, "the bundles' scores equal the models'", metadata=figures)

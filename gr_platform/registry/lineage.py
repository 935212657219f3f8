"""Where a run comes from, as MLflow shows and searches it: tags, and the data set with its digest, schema and counts.

Invariant: the digest is that of our sequences (and of the window), never MLflow's own, which reads 10,000 rows only;
what cannot be told any more, because the sequences are gone, is left out and nothing else is.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr_platform import provenance, run_log, storage
from gr_platform.errors import UserError
from gr_platform.sequences.time_split import DAY_MS

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

SEQUENCES_DIGEST = "gr.sequences_digest"
START, WINDOW, TRAINED_UNTIL, WARM_START = "gr.start", "gr.window", "gr.trained_until", "gr.warm_start"
COMMIT = "mlflow.source.git.commit"
# The id that the lines of the log carry, too.
DAGSTER_RUN = "gr.dagster_run"
CONTEXT = "mlflow.data.context"
WARM, SCRATCH = "warm", "scratch"
# MLflow takes no longer one.
_DIGEST_CHARS = 36
_COUNTS = ("num_users", "num_items", "num_exposures", "min_length", "median_length", "max_length")


def sequences_digest(model: storage.Manifest) -> str:
    """Return the digest of the sequences a model was trained on, as its run's manifest states it."""
    return str(model.spec.get("sequences", ""))


def start_of(model: storage.Manifest) -> str:
    """Return WARM for a model that started from another one's weights, else SCRATCH."""
    return WARM if model.spec.get("warm_start") else SCRATCH


def tags_of(ds: str, kind: str, recipe: str, model: storage.Manifest) -> dict[str, str]:
    """Return what a model's run is found by: short values, dates as ISO 8601 in UTC."""
    tags = {"gr.dataset": ds, "gr.kind": kind, "gr.recipe": recipe, SEQUENCES_DIGEST: sequences_digest(model)}
    tags[START] = start_of(model)
    if warm_start := model.spec.get("warm_start"):
        tags[WARM_START] = str(warm_start)
    if (until := model.facts.get("trained_until_ms")) is not None:
        tags[TRAINED_UNTIL] = moment(until)
    if split := model.spec.get("split"):
        tags[WINDOW] = days(split["cut"], split["end"])
    if commit := provenance.git_commit():
        tags[COMMIT] = commit
    if run := run_log.dagster_run():
        tags[DAGSTER_RUN] = run
    return tags


def moment(ms: int) -> str:
    """Return a time in ms UTC to the second: `2026-06-27T23:59:58Z`."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def days(cut: int, end: int) -> str:
    """Return the days that a window [cut, end) in ms UTC touches: `2026-06-28`, `2026-06-27 to 2026-06-28`."""
    first, last = moment(cut)[:10], moment(max(cut, end - 1))[:10]
    return first if first == last else f"{first} to {last}"


def profile(home: Path, ds: str, digest: str) -> dict[str, Any]:
    """Return counts, digests and the time range [first_ms, last_ms] of a data set's sequences.

    {} where no sequences of this digest are there any more.
    """
    manifest = _sequences(home, ds, digest)
    if manifest is None:
        return {}
    found = {name: manifest.facts[name] for name in _COUNTS if name in manifest.facts}
    found |= {name: manifest.spec[name] for name in ("events", "vocabulary") if name in manifest.spec}
    file = home / "sequences" / ds / str(manifest.spec.get("vocabulary_folder")) / "vocabulary.parquet"
    try:
        items = pq.read_table(file, columns=["count", "first_ts", "last_ts"])
    except (OSError, pa.ArrowInvalid):
        return found
    # An item that only its properties are known of has no time.
    items = items.filter(pc.greater(items["count"], 0))
    if len(items):
        found |= {"first_ms": pc.min(items["first_ts"]).as_py(), "last_ms": pc.max(items["last_ts"]).as_py()}
    return found


def training_input(home: Path, ds: str, model: storage.Manifest) -> "DatasetInput":
    """Return the data set that a model was trained on, for `MlflowClient.log_inputs`."""
    digest = sequences_digest(model)
    told = profile(home, ds, digest)
    if (until := model.facts.get("trained_until_ms")) is not None:
        told["trained_until_ms"] = until
    return _input(ds, digest, "training", _with_dates(told), _schema(home, ds, digest), {"sequences": digest})


def evaluation_input(
    home: Path, ds: str, model: storage.Manifest, evaluation: Mapping[str, Any], kind: str
) -> "DatasetInput":
    """Return the held-out targets that a model was judged on: a window of the log, or each user's last exposure."""
    digest, split = sequences_digest(model), model.spec.get("split")
    held = {"sequences": digest, "split": split or "leave-one-out"}
    judged = evaluation.get(kind, {})
    judged = judged if kind == "retrieval" else next(iter(judged.values()), {})
    told = {name: judged[name] for name in ("num_users", "num_targets") if name in judged}
    told["held_out"] = days(split["cut"], split["end"]) if split else "the last exposure of each user"
    if split:
        told |= {"cut_ms": split["cut"], "end_ms": split["end"], "num_days": (split["end"] - split["cut"]) / DAY_MS}
    return _input(ds, storage.digest_of(held), "evaluation", _with_dates(told), _schema(home, ds, digest), held)


def _sequences(home: Path, ds: str, digest: str) -> storage.Manifest | None:
    for folder in sorted((home / "sequences" / ds).glob("sequences-*")):
        try:
            manifest = storage.read_manifest(folder)
        except UserError:
            continue
        if manifest.digest == digest:
            return manifest
    return None


def _with_dates(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts with each time, ms UTC, spelt out beside it."""
    dates = {name.removesuffix("_ms"): moment(value) for name, value in told.items() if name.endswith("_ms")}
    return {**told, **dates}


def _schema(home: Path, ds: str, digest: str) -> str:
    """Return the columns of sequences as MLflow's UI lists them, JSON; "" where they are gone."""
    manifest = _sequences(home, ds, digest)
    if manifest is None or "declaration" not in manifest.spec:
        return ""
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    declared = manifest.spec["declaration"]
    user = DataType.string if declared.get("user_id_type") == "string" else DataType.long
    lists = ("items", "actions", "times", *(f"context_{name}" for name in declared.get("context", [])))
    columns: list[Any] = [ColSpec(user, "user_id"), *(ColSpec(Array(DataType.long), name) for name in lists)]
    return json.dumps({"mlflow_colspec": Schema(columns).to_dict()})


def _input(
    ds: str, digest: str, context: str, told: Mapping[str, Any], schema: str, source: Mapping[str, Any]
) -> "DatasetInput":
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=ds,
        digest=digest[:_DIGEST_CHARS],
        source_type="local",
        source=json.dumps(source, sort_keys=True),
        schema=schema or None,
        profile=json.dumps(told, sort_keys=True),
    )
    return DatasetInput(dataset, [InputTag(CONTEXT, context)])

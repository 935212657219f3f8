"""Runs in MLflow: what was trained, on what, how it learned and how good it is.

Invariant: one finished run per model digest; logging a model again returns the run there is.
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gr_platform import provenance, storage
from gr_platform.errors import UserError
from gr_platform.evaluation import plots
from gr_platform.models.config import Recipe

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

log = logging.getLogger(__name__)

RUN_DIGEST = "gr.run_digest"
EVALUATION_DIGEST = "gr.evaluation_digest"
SEQUENCES_DIGEST = "gr.sequences_digest"
# Prefix of a metric's name -> the part of an evaluation's facts that it comes from.
RETRIEVAL_FIGURES = {
    "test": "retrieval",
    "chunk_1": "retrieval_chunk_1",
    "popularity": "popularity",
    "cooccurrence": "cooccurrence",
}
# What a curve has beside the loss and the figures on validation: its sums are among COSTS.
SUMS = ("epoch", "phase", "tokens", "num_targets", "train_flops")
WAIT_S = 600.0
COSTS = ("num_parameters", "seconds", "tokens_per_s", "train_flops", "pflops_days", "flops_utilisation")
COMPARED = {"retrieval": "model", "cooccurrence": "co-occurrence", "popularity": "popularity"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """An MLflow run of one trained model; `folder` is the run folder it was logged from."""

    kind: str
    run_id: str
    name: str
    folder: Path
    run_digest: str
    reused: bool


def tracking_uri(home: Path) -> str:
    """Return the SQLite address of the registry of a state folder."""
    return f"sqlite:///{home / 'mlflow.db'}"


def connect(home: Path) -> "MlflowClient":
    """Return a client of the registry under `home`, creating its store on first use, with telemetry off."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    home.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(tracking_uri(home))
    return mlflow.MlflowClient()


def experiment_id(client: "MlflowClient", home: Path, ds: str) -> str:
    """Return the id of the data set's experiment, with artifacts under `home/mlartifacts`."""
    found = client.get_experiment_by_name(ds)
    if found is not None:
        return str(found.experiment_id)
    return str(client.create_experiment(ds, artifact_location=(home / "mlartifacts" / ds).as_uri()))


def run_metrics(kind: str, evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of one kind as MLflow names: `test_hr_at_10`, `popularity_hr_at_10`, `test_like_auc`.

    {} where the evaluation is not of that kind.
    """
    if kind == "retrieval":
        named = {
            f"{prefix}_{name}": value
            for prefix, part in RETRIEVAL_FIGURES.items()
            for name, value in evaluation.get(part, {}).items()
        }
    else:
        tasks = evaluation.get("ranking", {})
        named = {f"test_{task}_{k}": v for task, figures in tasks.items() for k, v in figures.items()}
        entropies = [figures["ne"] for figures in tasks.values() if figures.get("ne") is not None]
        if entropies:
            named["test_mean_ne"] = sum(entropies) / len(entropies)
    return {
        name: float(v)
        for name, v in named.items()
        if isinstance(v, int | float) and not isinstance(v, bool) and (name.startswith("test_") or "_num_" not in name)
    }


def figures_png(kind: str, evaluation: Mapping[str, Any]) -> dict[str, bytes]:
    """Return name -> small PNG of an evaluation of one kind: against baselines, by slice; task by task, calibration."""
    if kind == "ranking":
        bars = plots.metric_bars(evaluation["ranking"], ["ne", "auc"])
        return {"figures": bars, "calibration": plots.calibration(evaluation["ranking_calibration"])}
    models = {label: evaluation[part] for part, label in COMPARED.items()}
    bars = plots.metric_bars(models, ["hr_at_10", "ndcg_at_10", "mrr"])
    return {"figures": bars, "slices": plots.slices(evaluation["slices"])}


def log_current(home: Path, ds: str, kind: str) -> TrackedRun:
    """Log the data set's current model of `kind` with its current evaluation and return the run.

    Raises UserError if the evaluation belongs to another model than the current one.
    """
    folder = storage.current(home / "runs" / ds, f"{kind}_model")
    return log_run(home, ds, folder, _evaluation_of(home, ds, folder).facts)


def log_run(home: Path, ds: str, folder: Path, evaluation: Mapping[str, Any] | None = None) -> TrackedRun:
    """Log the trained model in a run folder, with the facts of its evaluation where it has one; return the run.

    A model that has a run gets no second one; only figures that the run has not are added to it.
    """
    model = storage.read_manifest(folder)
    kind = model.kind.removesuffix("_model")
    client = connect(home)
    with storage.exclusive(home, "mlflow", wait_s=WAIT_S):
        experiment = experiment_id(client, home, ds)
        known = find_run(client, experiment, model.digest)
        tracked = TrackedRun(
            kind=kind,
            run_id=known.info.run_id if known else _create_run(client, experiment, ds, folder, model),
            name=known.info.run_name if known else run_name(folder, model),
            folder=folder,
            run_digest=model.digest,
            reused=known is not None,
        )
        if evaluation is not None:
            _log_evaluation(client, tracked.run_id, kind, evaluation)
    log.info("event=run_logged dataset=%s kind=%s run=%s reused=%s", ds, kind, tracked.run_id, tracked.reused)
    return tracked


def try_log_run(home: Path, ds: str, folder: Path, evaluation: Mapping[str, Any] | None = None) -> str | None:
    """Log as `log_run` does; return the run's name, or None where MLflow could not be written: the log says why.

    For callers whose result is on disk by then, whatever MLflow does.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return log_run(home, ds, folder, evaluation).name
    except (MlflowException, SQLAlchemyError, OSError, UserError):
        log.exception("event=run_not_logged dataset=%s folder=%s", ds, folder.name)
        return None


def run_name(folder: Path, model: storage.Manifest) -> str:
    """Return what a trained model is called in MLflow: `retrieval-ml_1m-s2-1f3a09c2`, the seed and digits of it."""
    recipe = _recipe_of(folder)
    return f"{recipe.model.kind}-{recipe.name}-s{recipe.training.seed}-{model.digest[:8]}"


def find_run(client: "MlflowClient", experiment: str, run_digest: str) -> "Run | None":
    """Return the finished run of a model, or None where it was never logged."""
    wanted = f"tags.`{RUN_DIGEST}` = '{run_digest}' and attributes.status = 'FINISHED'"
    found = client.search_runs([experiment], filter_string=wanted, max_results=1)
    return found[0] if found else None


def _evaluation_of(home: Path, ds: str, folder: Path) -> storage.Manifest:
    evaluation = storage.read_manifest(storage.current(home / "runs" / ds, "evaluation"))
    digest = storage.read_manifest(folder).digest
    if digest not in storage.canonical_json(evaluation.spec):
        raise UserError(
            f"the current evaluation of {ds} is not of {folder.name}; run gr materialize --select evaluation"
        )
    return evaluation


def sequences_digest(model: storage.Manifest) -> str:
    """Return the digest of the sequences a model was trained on, as its run's manifest states it."""
    return str(model.spec.get("sequences", ""))


def _create_run(client: "MlflowClient", experiment: str, ds: str, folder: Path, model: storage.Manifest) -> str:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    recipe = _recipe_of(folder)
    kind, sequences = recipe.model.kind, sequences_digest(model)
    tags = {"gr.dataset": ds, "gr.kind": kind, "gr.recipe": recipe.name, SEQUENCES_DIGEST: sequences}
    if commit := provenance.git_commit():
        tags["mlflow.source.git.commit"] = commit
    run = client.create_run(experiment, run_name=run_name(folder, model), tags=tags)
    run_id = str(run.info.run_id)
    try:
        params = [Param(name, str(value)) for name, value in flatten(recipe.to_json()).items()]
        client.log_batch(run_id, metrics=[*_curve_metrics(folder), *_cost_metrics(model)], params=params)
        source = Dataset(name=ds, digest=sequences[:36], source_type="local", source=f'{{"sequences": "{sequences}"}}')
        client.log_inputs(run_id, [DatasetInput(source, [InputTag("mlflow.data.context", "training")])])
        _log_pictures(client, run_id, {"learning_curve": plots.learning_curve(_curves(folder))})
        # The digest goes last: a run that broke half-way is never taken for the model's run.
        client.set_tag(run_id, RUN_DIGEST, model.digest)
    except BaseException:
        client.set_terminated(run_id, status="FAILED")
        raise
    client.set_terminated(run_id)
    return run_id


def _log_evaluation(client: "MlflowClient", run_id: str, kind: str, evaluation: Mapping[str, Any]) -> None:
    from mlflow.entities import Metric

    final = run_metrics(kind, evaluation)
    # Of the figures, not of the files: judged alone or together with the other kind, a model has the same ones.
    digest = storage.digest_of(final)
    if client.get_run(run_id).data.tags.get(EVALUATION_DIGEST) == digest:
        return
    now = int(time.time() * 1000)
    client.log_batch(run_id, metrics=[Metric(name, value, now, 0) for name, value in final.items()])
    _log_pictures(client, run_id, figures_png(kind, evaluation))
    client.log_dict(run_id, dict(evaluation), "evaluation.json")
    client.set_tag(run_id, EVALUATION_DIGEST, digest)


def _recipe_of(folder: Path) -> Recipe:
    return Recipe.from_json(json.loads((folder / "recipe.json").read_text(encoding="utf-8")))


def _curves(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "curves.json").read_text(encoding="utf-8"))
    return rows


def _curve_metrics(folder: Path) -> "list[Metric]":
    """Return each epoch's figures: `train_loss`, `validation_...`, of a second training `refit_train_loss`."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [
        Metric(
            ("refit_" if row.get("phase") == "refit" else "")
            + ("train_loss" if name == "loss" else f"validation_{name}"),
            float(value),
            now,
            int(row["epoch"]),
        )
        for row in _curves(folder)
        for name, value in row.items()
        if name not in SUMS and isinstance(value, int | float)
    ]


def _cost_metrics(model: storage.Manifest) -> "list[Metric]":
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(name, float(model.facts[name]), now, 0) for name in COSTS if model.facts.get(name) is not None]


def _log_pictures(client: "MlflowClient", run_id: str, pictures: Mapping[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as drawn:
        for name, png in pictures.items():
            (Path(drawn) / f"{name}.png").write_bytes(png)
        client.log_artifacts(run_id, drawn, "plots")


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested fields as `outer.inner` names."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat

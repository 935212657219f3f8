"""Runs in MLflow: what was trained, on what, how it learned and how good it is.

Invariant: one finished run per model digest; logging a model again returns the run there is.
"""

import functools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gr_platform import databases, settings, storage
from gr_platform.errors import UserError
from gr_platform.evaluation import plots
from gr_platform.models.config import Recipe
from gr_platform.registry import lineage
from gr_platform.registry.figures import figures_png, log_pictures
from gr_platform.registry.figures import run_metrics as run_metrics
from gr_platform.registry.lineage import SEQUENCES_DIGEST as SEQUENCES_DIGEST

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

T = TypeVar("T")
log = logging.getLogger(__name__)

DATABASE = "mlflow.db"
RUN_DIGEST = "gr.run_digest"
EVALUATION_DIGEST = "gr.evaluation_digest"
PARENT = "mlflow.parentRunId"
# What a curve has beside the loss and the figures on validation: its sums are among COSTS.
SUMS = ("epoch", "phase", "tokens", "num_targets", "train_flops")
WAIT_S = 600.0
COSTS = ("num_parameters", "seconds", "tokens_per_s", "train_flops", "pflops_days", "flops_utilisation")


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
    """Return the address of the registry of a state folder: `GR_MLFLOW_DB`, or SQLite in there. It may be secret."""
    return _postgres(home) or f"sqlite:///{home / DATABASE}"


def _postgres(home: Path) -> str | None:
    """Return `GR_MLFLOW_DB` if the state folder is GR_HOME: others, such as a replay's, keep theirs in themselves."""
    return settings.mlflow_db() if home.resolve() == settings.home() else None


def exists(home: Path) -> bool:
    """Return whether there is a registry, without making one. Raises UserError if its PostgreSQL does not answer."""
    address = _postgres(home)
    return databases.has_table(address, "registered_models") if address else (home / DATABASE).is_file()


def connect(home: Path) -> "MlflowClient":
    """Return a client of the registry of a state folder, creating its store on first use, with telemetry off.

    Raises UserError if its PostgreSQL does not answer.
    """
    if address := _postgres(home):
        databases.require_answer(settings.MLFLOW_DB, address)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    home.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(tracking_uri(home))
    if address:
        _make_tables(address)
    return mlflow.MlflowClient()


@functools.cache
def _make_tables(address: str) -> None:
    """Let MLflow make or find its tables in PostgreSQL, once a process: two that make them at once break each other."""
    import mlflow

    with databases.alone(address):
        mlflow.MlflowClient(tracking_uri=address)


def experiment_id(client: "MlflowClient", home: Path, ds: str) -> str:
    """Return the id of the data set's experiment, with artifacts under `home/mlartifacts`."""
    found = client.get_experiment_by_name(ds)
    if found is not None:
        return str(found.experiment_id)
    return str(client.create_experiment(ds, artifact_location=(home / "mlartifacts" / ds).as_uri()))


def log_current(home: Path, ds: str, kind: str, *, parent: str | None = None) -> TrackedRun:
    """Log the data set's current model of `kind` with its current evaluation and return the run.

    parent: as `log_run` takes it.

    Raises UserError if the evaluation belongs to another model than the current one.
    """
    folder = storage.current(home / "runs" / ds, f"{kind}_model")
    return log_run(home, ds, folder, _evaluation_of(home, ds, folder).facts, parent=parent)


def log_run(
    home: Path,
    ds: str,
    folder: Path,
    evaluation: Mapping[str, Any] | None = None,
    *,
    parent: str | None = None,
) -> TrackedRun:
    """Log the trained model in a run folder, with the facts of its evaluation where it has one; return the run.

    A model that has a run gets no second one; only figures that the run has not are added to it. parent: the run that
    it is shown under (`retrainings.open_retraining`), unless it has a parent already.
    """
    model = storage.read_manifest(folder)
    kind = model.kind.removesuffix("_model")
    client = connect(home)
    with storage.exclusive(home, "mlflow", wait_s=WAIT_S):
        experiment = experiment_id(client, home, ds)
        known = find_run(client, experiment, model.digest)
        tracked = TrackedRun(
            kind=kind,
            run_id=known.info.run_id if known else _create_run(client, home, experiment, ds, folder, model),
            name=known.info.run_name if known else run_name(folder, model),
            folder=folder,
            run_digest=model.digest,
            reused=known is not None,
        )
        if parent is not None and PARENT not in (known.data.tags if known else {}):
            client.set_tag(tracked.run_id, PARENT, parent)
        if evaluation is not None and _log_evaluation(client, tracked.run_id, kind, evaluation):
            client.log_inputs(tracked.run_id, [lineage.evaluation_input(home, ds, model, evaluation, kind)])
    log.info("event=run_logged dataset=%s kind=%s mlflow_run=%s reused=%s", ds, kind, tracked.run_id, tracked.reused)
    return tracked


def try_log_run(
    home: Path,
    ds: str,
    folder: Path,
    evaluation: Mapping[str, Any] | None = None,
    *,
    parent: str | None = None,
) -> str | None:
    """Log as `log_run` does; return the run's name, or None where MLflow could not be written: the log says why.

    For callers whose result is on disk by then, whatever MLflow does.
    """

    def logged() -> str:
        return log_run(home, ds, folder, evaluation, parent=parent).name

    return attempt(f"run_not_logged dataset={ds} folder={folder.name}", logged)


def attempt(event: str, act: Callable[[], T]) -> T | None:
    """Return what `act` returns, or None where MLflow could not be read or written: the log says `event` and why."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return act()
    except (MlflowException, SQLAlchemyError, OSError, UserError):
        log.exception("event=%s", event)
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


def _create_run(
    client: "MlflowClient", home: Path, experiment: str, ds: str, folder: Path, model: storage.Manifest
) -> str:
    from mlflow.entities import Param

    recipe = _recipe_of(folder)
    tags = lineage.tags_of(ds, recipe.model.kind, recipe.name, model)
    run = client.create_run(experiment, run_name=run_name(folder, model), tags=tags)
    run_id = str(run.info.run_id)
    try:
        params = [Param(name, str(value)) for name, value in flatten(recipe.to_json()).items()]
        client.log_batch(run_id, metrics=[*_curve_metrics(folder), *_cost_metrics(model)], params=params)
        client.log_inputs(run_id, [lineage.training_input(home, ds, model)])
        log_pictures(client, run_id, {"learning_curve": plots.learning_curve(_curves(folder))})
        # The digest goes last: a run that broke half-way is never taken for the model's run.
        client.set_tag(run_id, RUN_DIGEST, model.digest)
    except BaseException:
        client.set_terminated(run_id, status="FAILED")
        raise
    client.set_terminated(run_id)
    return run_id


def _log_evaluation(client: "MlflowClient", run_id: str, kind: str, evaluation: Mapping[str, Any]) -> bool:
    """Add figures to a run unless it has them; return whether it had not."""
    from mlflow.entities import Metric

    final = run_metrics(kind, evaluation)
    # Of the figures, not of the files: judged alone or together with the other kind, a model has the same ones.
    digest = storage.digest_of(final)
    if client.get_run(run_id).data.tags.get(EVALUATION_DIGEST) == digest:
        return False
    now = int(time.time() * 1000)
    client.log_batch(run_id, metrics=[Metric(name, value, now, 0) for name, value in final.items()])
    log_pictures(client, run_id, figures_png(kind, evaluation))
    client.log_dict(run_id, dict(evaluation), "evaluation.json")
    client.set_tag(run_id, EVALUATION_DIGEST, digest)
    return True


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


def flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested fields as `outer.inner` names."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat

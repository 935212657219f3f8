"""Experiments in MLflow: a parent run an experiment, a nested run a cell; and every run's compute beside its quality.

Invariant: one nested run a cell and result digest; logging it again returns the run there is.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gr_platform import storage
from gr_platform.evaluation import plots
from gr_platform.experiments import render
from gr_platform.experiments.experiment import Cell, Experiment
from gr_platform.experiments.report import Report
from gr_platform.registry.tracking import WAIT_S, connect, experiment_id, flatten

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENTS = "experiments"
PARENT = "mlflow.parentRunId"
NAME, SCALE, DIGEST, REPORT = "gr.experiment", "gr.scale", "gr.cell_digest", "gr.report_digest"
MAX_PARAM_CHARS = 500
# A cell has it, a run of the pipeline has none.
LABEL = "gr.label"
# What is measured -> what MLflow calls it, of a pipeline's run and of a cell's; all on the test.
QUALITY = {"NDCG@10": ("test_ndcg_at_10", "ndcg_at_10"), "NE": ("test_mean_ne", "mean_ne")}
COMPUTE = "pflops_days"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """A run's training compute in PFLOP/s-days and what it bought: `quality` by `measure`, a key of QUALITY."""

    name: str
    dataset: str
    pflops_days: float
    measure: str
    quality: float


def log_cell(home: Path, experiment: Experiment, cell: Cell, result: storage.Result) -> str:
    """Return the id of the cell's run under its experiment's, logged unless it is there.

    Params: the recipe and options. Metrics: the figures, and the curve by epoch or step. Plot: the learning curve.
    """
    client = connect(home)
    with storage.exclusive(home, "mlflow", wait_s=WAIT_S):
        mlflow_experiment = experiment_id(client, home, EXPERIMENTS)
        parent = _parent(client, mlflow_experiment, experiment)
        digest = result.manifest.digest
        wanted = f"tags.`{DIGEST}` = '{digest}' and tags.`{PARENT}` = '{parent}' and attributes.status = 'FINISHED'"
        if known := client.search_runs([mlflow_experiment], filter_string=wanted, max_results=1):
            return str(known[0].info.run_id)
        tags = {PARENT: parent, NAME: experiment.name, "gr.dataset": cell.dataset, LABEL: cell.label}
        run = client.create_run(mlflow_experiment, run_name=f"{experiment.name}/{cell.name}", tags=tags)
        return _logged(client, str(run.info.run_id), cell, result)


def log_report(home: Path, experiment: Experiment, found: Report) -> str:
    """Return the id of the experiment's parent run, with its report, tables and plot as artifacts."""
    client = connect(home)
    with storage.exclusive(home, "mlflow", wait_s=WAIT_S):
        mlflow_experiment = experiment_id(client, home, EXPERIMENTS)
        parent = _parent(client, mlflow_experiment, experiment)
        digest = storage.digest_of(found)
        if client.get_run(parent).data.tags.get(REPORT) != digest:
            client.log_dict(parent, found, "report.json")
            client.log_text(parent, render.section(found), "report.md")
            _log_picture(client, parent, "report", render.plot(found))
            client.set_tag(parent, REPORT, digest)
    return parent


def compute_against_quality(home: Path) -> list[Spent]:
    """Return every finished run of the registry that has both, cells and pipeline runs, one a digest."""
    client = connect(home)
    places = [each.experiment_id for each in client.search_experiments()]
    wanted = f"metrics.{COMPUTE} > 0 and attributes.status = 'FINISHED'"
    found: dict[str, Spent] = {}
    token: str | None = None
    while True:
        page = client.search_runs(places, filter_string=wanted, max_results=1000, page_token=token)
        for run in page:
            for measure, (of_pipeline, of_cell) in QUALITY.items():
                quality = run.data.metrics.get(of_cell if LABEL in run.data.tags else of_pipeline)
                if quality is not None:
                    found.setdefault(run.data.tags.get(DIGEST, run.info.run_id), _spent(run, measure, quality))
        token = page.token
        if not token:
            return sorted(found.values(), key=lambda each: (each.dataset, each.measure, each.pflops_days))


def _spent(run: "Run", measure: str, quality: float) -> Spent:
    tags, metrics = run.data.tags, run.data.metrics
    name = tags.get(LABEL) or tags.get("mlflow.runName", run.info.run_id)
    return Spent(
        name=name,
        dataset=tags.get("gr.dataset", ""),
        pflops_days=metrics[COMPUTE],
        measure=measure,
        quality=quality,
    )


def _parent(client: "MlflowClient", place: str, experiment: Experiment) -> str:
    """Return the experiment's run, made at first; each scale has one of its own."""
    scale = experiment.scale
    wanted = f"tags.`{NAME}` = '{experiment.name}' and tags.`{SCALE}` = '{scale}'"
    if known := client.search_runs([place], filter_string=wanted, max_results=1):
        return str(known[0].info.run_id)
    tags = {NAME: experiment.name, SCALE: scale, "mlflow.note.content": experiment.question}
    name = experiment.title if scale == "full" else f"{experiment.title} ({scale})"
    run_id = str(client.create_run(place, run_name=name, tags=tags).info.run_id)
    client.set_terminated(run_id)
    return run_id


def _logged(client: "MlflowClient", run_id: str, cell: Cell, result: storage.Result) -> str:
    from mlflow.entities import Metric, Param

    facts = result.manifest.facts
    described: dict[str, Any] = {"protocol": cell.protocol, "label": cell.label, "options": dict(cell.options)}
    described |= {} if cell.recipe is None else cell.recipe.to_json()
    params = [Param(name, str(value)[:MAX_PARAM_CHARS]) for name, value in flatten(described).items()]
    now = int(time.time() * 1000)
    metrics = [Metric(name, float(v), now, 0) for name, v in facts["figures"].items() if isinstance(v, int | float)]
    curve = facts.get("curve", [])
    metrics += [
        Metric(f"curve_{name}", float(value), now, int(entry.get("epoch", entry.get("step", place))))
        for place, entry in enumerate(curve)
        for name, value in entry.items()
        if isinstance(value, int | float) and name not in ("epoch", "step")
    ]
    try:
        for first in range(0, max(len(metrics), 1), 1000):
            client.log_batch(run_id, metrics=metrics[first : first + 1000], params=params if first == 0 else [])
        for name in ("machine", "commit", "date"):
            client.set_tag(run_id, f"gr.{name}", str(facts[name]))
        if curve and "epoch" in curve[0]:
            _log_picture(client, run_id, "learning_curve", plots.learning_curve(_shown(curve)))
        client.set_tag(run_id, DIGEST, result.manifest.digest)
    except BaseException:
        client.set_terminated(run_id, status="FAILED")
        raise
    client.set_terminated(run_id)
    return run_id


def _shown(curve: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the curve with what learns alone: the loss and the validation figures."""
    costs = ("tokens", "num_targets", "seconds", "train_flops", "step")
    return [{name: value for name, value in entry.items() if name not in costs} for entry in curve]


def _log_picture(client: "MlflowClient", run_id: str, name: str, png: bytes) -> None:
    with tempfile.TemporaryDirectory() as drawn:
        (Path(drawn) / f"{name}.png").write_bytes(png)
        client.log_artifacts(run_id, drawn, "plots")

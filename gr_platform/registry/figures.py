"""What was measured of a model, as MLflow takes it: metrics by name, and pictures.

Invariant: no metric is NaN or undefined; a picture is one PNG below 50 KB (evaluation/plots.py).
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gr_platform.evaluation import plots

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Prefix of a metric's name -> the part of an evaluation's facts that it comes from.
RETRIEVAL_FIGURES = {
    "test": "retrieval",
    "chunk_1": "retrieval_chunk_1",
    "popularity": "popularity",
    "cooccurrence": "cooccurrence",
}
COMPARED = {"retrieval": "model", "cooccurrence": "co-occurrence", "popularity": "popularity"}


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


def log_pictures(client: "MlflowClient", run_id: str, pictures: Mapping[str, bytes], folder: str = "plots") -> None:
    """Put name -> PNG under a folder of a run's artifacts."""
    with tempfile.TemporaryDirectory() as drawn:
        for name, png in pictures.items():
            (Path(drawn) / f"{name}.png").write_bytes(png)
        client.log_artifacts(run_id, drawn, folder)

"""Leave-one-out, the protocol of the public tables: a model is trained and judged, a baseline is counted and judged.

Invariant: the epoch is chosen on validation (the next-to-last event); the test event, the last, is read once, after
training. Every test figure can be computed again from the cell's targets.parquet.
"""

import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from gr_platform import settings
from gr_platform.evaluation.protocols import (
    judge_by_model,
    rank_by_cooccurrence,
    rank_by_model,
    rank_by_popularity,
    ranking_facts,
    retrieval_facts,
)
from gr_platform.evaluation.ranks import Ranked
from gr_platform.evaluation.tables import judged_table, ranked_table
from gr_platform.experiments.run import Work
from gr_platform.models.ranking import RankingModel
from gr_platform.models.retrieval import RetrievalModel
from gr_platform.sequences.splits import Holdout, leave_one_out
from gr_platform.training.load import load_model
from gr_platform.training.loop import CURVES, train

TARGETS = "targets.parquet"
TRAINING_FIGURES = (
    "num_parameters", "epochs", "best_epoch", "tokens_per_s", "train_flops", "pflops_days", "flops_utilisation"
)  # fmt: skip


def last_item(work: Work) -> dict[str, Any]:
    """Return the test figures of a model trained by the cell's recipe, and its validation curve.

    Retrieval: rank figures at chunk 1 (the paper's window), those of the served chunk as `served_...`. Ranking: NE, AUC
    and log loss of each task (`ne_<task>`) and their means over tasks.
    """
    recipe, dataset = work.cell.recipe, work.sequences
    if recipe is None:
        raise ValueError(f"cell {work.cell.name} has no recipe to train")
    trained = train(dataset, recipe, work.folder, checkpoint=work.checkpoint, progress=work.progress)
    curve = json.loads((work.folder / CURVES).read_text(encoding="utf-8"))
    model = load_model(work.folder).to(settings.device())
    figures = training_figures(trained, curve)
    if isinstance(model, RetrievalModel):
        figures |= _retrieval(work, model)
    else:
        figures |= _ranking(work, model)
    return {"figures": figures, "curve": _with_compute(curve, trained.get("train_flops"))}


def training_figures(trained: dict[str, Any], curve: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a training took and what validation said at its best epoch (`validation_...`)."""
    figures = {name: trained[name] for name in TRAINING_FIGURES if trained.get(name) is not None}
    figures |= {"train_seconds": trained["seconds"], "train_tokens": sum(entry["tokens"] for entry in curve)}
    best = {f"validation_{name}": value for name, value in trained["best"].items() if isinstance(value, int | float)}
    return figures | best


def popularity(work: Work) -> dict[str, Any]:
    """Return the test figures of the most frequent items, of all events but each user's last."""
    return {"figures": _judged(work, rank_by_popularity(work.sequences, _counted(work)))}


def cooccurrence(work: Work) -> dict[str, Any]:
    """Return the test figures of what followed the user's last items, in all events but each user's last."""
    return {"figures": _judged(work, rank_by_cooccurrence(work.sequences, _counted(work)))}


def _counted(work: Work) -> Holdout:
    """Return the test split of what needs no validation: it counts the validation events too, as public tables do."""
    return leave_one_out(work.sequences, "test", refit=True)


def _retrieval(work: Work, model: RetrievalModel) -> dict[str, Any]:
    torch.set_num_threads(settings.num_threads())
    figures = _judged(work, rank_by_model(model, work.sequences, "test", chunk=1))
    served = retrieval_facts(rank_by_model(model, work.sequences, "test"))
    return figures | {f"served_{name}": served[name] for name in ("hr_at_10", "ndcg_at_10", "mrr")}


def _ranking(work: Work, model: RankingModel) -> dict[str, Any]:
    judged = judge_by_model(model, work.sequences, "test")
    pq.write_table(judged_table(judged, model.tasks, work.sequences), work.folder / TARGETS, compression="zstd")
    tasks = ranking_facts(judged, model.tasks)
    figures = {f"{name}_{task}": facts[name] for task, facts in tasks.items() for name in ("ne", "auc", "log_loss")}
    for name in ("ne", "auc", "log_loss"):
        values = [facts[name] for facts in tasks.values() if facts[name] is not None]
        figures[f"mean_{name}"] = float(np.mean(values)) if values else None
    return figures | {"num_targets": next(iter(tasks.values()))["num_targets"]}


def _judged(work: Work, ranked: Ranked) -> dict[str, Any]:
    """Write the ranks of the targets, a row each, and return their figures."""
    pq.write_table(ranked_table(ranked, work.sequences), work.folder / TARGETS, compression="zstd")
    facts = retrieval_facts(ranked)
    return {name: value for name, value in facts.items() if value is None or isinstance(value, int | float)}


def _with_compute(curve: list[dict[str, Any]], train_flops: float | None) -> list[dict[str, Any]]:
    """Return the curve with the compute spent up to each epoch, which is proportional to its tokens."""
    if train_flops is None:
        return curve
    tokens = np.cumsum([entry["tokens"] for entry in curve])
    spent = train_flops * tokens / tokens[-1]
    return [entry | {"train_flops": float(flops)} for entry, flops in zip(curve, spent, strict=True)]

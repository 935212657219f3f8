"""How a model is judged: leave-one-out, against the whole catalogue or at the exposure itself.

Invariant: a model, the popularity baseline and the server answer the same question: the history is every exposure
before the target, the request comes at the target's time, inactive and (where declared) seen items are not returned.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gr_platform.evaluation.metrics import binary_metrics, rank_metrics
from gr_platform.evaluation.popularity import train_counts
from gr_platform.evaluation.ranks import Ranked, Targets, rank_targets, require_finite
from gr_platform.models.ranking import RankingModel
from gr_platform.models.retrieval import RetrievalModel
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.splits import Split, target_positions
from gr_platform.training.batches import request_batch
from gr_platform.training.seeds import generator

FORWARD_USERS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Ranking at the targets: items int64 [U], labels bool [U, tasks], logits float32 [U, tasks]."""

    targets: Targets
    items: np.ndarray
    labels: np.ndarray
    logits: np.ndarray


def split_targets(
    dataset: SequenceDataset, split: Split, *, positives_only: bool, max_users: int | None = None
) -> Targets:
    """Return the targets of `split`; with `max_users` a fixed random sample of them, in the data set's order.

    `positives_only` leaves out targets without a positive action: what retrieval is asked for.
    """
    rows, positions = target_positions(dataset.lengths, split)
    if positives_only:
        wanted = (dataset.at(rows, positions).actions & dataset.declaration.positive_mask()) != 0
        rows, positions = rows[wanted], positions[wanted]
    if max_users is not None and len(rows) > max_users:
        kept = np.sort(generator(0, "sample").choice(len(rows), max_users, replace=False))
        rows, positions = rows[kept], positions[kept]
    return Targets(rows=rows, positions=positions)


@torch.inference_mode()
def rank_by_model(
    model: RetrievalModel,
    dataset: SequenceDataset,
    split: Split,
    *,
    chunk: int | None = None,
    max_users: int | None = None,
) -> Ranked:
    """Return the rank of every target under the model; `chunk` replaces the one served (1 = the paper's window)."""
    config = model.config if chunk is None else replace(model.config, chunk=chunk)
    targets = split_targets(dataset, split, positives_only=True, max_users=max_users)
    model.eval()
    users = [model.user_vectors(request_batch(dataset, part.rows, part.positions, config)) for part in _parts(targets)]
    user_vectors = torch.cat(users) if users else torch.zeros(0, config.embedding_dim)
    item_vectors = model.item_vectors().T

    def score_block(begin: int, end: int) -> np.ndarray:
        return (user_vectors[begin:end] @ item_vectors / config.temperature).numpy()

    return rank_targets(dataset, targets, score_block, exclude_seen=dataset.declaration.exclude_seen == "all")


def rank_by_popularity(dataset: SequenceDataset, split: Split) -> Ranked:
    """Return the rank of every target when all users get the most frequent items of the training part."""
    counts = train_counts(dataset).astype(np.float64)

    def score_block(begin: int, end: int) -> np.ndarray:
        return np.repeat(counts[None, :], end - begin, axis=0)

    targets = split_targets(dataset, split, positives_only=True)
    return rank_targets(dataset, targets, score_block, exclude_seen=dataset.declaration.exclude_seen == "all")


@torch.inference_mode()
def judge_by_model(
    model: RankingModel, dataset: SequenceDataset, split: Split, *, max_users: int | None = None
) -> Judged:
    """Return labels and logits of every task at the targets, whatever their actions were.

    One batched forward with the target as last event instead of `model.score`: an item token looks from its own time
    and sees neither its action nor later tokens, so its row is the candidate's (asserted by a test).
    """
    targets = split_targets(dataset, split, positives_only=False, max_users=max_users)
    asked = dataset.at(targets.rows, targets.positions)
    masks = np.array([dataset.declaration.task_masks()[task] for task in model.tasks], np.int64)
    model.eval()
    logits = [torch.zeros(0, len(model.tasks))]
    for part in _parts(targets):
        batch = request_batch(dataset, part.rows, part.positions, model.config, with_target=True)
        logits.append(model.logits(batch)[batch.offsets[1:] - 1])
    logits_UT = torch.cat(logits).numpy()
    require_finite(logits_UT, "logits")
    return Judged(
        targets=targets,
        items=asked.items,
        labels=(asked.actions[:, None] & masks[None, :]) != 0,
        logits=logits_UT,
    )


def retrieval_facts(ranked: Ranked) -> dict[str, Any]:
    """Return the rank metrics with `num_users`, `num_ties`, `num_unreachable`."""
    return rank_metrics(ranked.ranks) | {
        "num_users": len(ranked.targets),
        "num_ties": ranked.num_ties,
        "num_unreachable": ranked.num_unreachable,
    }


def ranking_facts(judged: Judged, tasks: list[str]) -> dict[str, Any]:
    """Return task -> ne, log_loss, auc, base_rate, num_targets."""
    return {task: binary_metrics(judged.labels[:, i], judged.logits[:, i]) for i, task in enumerate(tasks)}


def evaluate_retrieval(
    model: RetrievalModel, dataset: SequenceDataset, split: Split, *, max_users: int | None = None
) -> dict[str, Any]:
    """Return hit rate, NDCG, MRR and counts over the whole catalogue. Raises NonFiniteScores."""
    return retrieval_facts(rank_by_model(model, dataset, split, max_users=max_users))


def evaluate_ranking(
    model: RankingModel, dataset: SequenceDataset, split: Split, *, max_users: int | None = None
) -> dict[str, Any]:
    """Return task -> NE, log loss, AUC and counts. Raises NonFiniteScores."""
    return ranking_facts(judge_by_model(model, dataset, split, max_users=max_users), model.tasks)


def _parts(targets: Targets) -> list[Targets]:
    return [
        Targets(rows=targets.rows[i : i + FORWARD_USERS], positions=targets.positions[i : i + FORWARD_USERS])
        for i in range(0, len(targets), FORWARD_USERS)
    ]

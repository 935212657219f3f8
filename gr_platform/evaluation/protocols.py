"""How a model is judged, leave-one-out or by time: against the whole catalogue or at the exposure itself.

Invariant: a model, the baselines and the server answer the same question: the history is what the split says
is known, the request comes at the target's time, inactive and (where declared) seen items are not returned. A model is
asked on the device where it is; what it says is judged on the CPU.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr_platform.evaluation.cooccurrence import Cooccurrence, CooccurrenceConfig
from gr_platform.evaluation.metrics import binary_metrics, rank_metrics
from gr_platform.evaluation.popularity import train_counts
from gr_platform.evaluation.ranks import Ranked, rank_targets, require_finite
from gr_platform.models.batch import EventBatch
from gr_platform.models.config import ModelConfig
from gr_platform.models.ranking import RankingModel
from gr_platform.models.retrieval import RetrievalModel
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.k_core import k_core as core_of
from gr_platform.sequences.splits import Holdout, Split, Targets, leave_one_out
from gr_platform.sequences.vocabulary import unknown_rows
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
    dataset: SequenceDataset,
    split: Split | Holdout,
    *,
    positives_only: bool,
    max_users: int | None = None,
    k_core: int = 0,
) -> Targets:
    """Return the targets of `split`; with `max_users` a fixed random sample of so many, in the data set's order.

    `positives_only` leaves out targets without a positive action: what retrieval is asked for. `k_core` > 0 leaves out
    those whose user or item is not in the k-core of the training part.
    """
    holdout = holdout_of(dataset, split)
    targets = holdout.targets
    asked = dataset.at(targets.rows, targets.positions)
    wanted = np.ones(len(targets), bool)
    if positives_only:
        wanted &= (asked.actions & dataset.declaration.positive_mask()) != 0
    if k_core:
        wanted &= core_of(dataset, holdout.ends, k_core).holds(targets.rows, asked.items)
    targets = targets[wanted]
    if max_users is not None and len(targets) > max_users:
        targets = targets[np.sort(generator(0, "sample").choice(len(targets), max_users, replace=False))]
    return targets


def holdout_of(dataset: SequenceDataset, split: Split | Holdout) -> Holdout:
    """Return the holdout itself, or leave-one-out's of that name."""
    return split if isinstance(split, Holdout) else leave_one_out(dataset, split)


@torch.inference_mode()
def rank_by_model(
    model: RetrievalModel,
    dataset: SequenceDataset,
    split: Split | Holdout,
    *,
    chunk: int | None = None,
    max_users: int | None = None,
) -> Ranked:
    """Return the rank of every target under the model; `chunk` replaces the one served (1 = the paper's window)."""
    config = model.config if chunk is None else replace(model.config, chunk=chunk)
    targets = split_targets(dataset, split, positives_only=True, max_users=max_users)
    model.eval()
    known = rows_known(dataset, model.num_rows)
    users = [model.user_vectors(_batch(dataset, part, config, known=known)) for part in _parts(targets)]
    user_vectors = torch.cat(users) if users else torch.zeros(0, config.embedding_dim)
    item_vectors = model.item_vectors().T
    num_later = max(0, dataset.vocabulary.num_rows - model.num_rows)

    def score_block(begin: int, end: int) -> np.ndarray:
        scores = (user_vectors[begin:end] @ item_vectors / config.temperature).cpu().numpy()
        return np.pad(scores, ((0, 0), (0, num_later))) if num_later else scores

    exclude_seen = dataset.declaration.exclude_seen == "all"
    return rank_targets(dataset, targets, score_block, exclude_seen=exclude_seen, num_known=model.num_rows)


def rank_by_popularity(dataset: SequenceDataset, split: Split | Holdout) -> Ranked:
    """Return the rank of every target when all users get the most frequent items of the training part."""
    holdout = holdout_of(dataset, split)
    counts = train_counts(dataset, holdout.ends).astype(np.float64)

    def score_block(begin: int, end: int) -> np.ndarray:
        return np.repeat(counts[None, :], end - begin, axis=0)

    targets = split_targets(dataset, holdout, positives_only=True)
    return rank_targets(dataset, targets, score_block, exclude_seen=dataset.declaration.exclude_seen == "all")


def rank_by_cooccurrence(
    dataset: SequenceDataset, split: Split | Holdout, config: CooccurrenceConfig | None = None
) -> Ranked:
    """Return the rank of every target by what followed the user's last items in the training part."""
    holdout = holdout_of(dataset, split)
    baseline = Cooccurrence(dataset, holdout.ends, config)
    targets = split_targets(dataset, holdout, positives_only=True)

    def score_block(begin: int, end: int) -> np.ndarray:
        return baseline.scores(targets[begin:end])

    return rank_targets(dataset, targets, score_block, exclude_seen=dataset.declaration.exclude_seen == "all")


@torch.inference_mode()
def judge_by_model(
    model: RankingModel, dataset: SequenceDataset, split: Split | Holdout, *, max_users: int | None = None
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
    known = rows_known(dataset, model.num_rows)
    for part in _parts(targets):
        batch = _batch(dataset, part, model.config, with_target=True, known=known)
        logits.append(model.logits(batch).cpu()[batch.offsets[1:] - 1])
    logits_UT = torch.cat(logits).numpy()
    require_finite(logits_UT, "logits")
    return Judged(
        targets=targets,
        items=asked.items,
        labels=(asked.actions[:, None] & masks[None, :]) != 0,
        logits=logits_UT,
    )


def retrieval_facts(ranked: Ranked) -> dict[str, Any]:
    """Return the rank metrics with `num_users`, `num_targets`, `num_ties`, `num_unreachable`."""
    return rank_metrics(ranked.ranks) | {
        "num_users": len(np.unique(ranked.targets.rows)),
        "num_targets": len(ranked.targets),
        "num_ties": ranked.num_ties,
        "num_unreachable": ranked.num_unreachable,
    }


def ranking_facts(judged: Judged, tasks: list[str]) -> dict[str, Any]:
    """Return task -> `binary_metrics`; the targets' users are whom GAUC groups by."""
    users = judged.targets.rows
    return {task: binary_metrics(judged.labels[:, i], judged.logits[:, i], users) for i, task in enumerate(tasks)}


def evaluate_retrieval(
    model: RetrievalModel, dataset: SequenceDataset, split: Split | Holdout, *, max_users: int | None = None
) -> dict[str, Any]:
    """Return hit rate, NDCG, MRR and counts over the whole catalogue. Raises NonFiniteScores."""
    return retrieval_facts(rank_by_model(model, dataset, split, max_users=max_users))


def evaluate_ranking(
    model: RankingModel, dataset: SequenceDataset, split: Split | Holdout, *, max_users: int | None = None
) -> dict[str, Any]:
    """Return task -> NE, log loss, AUC and counts. Raises NonFiniteScores."""
    return ranking_facts(judge_by_model(model, dataset, split, max_users=max_users), model.tasks)


def rows_known(dataset: SequenceDataset, num_rows: int) -> Tensor | None:
    """Return the row, int64 [R], that a model with the first `num_rows` rows has for each row of the data set.

    An item that came later has the bucket that a server with the model's vocabulary gives it. None where there is none.
    """
    vocabulary = dataset.vocabulary
    if num_rows >= vocabulary.num_rows:
        return None
    rows = torch.arange(vocabulary.num_rows)
    later = vocabulary.item_ids[num_rows - vocabulary.first_item :]
    rows[num_rows:] = torch.from_numpy(unknown_rows(later))
    return rows


def _batch(
    dataset: SequenceDataset,
    targets: Targets,
    config: ModelConfig,
    *,
    with_target: bool = False,
    known: Tensor | None = None,
) -> EventBatch:
    batch = request_batch(
        dataset, targets.rows, targets.positions, config, known=targets.known, with_target=with_target
    )
    return batch if known is None else replace(batch, items=known[batch.items])


def _parts(targets: Targets) -> list[Targets]:
    return [targets[begin : begin + FORWARD_USERS] for begin in range(0, len(targets), FORWARD_USERS)]

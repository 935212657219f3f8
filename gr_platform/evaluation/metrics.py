"""The figures that models are compared by, from ranks and from logits, in numpy alone.

Invariant: no figure is ever NaN. Where one is undefined (no example, a single class) it is None, and `undefined` says
why. Names carry no '@', which MLflow rejects.
"""

from typing import Any

import numpy as np

HR_CUTS = (1, 10, 50, 200)
NDCG_CUTS = (10, 200)


def rank_metrics(ranks: np.ndarray) -> dict[str, Any]:
    """Return `hr_at_{1,10,50,200}`, `ndcg_at_{10,200}` and `mrr` in [0, 1] of one relevant item per example.

    ranks: int64 [users], 1 = best. All None (with `undefined`) if there are none. Raises ValueError for a rank below 1.
    """
    names = [f"hr_at_{k}" for k in HR_CUTS] + [f"ndcg_at_{k}" for k in NDCG_CUTS] + ["mrr"]
    if len(ranks) == 0:
        return dict.fromkeys(names) | {"undefined": "no examples"}
    if ranks.min() < 1:
        raise ValueError(f"ranks hold {ranks.min()}, must be 1 or more")
    gains = 1.0 / np.log2(1.0 + ranks)
    values = [float(np.mean(ranks <= k)) for k in HR_CUTS]
    values += [float(np.mean(np.where(ranks <= k, gains, 0.0))) for k in NDCG_CUTS]
    return dict(zip(names, [*values, float(np.mean(1.0 / ranks))], strict=True))


def log_loss(labels: np.ndarray, logits: np.ndarray) -> float | None:
    """Return the mean cross entropy in nats of bool labels [n] under sigmoid(logits [n]), or None if n = 0."""
    if len(labels) == 0:
        return None
    logits = logits.astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, np.where(labels, -logits, logits))))


def normalised_entropy(labels: np.ndarray, logits: np.ndarray) -> float | None:
    """Return the log loss divided by the entropy of the labels' own base rate: below 1 beats a constant.

    None if all labels are equal, since that entropy is 0. Source: PAPER.md section 6 (NE).
    """
    if len(labels) == 0 or labels.all() or not labels.any():
        return None
    rate = float(np.mean(labels))
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    loss = log_loss(labels, logits)
    return None if loss is None else loss / float(entropy)


def auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Return the probability that a positive scores above a negative, ties counting one half; None for one class."""
    num_positives = int(np.count_nonzero(labels))
    num_negatives = len(labels) - num_positives
    if num_positives == 0 or num_negatives == 0:
        return None
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2.0
    positive_rank_sum = float(mean_ranks[group][labels.astype(bool)].sum())
    return (positive_rank_sum - num_positives * (num_positives + 1) / 2.0) / (num_positives * num_negatives)


def binary_metrics(labels: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """Return `ne`, `log_loss`, `auc`, `base_rate`, `num_targets` of one task; `undefined` says why a figure is None.

    labels: bool [n]; logits: float [n]. Raises ValueError if a logit is not finite.
    """
    labels = labels.astype(bool)
    if not np.isfinite(logits).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(logits))} of {len(logits)} logits are not finite")
    metrics: dict[str, Any] = {
        "ne": normalised_entropy(labels, logits),
        "log_loss": log_loss(labels, logits),
        "auc": auc(labels, logits),
        "base_rate": float(np.mean(labels)) if len(labels) else None,
        "num_targets": len(labels),
    }
    if len(labels) == 0:
        metrics["undefined"] = "no examples"
    elif metrics["auc"] is None:
        metrics["undefined"] = f"all {len(labels)} labels are {'positive' if labels[0] else 'negative'}"
    return metrics

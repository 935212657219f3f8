"""The figures that models are compared by, from ranks and from logits, in numpy alone.

Invariant: no figure is ever NaN. Where one is undefined (no example, a single class) it is None, and `undefined` says
why. Names carry no '@', which MLflow rejects.

Legend: n targets; a figure "by user" groups them by a key per target.
"""

from typing import Any

import numpy as np

CUTS = (1, 10, 50, 100, 200)
CALIBRATION_BINS = 10


def rank_metrics(ranks: np.ndarray) -> dict[str, Any]:
    """Return `hr_at_K` and `ndcg_at_K` for K in CUTS and `mrr`, all in [0, 1], of one relevant item per example.

    ranks: int64 [n], 1 = best. All None (with `undefined`) if there are none. Raises ValueError for a rank below 1.
    """
    names = [f"{figure}_at_{k}" for figure in ("hr", "ndcg") for k in CUTS] + ["mrr"]
    if len(ranks) == 0:
        return dict.fromkeys(names) | {"undefined": "no examples"}
    return {name: float(np.mean(gains(ranks, name))) for name in names}


def gains(ranks: np.ndarray, figure: str) -> np.ndarray:
    """Return what each rank (int64 [n], 1 = best) adds to a figure of `rank_metrics` before the mean, float64 [n].

    Raises ValueError for a rank below 1 or an unknown figure.
    """
    if len(ranks) and ranks.min() < 1:
        raise ValueError(f"ranks hold {ranks.min()}, must be 1 or more")
    if figure == "mrr":
        return 1.0 / ranks
    name, _, cut = figure.partition("_at_")
    if name not in ("hr", "ndcg") or not cut.isdecimal():
        raise ValueError(f"figure is {figure!r}, must be hr_at_K, ndcg_at_K or mrr")
    return np.where(ranks <= int(cut), 1.0 / np.log2(1.0 + ranks) if name == "ndcg" else 1.0, 0.0)


def log_loss(labels: np.ndarray, logits: np.ndarray) -> float | None:
    """Return the mean cross entropy in nats of bool labels [n] under sigmoid(logits [n]), or None if n = 0."""
    return float(np.mean(log_losses(labels, logits))) if len(labels) else None


def log_losses(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Return the cross entropy in nats of each label (bool) under sigmoid(logit), float64 of their common shape."""
    logits = logits.astype(np.float64)
    losses: np.ndarray = np.logaddexp(0.0, np.where(labels, -logits, logits))
    return losses


def normalised_entropy(labels: np.ndarray, logits: np.ndarray) -> float | None:
    """Return the log loss divided by the entropy of the labels' own base rate: below 1 beats a constant.

    None if all labels are equal, since that entropy is 0. Source: PAPER.md section 6 (NE).
    """
    if len(labels) == 0 or labels.all() or not labels.any():
        return None
    return float(np.mean(log_losses(labels, logits)) / entropy(np.mean(labels)))


def entropy(rate: np.ndarray | float) -> np.ndarray:
    """Return the entropy in nats of labels that are positive at `rate` in [0, 1]; 0 at both ends."""
    rate = np.asarray(rate, np.float64)
    some = (rate > 0) & (rate < 1)
    safe = np.where(some, rate, 0.5)
    return np.where(some, -(safe * np.log(safe) + (1 - safe) * np.log1p(-safe)), 0.0)


def auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Return the probability that a positive scores above a negative, ties counting one half; None for one class."""
    return gauc(labels, scores, np.zeros(len(labels), np.int64))


def gauc(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float | None:
    """Return the mean over users of the AUC among their own targets, weighted by how many targets they have.

    labels bool [n], scores [n], users: whose target each is, any sortable key [n]. Users whose labels are all equal
    have no AUC and are left out; None if that leaves nobody.
    Source: "Deep Interest Network for Click-Through Rate Prediction" (KDD 2018), section 6.2.
    """
    _, owner = np.unique(users, return_inverse=True)
    _, value = np.unique(scores, return_inverse=True)
    order = np.lexsort((value, owner))
    owner, value, positive = owner[order], value[order], labels[order].astype(bool)
    first_of_user = np.searchsorted(owner, owner)
    key = owner * (value.max(initial=0) + 1) + value
    # Among equal scores every one takes the mean of their places, counted from 1.
    places = (np.searchsorted(key, key) + np.searchsorted(key, key, side="right") + 1) / 2.0 - first_of_user
    positives = np.bincount(owner, weights=positive)
    negatives = np.bincount(owner) - positives
    place_sum = np.bincount(owner, weights=places * positive)
    both = (positives > 0) & (negatives > 0)
    positives, negatives, place_sum = positives[both], negatives[both], place_sum[both]
    if not both.any():
        return None
    aucs = (place_sum - positives * (positives + 1) / 2.0) / (positives * negatives)
    return float(np.average(aucs, weights=positives + negatives))


def calibration_bins(labels: np.ndarray, logits: np.ndarray, num_bins: int = CALIBRATION_BINS) -> list[dict[str, Any]]:
    """Return the reliability curve: `num_targets`, mean `predicted` and `observed` probability by rising prediction.

    Bins hold about equally many targets; equal predictions share one, so there may be fewer than `num_bins`.
    """
    if len(labels) == 0:
        return []
    predicted = probabilities(logits)
    edges = np.unique(np.quantile(predicted, np.arange(1, num_bins) / num_bins))
    places = np.searchsorted(edges, predicted, side="left")
    number = np.bincount(places)
    sums = [np.bincount(places, weights=values) for values in (predicted, labels)]
    return [
        {"num_targets": int(n), "predicted": float(p / n), "observed": float(o / n)}
        for n, p, o in zip(number, *sums, strict=True)
        if n
    ]


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return sigmoid(logits) without overflow, float64."""
    return np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))


def binary_metrics(labels: np.ndarray, logits: np.ndarray, users: np.ndarray | None = None) -> dict[str, Any]:
    """Return `ne`, `log_loss`, `auc`, `gauc`, `calibration`, `ece`, `base_rate`, `num_targets` of one task.

    labels: bool [n]; logits: float [n]; users: whose target each is, [n] (by default all are different users').
    calibration: sum of the predictions over that of the labels, 1 is right. ece: mean of |predicted - observed| over
    the bins of `calibration_bins`, weighted by their targets. `undefined` says why figures are None.
    Raises ValueError if a logit is not finite.
    """
    labels, num_targets = labels.astype(bool), len(labels)
    if not np.isfinite(logits).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(logits))} of {num_targets} logits are not finite")
    num_positives = int(labels.sum())
    bins = calibration_bins(labels, logits)
    gaps = sum(each["num_targets"] * abs(each["predicted"] - each["observed"]) for each in bins)
    metrics: dict[str, Any] = {
        "ne": normalised_entropy(labels, logits),
        "log_loss": log_loss(labels, logits),
        "auc": auc(labels, logits),
        "gauc": gauc(labels, logits, np.arange(num_targets) if users is None else users),
        "calibration": float(probabilities(logits).sum() / num_positives) if num_positives else None,
        "ece": gaps / num_targets if num_targets else None,
        "base_rate": num_positives / num_targets if num_targets else None,
        "num_targets": num_targets,
    }
    if reason := _why_undefined(metrics):
        metrics["undefined"] = reason
    return metrics


def _why_undefined(metrics: dict[str, Any]) -> str:
    if metrics["num_targets"] == 0:
        return "no examples"
    if metrics["auc"] is None:
        return f"all {metrics['num_targets']} labels are {'positive' if metrics['base_rate'] else 'negative'}"
    return "gauc: no user has targets of both labels" if metrics["gauc"] is None else ""


def recommended_facts(in_lists: np.ndarray) -> dict[str, Any]:
    """Return what of the catalogue is recommended, of how many lists each item stands in, int64 [R].

    num_items: items that stand in any; top_share: share of the places that the most frequent item takes (0 of no list).
    """
    total = int(in_lists.sum())
    return {
        "num_items": int(np.count_nonzero(in_lists)),
        "top_share": float(in_lists.max(initial=0) / total) if total else 0.0,
    }

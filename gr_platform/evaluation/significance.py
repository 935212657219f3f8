"""Whether two runs differ by more than chance: a paired bootstrap over users.

Invariant: a resample draws whole users, the same ones for both runs, so what makes a user easy or hard cancels.

Legend: U users, T targets, K sums a user.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gr_platform.errors import UserError
from gr_platform.evaluation.metrics import entropy, gains, log_losses
from gr_platform.evaluation.tables import LABEL, LOGIT, tasks_of
from gr_platform.training.seeds import generator

NUM_RESAMPLES = 10_000
RANK_FIGURES = ("hr_at_10", "hr_at_50", "hr_at_200", "ndcg_at_10", "ndcg_at_200", "mrr")
CONFIDENCE = 0.95
_ENDS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
BLOCK_DRAWS = 1 << 19
MEANING = (
    "interval of 95 % and p value by a bootstrap that draws the same users of both runs: they say whether other users "
    "would see the difference, not whether other training seeds would"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A figure of runs a and b; `difference` is b - a, `low` .. `high` its 95 % interval.

    p_value: how often a difference at least as far from 0 is chance, two-sided; 1 where the runs never differ.
    """

    figure: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A figure of one run with its 95 % interval: what it could have been, asked of other users of the same kind."""

    figure: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class _Figure:
    """What each target adds to a mean, float64 [T], and its label where the mean is divided by the labels' entropy."""

    values: np.ndarray
    labels: np.ndarray | None = None


def compare_tables(a: pa.Table, b: pa.Table, *, num_resamples: int = NUM_RESAMPLES, seed: int = 1) -> list[Difference]:
    """Return the differences of two ranked tables (RANK_FIGURES) or two judged ones (`<task>_log_loss`, `<task>_ne`).

    A task's NE is left out where all its labels are equal. Raises UserError unless both tables ask the same users for
    the same targets.
    """
    require_same_targets(a, b)
    ours, theirs = _figures(a), _figures(b)
    _, users = np.unique(a["user_id"].to_numpy(), return_inverse=True)
    # Each figure needs the difference and the labels of every user; how many targets they have is the same for all.
    columns = [np.ones(len(a))]
    for name, figure in ours.items():
        columns += [theirs[name].values - figure.values, _labels(figure)]
    by_user = np.stack([np.bincount(users, weights=column) for column in columns], axis=1)
    sums = resampled_sums(by_user, num_resamples=num_resamples, seed=seed)
    found = []
    for index, (name, figure) in enumerate(ours.items()):
        resampled = _mean(sums[:, 1 + 2 * index], sums[:, 0], None if figure.labels is None else sums[:, 2 + 2 * index])
        found.append(_difference(name, _value(figure), _value(theirs[name]), resampled[np.isfinite(resampled)]))
    return found


def intervals(table: pa.Table, *, num_resamples: int = NUM_RESAMPLES, seed: int = 1) -> list[Interval]:
    """Return the 95 % interval of each figure of one ranked or judged table, as `compare_tables` names them."""
    if not len(table):
        return []
    _, users = np.unique(table["user_id"].to_numpy(), return_inverse=True)
    figures = _figures(table)
    columns = [np.ones(len(table))]
    for figure in figures.values():
        columns += [figure.values, _labels(figure)]
    by_user = np.stack([np.bincount(users, weights=column) for column in columns], axis=1)
    sums = resampled_sums(by_user, num_resamples=num_resamples, seed=seed)
    found = []
    for index, (name, figure) in enumerate(figures.items()):
        resampled = _mean(sums[:, 1 + 2 * index], sums[:, 0], None if figure.labels is None else sums[:, 2 + 2 * index])
        low, high = np.quantile(resampled[np.isfinite(resampled)], _ENDS).tolist()
        found.append(Interval(figure=name, value=_value(figure), low=low, high=high))
    return found


def require_same_targets(a: pa.Table, b: pa.Table) -> None:
    """Raise UserError unless both tables are of one kind and ask the same users for the same targets."""
    if ("rank" in a.column_names) != ("rank" in b.column_names) or tasks_of(a) != tasks_of(b):
        raise UserError("one run retrieves and the other ranks, or their tasks differ; compare runs of one kind")
    if not (a["user_id"].equals(b["user_id"]) and a["item"].equals(b["item"])):
        raise UserError(
            f"the runs were judged on different users or targets ({len(a):,} and {len(b):,} of them); compare runs of "
            "the same sequences and the same split"
        )
    if not len(a):
        raise UserError("the runs were judged on no target at all, so there is nothing to compare")


def resampled_sums(values: np.ndarray, *, num_resamples: int = NUM_RESAMPLES, seed: int = 1) -> np.ndarray:
    """Return the sums over as many users as there are, drawn with replacement: [num_resamples, K] of values [U, K]."""
    draws, num_users = generator(seed, "bootstrap"), len(values)
    columns = np.ascontiguousarray(values.T, np.float64)
    sums = np.repeat(values.sum(axis=0, keepdims=True), num_resamples, axis=0)
    # What is equal for all users has the same sum in every resample.
    varied = [index for index, column in enumerate(columns) if np.ptp(column) > 0]
    block = max(1, BLOCK_DRAWS // num_users)
    for begin in range(0, num_resamples, block):
        end = min(begin + block, num_resamples)
        chosen = draws.integers(num_users, size=(end - begin, num_users))
        for index in varied:
            sums[begin:end, index] = np.take(columns[index], chosen).sum(axis=1)
    return sums


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean over seeds and its standard error, None for a single value. Raises ValueError for none."""
    if not len(values):
        raise ValueError("values is empty, must hold a figure for each seed")
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(np.mean(values)), error


def _figures(table: pa.Table) -> dict[str, _Figure]:
    if "rank" in table.column_names:
        return {name: _Figure(gains(table["rank"].to_numpy(), name)) for name in RANK_FIGURES}
    figures = {}
    for task in tasks_of(table):
        labels = table[LABEL + task].to_numpy()
        losses = log_losses(labels, table[LOGIT + task].to_numpy())
        figures[f"{task}_log_loss"] = _Figure(losses)
        if labels.any() and not labels.all():
            figures[f"{task}_ne"] = _Figure(losses, labels)
    return figures


def _labels(figure: _Figure) -> np.ndarray:
    return np.zeros(len(figure.values)) if figure.labels is None else figure.labels.astype(np.float64)


def _mean(total: np.ndarray, num: np.ndarray, positives: np.ndarray | None) -> np.ndarray:
    """Return total / num, over the labels' entropy where there are labels: not finite where all of them are equal."""
    if positives is None:
        return total / num
    with np.errstate(divide="ignore", invalid="ignore"):
        return total / num / entropy(positives / num)


def _value(figure: _Figure) -> float:
    positives = None if figure.labels is None else np.asarray(figure.labels.sum())
    return float(_mean(figure.values.sum(), np.asarray(len(figure.values)), positives))


def _difference(name: str, a: float, b: float, resampled: np.ndarray) -> Difference:
    low, high = np.quantile(resampled, _ENDS).tolist()
    # The data themselves count as one resample: a p value of 0 would claim more than a finite number of them can.
    one_side = (1 + min(np.count_nonzero(resampled <= 0), np.count_nonzero(resampled >= 0))) / (1 + len(resampled))
    return Difference(figure=name, a=a, b=b, difference=b - a, low=low, high=high, p_value=float(min(1, 2 * one_side)))

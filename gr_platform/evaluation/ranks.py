"""Rank of each user's target among all items that could have been returned.

Invariant: a tie counts against the model (a constant model ranks last), and a target that could not be returned (it is
inactive, or seen and excluded) ranks behind every item. NaN never ranks: it raises.

Legend: B targets of a block, U targets (one a user, unless a split by time asks for all), R vocabulary rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.splits import Targets

BLOCK_USERS = 256
BLOCK_SCORES = 1 << 25
LIST_ITEMS = 10


class NonFiniteScores(RuntimeError):
    """A model scored something NaN or infinite, so no order of its items means anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """Ranks int64 [U] (1 = best) and scores float32 [U] of the targets' items int64 [U].

    tied: which targets share their score with another item; unreachable: which could not be returned; bool [U].
    in_lists: in how many of the lists of the LIST_ITEMS best each item stands, int64 [R].
    """

    targets: Targets
    items: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray
    tied: np.ndarray
    unreachable: np.ndarray
    in_lists: np.ndarray

    @property
    def num_ties(self) -> int:
        """How many targets share their score with another item."""
        return int(np.count_nonzero(self.tied))

    @property
    def num_unreachable(self) -> int:
        """How many targets could not be returned."""
        return int(np.count_nonzero(self.unreachable))


def require_finite(values: np.ndarray, what: str) -> None:
    """Raise NonFiniteScores if any of `values` is NaN or infinite."""
    num_bad = values.size - int(np.count_nonzero(np.isfinite(values)))
    if num_bad:
        raise NonFiniteScores(
            f"{num_bad} of {values.size} {what} are NaN or infinite; the model is unusable, train it again with a "
            "smaller learning_rate"
        )


def rank_targets(
    dataset: SequenceDataset,
    targets: Targets,
    score_block: Callable[[int, int], np.ndarray],
    *,
    exclude_seen: bool,
    num_known: int | None = None,
) -> Ranked:
    """Return the targets' ranks among active items, without those known of the user under `exclude_seen`.

    score_block(begin, end): float [end - begin, R] scores of users begin..end-1 of `targets`; it may be overwritten.
    num_known: how many rows the model has, where its vocabulary is older than the data set's: the items behind them it
    cannot return. Memory: at most BLOCK_SCORES scores at once (or one user's). Raises NonFiniteScores.
    """
    barred = ~dataset.vocabulary.active
    if num_known is not None:
        barred[num_known:] = True
    items = dataset.at(targets.rows, targets.positions).items
    ranks, scores = np.empty(len(targets), np.int64), np.empty(len(targets), np.float32)
    tied, unreachable = np.empty(len(targets), bool), np.empty(len(targets), bool)
    in_lists, num_listed = np.zeros(len(barred), np.int64), min(LIST_ITEMS, len(barred))
    block = max(1, min(BLOCK_USERS, BLOCK_SCORES // len(barred)))
    for begin in range(0, len(targets), block):
        end = min(begin + block, len(targets))
        table = score_block(begin, end)
        require_finite(table, f"scores of users {begin}..{end - 1}")
        asked = np.arange(end - begin), items[begin:end]
        own = table[asked]
        table[:, barred] = -np.inf
        if exclude_seen:
            nothing = np.zeros(end - begin, np.int64)
            seen = dataset.gather(targets.rows[begin:end], nothing, targets.known[begin:end])
            table[seen.owner, seen.items] = -np.inf
        lost = np.isneginf(table[asked])
        best = np.argpartition(table, -num_listed, axis=1)[:, -num_listed:]
        in_lists += np.bincount(best[np.isfinite(np.take_along_axis(table, best, 1))], minlength=len(barred))
        at_least = np.count_nonzero(table >= own[:, None], axis=1)
        ranks[begin:end] = np.where(lost, np.count_nonzero(~barred) + 1, at_least)
        scores[begin:end] = own
        tied[begin:end] = (np.count_nonzero(table == own[:, None], axis=1) > 1) & ~lost
        unreachable[begin:end] = lost
    return Ranked(
        targets=targets,
        items=items,
        ranks=ranks,
        scores=scores,
        tied=tied,
        unreachable=unreachable,
        in_lists=in_lists,
    )

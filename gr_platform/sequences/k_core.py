"""Which users and items have enough exposures, among each other, to be worth a target.

Invariant: a core says which targets count. It never takes an item out of the vocabulary or an exposure out of a
history.
"""

from dataclasses import dataclass

import numpy as np

from gr_platform.sequences.dataset import SequenceDataset


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreMask:
    """Who is inside: users bool [num_users], items bool [vocabulary rows]."""

    users: np.ndarray
    items: np.ndarray

    def holds(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Return which pairs of a user row and an item, int64 [n] each, have both inside, bool [n]."""
        inside: np.ndarray = self.users[rows] & self.items[items]
        return inside


def k_core(dataset: SequenceDataset, ends: np.ndarray, k: int) -> CoreMask:
    """Return the largest sets of users and items that all have `k` or more exposures with each other.

    Counted are each user's first `ends` exposures, int64 [U], whatever their actions. Reads the log once a round, as
    long as a round removes something. Raises ValueError if k is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}, must be 1 or more")
    num_rows = dataset.vocabulary.num_rows
    users, items = np.ones(dataset.num_users, bool), np.ones(num_rows, bool)
    while True:
        of_users, of_items = np.zeros(dataset.num_users, np.int64), np.zeros(num_rows, np.int64)
        for rows, block in dataset.blocks(ends=np.where(users, ends, 0)):
            kept = items[block.items]
            of_users[rows] = np.bincount(block.owner[kept], minlength=len(rows))
            of_items += np.bincount(block.items[kept], minlength=num_rows)
        left = CoreMask(users=of_users >= k, items=of_items >= k)
        if np.array_equal(left.users, users) and np.array_equal(left.items, items):
            return left
        users, items = left.users, left.items

"""The exact best k of a catalogue for several users: blocks of one matrix product, each merged into what was best.

Invariant: the list is the head of a stable sort of all scores: equal scores stand in the order of their rows.

Legend: V items, d width, B users.
"""

import numpy as np

# Scores of a block stay in the cache while they are looked through.
BLOCK_ITEMS = 65_536


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the indices of the k highest finite scores, best first, equal ones by index; fewer if fewer are finite."""
    k = min(k, int(np.count_nonzero(scores > -np.inf)))
    if k == 0:
        return np.zeros(0, np.int64)
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
    above = np.flatnonzero(scores > threshold)
    # Ties at the boundary: the lowest indices, so that equal scores always give the same list.
    level = np.flatnonzero(scores == threshold)[: k - len(above)]
    chosen = np.concatenate([above, level])
    return chosen[np.lexsort((chosen, -scores[chosen]))]


class Best:
    """The best k rows of one user so far, in the order of rows."""

    def __init__(self, k: int, withheld: np.ndarray) -> None:
        """withheld: rows int64, ascending, that this user must not get."""
        self._k, self._withheld = k, withheld
        self._rows, self._scores = np.zeros(0, np.int64), np.zeros(0, np.float32)

    def add(self, scores: np.ndarray, first: int) -> None:
        """Take in the scores float32 of rows first, first + 1, ...; -inf and withheld ones never count."""
        low, high = np.searchsorted(self._withheld, (first, first + len(scores)))
        scores[self._withheld[low:high] - first] = -np.inf
        if len(self._rows) == self._k:
            # A later row beats the last of the list only if its score is higher.
            promising = np.flatnonzero(scores > self._scores.min())
        else:
            promising = top_k(scores, self._k)
        if len(promising):
            rows = np.concatenate([self._rows, np.sort(promising) + first])
            merged = np.concatenate([self._scores, scores[np.sort(promising)]])
            kept = np.sort(top_k(merged, self._k))
            self._rows, self._scores = rows[kept], merged[kept]

    def ordered(self) -> tuple[np.ndarray, np.ndarray]:
        """Return rows int64 and scores float32, best first."""
        order = np.lexsort((self._rows, -self._scores))
        return self._rows[order], self._scores[order]


def best_items(
    users: np.ndarray, items: np.ndarray, ks: list[int], withheld: list[np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (rows, scores) of each user's best items by dot product: users [B, d], items [V, d].

    withheld: for each user the rows int64, ascending, that it must not get.
    """
    found = [Best(min(k, len(items)), rows) for k, rows in zip(ks, withheld, strict=True)]
    for first in range(0, len(items), BLOCK_ITEMS):
        scores = users @ items[first : first + BLOCK_ITEMS].T
        for best, row in zip(found, scores, strict=True):
            best.add(row, first)
    return [best.ordered() for best in found]

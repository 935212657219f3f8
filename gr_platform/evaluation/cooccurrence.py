"""The baseline of what people who had this item had next: item-item counts, no training, personal all the same.

Invariant: counts come from the training part of the split alone, and a user's score from what is known of them alone.

Legend: B users of a block, R vocabulary rows, K neighbours kept of an item.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gr_platform.evaluation.popularity import train_counts
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.splits import Targets

if TYPE_CHECKING:
    from scipy.sparse import csr_array

MAX_PAIRS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class CooccurrenceConfig:
    """window: how many exposures on a later item still counts. neighbours: how many a row keeps, K. num_recent: how
    many of a user's last exposures are asked, the k-th last with weight decay ** (k - 1)."""

    # The best of a coarse grid on ML-1M's validation targets: HR@10 .279, NDCG@10 .154.
    window: int = 5
    neighbours: int = 500
    num_recent: int = 20
    decay: float = 0.8

    def __post_init__(self) -> None:
        for name in ("window", "neighbours", "num_recent"):
            if getattr(self, name) < 1:
                raise ValueError(f"CooccurrenceConfig.{name} is {getattr(self, name)}, must be 1 or more")
        if not 0 < self.decay <= 1:
            raise ValueError(f"CooccurrenceConfig.decay is {self.decay}, must be above 0 and at most 1")


class Cooccurrence:
    """Similarities of items, sparse [R, R], and the scores of users that follow from them."""

    def __init__(self, dataset: SequenceDataset, ends: np.ndarray, config: CooccurrenceConfig | None = None) -> None:
        """Count each user's first `ends` exposures, int64 [U]."""
        self.dataset = dataset
        self.config = config or CooccurrenceConfig()
        self.counts = train_counts(dataset, ends)
        self.similar = similarities(dataset, ends, self.counts, self.config)

    def scores(self, targets: Targets) -> np.ndarray:
        """Return scores float64 [B, R] for the users of B targets; popularity orders what no similarity tells apart."""
        from scipy.sparse import csr_array

        config, num_users = self.config, len(targets)
        recent = self.dataset.gather(targets.rows, np.maximum(targets.known - config.num_recent, 0), targets.known)
        age = np.repeat(recent.offsets[1:], recent.lengths) - 1 - np.arange(len(recent.items))
        weights = csr_array((config.decay**age, recent.items, recent.offsets), (num_users, len(self.counts)))
        table: np.ndarray = (weights @ self.similar).toarray()
        return table + 1e-9 * self.counts / max(1, self.counts.max())


def similarities(
    dataset: SequenceDataset, ends: np.ndarray, counts: np.ndarray, config: CooccurrenceConfig
) -> "csr_array":
    """Return how often j followed i within the window over sqrt(counts[i] * counts[j]), sparse [R, R], K a row i.

    Exact at any size: reads the log once for each range of items i that have at most MAX_PAIRS pairs together (or one
    item), so memory is bounded by that and by the result, R * K entries.
    """
    from scipy.sparse import csr_array, vstack

    size = len(counts)
    norm = 1.0 / np.sqrt(np.maximum(counts, 1))
    parts = []
    for begin, end in _ranges(counts * config.window):
        found = csr_array((end - begin, size), dtype=np.float64)
        for first, then in _pairs(dataset, ends, config.window, begin, end):
            found = found + csr_array((np.ones(len(first)), (first - begin, then)), found.shape)
        row = np.repeat(np.arange(end - begin), np.diff(found.indptr))
        found.data = found.data * norm[begin + row] * norm[found.indices]
        parts.append(_largest(found, config.neighbours))
    return csr_array(vstack(parts, format="csr"))


def _largest(found: "csr_array", num_kept: int) -> "csr_array":
    """Return the `num_kept` largest values of each row; of equal ones those of the lower columns."""
    from scipy.sparse import csr_array

    row = np.repeat(np.arange(found.shape[0]), np.diff(found.indptr))
    order = np.lexsort((found.indices, -found.data, row))
    # A row stays where it is, so a value's place in it is what lies between it and the row's beginning.
    order = order[np.arange(len(row)) - found.indptr[row] < num_kept]
    return csr_array((found.data[order], (row[order], found.indices[order])), found.shape)


def _pairs(
    dataset: SequenceDataset, ends: np.ndarray, window: int, begin: int, end: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of items (i, j), j at most `window` exposures after i of the same user, begin <= i < end.

    An item that follows itself is a pair too: where seen items may be returned, people do come back to them.
    """
    for _, block in dataset.blocks(ends=ends):
        owner, items = block.owner, block.items
        inside = (items >= begin) & (items < end)
        for lag in range(1, min(window, len(items) - 1) + 1):
            kept = inside[:-lag] & (owner[:-lag] == owner[lag:])
            yield items[:-lag][kept], items[lag:][kept]


def _ranges(num_pairs: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows, in order, that have at most MAX_PAIRS pairs each, or one row."""
    total, begin = np.cumsum(num_pairs), 0
    while begin < len(total):
        before = int(total[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, before + MAX_PAIRS, side="right")))
        yield begin, end
        begin = end

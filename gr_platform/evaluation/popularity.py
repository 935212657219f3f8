"""The baseline that every model must beat: the same list for everyone, most frequent items first.

Invariant: counts come from the training part of the split alone, so the baseline knows no more than the models.
"""

import numpy as np

from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.splits import train_ends


def train_counts(dataset: SequenceDataset, ends: np.ndarray | None = None) -> np.ndarray:
    """Return how often each vocabulary row was exposed in the training part, int64 [num_rows].

    The rule: exposures of any action, each user's first `ends`, int64 [U]; by default leave-one-out's, which are all
    but the last two of every user (all of a user with fewer than three).
    """
    num_rows = dataset.vocabulary.num_rows
    counts = np.zeros(num_rows, np.int64)
    for _, trained in dataset.blocks(ends=train_ends(dataset.lengths) if ends is None else ends):
        counts += np.bincount(trained.items, minlength=num_rows)
    return counts

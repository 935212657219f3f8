"""The baseline that every model must beat: the same list for everyone, most frequent items first.

Invariant: counts come from the training part of the split alone, so the baseline knows no more than the models.
"""

import numpy as np

from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.splits import train_ends


def train_counts(dataset: SequenceDataset) -> np.ndarray:
    """Return how often each vocabulary row was exposed in the training part, int64 [num_rows].

    The rule: exposures of any action, all but the last two of every user (all of a user with fewer than three).
    """
    lengths = dataset.lengths
    starts = dataset.offsets[:-1]
    positions = np.arange(len(dataset.items)) - np.repeat(starts, lengths)
    in_train = positions < np.repeat(train_ends(lengths), lengths)
    return np.bincount(dataset.items[in_train], minlength=dataset.vocabulary.num_rows)

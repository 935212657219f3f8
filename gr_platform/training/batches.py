"""Which users and which of their events a step sees.

Invariant: order and membership of an epoch's batches are a function of (seed, epoch) alone, and a batch never holds an
event at or after its user's `end`.
"""

from collections.abc import Iterator

import numpy as np

from gr_platform.models.batch import EventBatch
from gr_platform.models.config import ModelConfig
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.window import window_starts
from gr_platform.training.seeds import generator


def shuffled_batches(rows: np.ndarray, batch_size: int, *, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Yield every one of `rows` once, in batches of `batch_size` (the last may be smaller)."""
    order = generator(seed, "shuffle", epoch).permutation(rows)
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]


def training_batch(dataset: SequenceDataset, rows: np.ndarray, ends: np.ndarray, config: ModelConfig) -> EventBatch:
    """Return what is visible when users `rows` meet their exposure `ends - 1`, and that exposure: the last target.

    rows, ends: int64 [B]; every end is 1 or more. The window is the served one, so the position that answers a full
    window is trained too.
    """
    return request_batch(dataset, rows, ends - 1, config, with_target=True)


def request_batch(
    dataset: SequenceDataset, rows: np.ndarray, positions: np.ndarray, config: ModelConfig, *, with_target: bool = False
) -> EventBatch:
    """Return what a server would know when users `rows` meet their exposure at `positions`: all exposures before it.

    The request time is that exposure's own. `with_target` appends the exposure itself as the last event: for ranking,
    whose item token sees neither its own action nor anything later.
    """
    starts = window_starts(positions, config.max_events, config.chunk)
    visible = dataset.gather(rows, starts, positions + int(with_target))
    return EventBatch.of(visible.histories(), dataset.at(rows, positions).times)

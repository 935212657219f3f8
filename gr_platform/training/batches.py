"""Which users and which of their events a step sees.

Invariant: a batch never holds an event at or after its user's `end`; what an epoch reads, and in which order, is the
reader's promise (sequences/reader.py).
"""

import numpy as np

from gr_platform.models.batch import EventBatch, History
from gr_platform.models.config import ModelConfig, Recipe
from gr_platform.sequences.dataset import Jagged, SequenceDataset
from gr_platform.sequences.reader import Batch, Reader, ReaderConfig
from gr_platform.sequences.window import window_starts


def training_reader(dataset: SequenceDataset, rows: np.ndarray, ends: np.ndarray, recipe: Recipe) -> Reader:
    """Return the reader of what is visible when users `rows` meet their exposure `ends - 1`, and of that exposure.

    rows, ends: int64 [U]; every end is 1 or more. The window is the served one, so the position that answers a full
    window is trained too.
    """
    model, training = recipe.model, recipe.training
    config = ReaderConfig(
        seed=training.seed,
        batch_size=training.batch_size,
        max_length=model.max_events + 1,
        stochastic_length=training.stochastic_length,
    )
    return Reader(dataset, rows, window_starts(ends - 1, model.max_events, model.chunk), ends, config)


def training_batch(batch: Batch) -> EventBatch:
    """Return a reader's batch as tensors that share its memory; users ask at the time of their last event."""
    events = batch.events
    last = events.offsets[1:] - 1
    return EventBatch.of_arrays(events.offsets, _values(events), events.times[last], _values(batch.targets))


def request_batch(
    dataset: SequenceDataset, rows: np.ndarray, positions: np.ndarray, config: ModelConfig, *, with_target: bool = False
) -> EventBatch:
    """Return what a server would know when users `rows` meet their exposure at `positions`: all exposures before it.

    The request time is that exposure's own. `with_target` appends the exposure itself as the last event: for ranking,
    whose item token sees neither its own action nor anything later.
    """
    starts = window_starts(positions, config.max_events, config.chunk)
    visible = dataset.gather(rows, starts, positions + int(with_target))
    return EventBatch.of_arrays(visible.offsets, _values(visible), dataset.at(rows, positions).times)


def _values(span: Jagged) -> History:
    return span.items, span.actions, span.times

"""Which users and which of their events a step sees, and what is known beside them.

Invariant: a batch never holds an event at or after its user's `end`, nor a slow series' entry later than its user's
last event; what an epoch reads, and in which order, is the reader's promise (sequences/reader.py).
"""

import numpy as np

from gr_platform.errors import UserError
from gr_platform.models.batch import Entries, EventBatch, History
from gr_platform.models.config import ModelConfig, Recipe, TrainingConfig
from gr_platform.sequences.dataset import Jagged, SequenceDataset
from gr_platform.sequences.featured import FeaturedDataset
from gr_platform.sequences.reader import Batch, Reader, ReaderConfig
from gr_platform.sequences.user_series import MAIN, UserSeries
from gr_platform.sequences.window import window_starts


def training_reader(
    dataset: SequenceDataset, rows: np.ndarray, ends: np.ndarray, recipe: Recipe, *, rank: int = 0, num_ranks: int = 1
) -> Reader:
    """Return the reader of what is visible when users `rows` meet their exposure `ends - 1`, and of that exposure.

    rows, ends: int64 [U]; every end is 1 or more. The window is the served one, so the position that answers a full
    window is trained too. A batch is what one of `num_ranks` processes reads at once: its share of batch_size users,
    in `accumulate` parts. Raises UserError as `require_shared` does.
    """
    model, training = recipe.model, recipe.training
    require_shared(training, num_ranks)
    config = ReaderConfig(
        seed=training.seed,
        batch_size=training.batch_size,
        parts=training.accumulate,
        max_length=model.max_events + 1,
        windows=training.windows,
        stochastic_length=training.stochastic_length,
        num_ranks=num_ranks,
    )
    return Reader(dataset, rows, window_starts(ends - 1, model.max_events, model.chunk), ends, config, rank=rank)


def require_shared(training: TrainingConfig, num_ranks: int) -> None:
    """Raise UserError unless the users of a step come out even among so many processes and their parts."""
    parts = training.accumulate * num_ranks
    if training.batch_size % parts:
        raise UserError(
            f"batch_size {training.batch_size} cannot be shared by {num_ranks} processes in {training.accumulate} "
            f"parts each; set it to a multiple of {parts} in the recipe, or start another number of processes"
        )


def training_batch(batch: Batch, dataset: SequenceDataset | None = None) -> EventBatch:
    """Return a reader's batch as tensors that share its memory; users ask at the time of their last event.

    dataset: the reader's, where models read slow series of users.
    """
    events = batch.events
    last = events.times[events.offsets[1:] - 1]
    return _event_batch(dataset, batch.rows, events, last, _values(batch.targets))


def request_batch(
    dataset: SequenceDataset,
    rows: np.ndarray,
    positions: np.ndarray,
    config: ModelConfig,
    *,
    known: np.ndarray | None = None,
    with_target: bool = False,
) -> EventBatch:
    """Return what a server would know when users `rows` meet their exposure at `positions`: all exposures before it.

    The request time is that exposure's own. known: how many exposures of each user are known, int64 [B], where not all
    before the one asked about. `with_target` appends the exposure itself as the last event: for ranking, whose item
    token sees neither its own action nor anything later.
    """
    known = positions if known is None else known
    starts = window_starts(known, config.max_events, config.chunk)
    # Two spans a user, gathered at once: what is known and visible, and the exposure asked about.
    spans = ((rows, rows), (starts, positions), (known, positions + int(with_target)))
    found = dataset.gather(*(np.stack(pair, 1).ravel() for pair in spans))
    events = Jagged(found.offsets[::2].copy(), found.items, found.actions, found.times, context=found.context)
    return _event_batch(dataset, rows, events, dataset.at(rows, positions).times)


def _event_batch(
    dataset: SequenceDataset | None,
    rows: np.ndarray,
    events: Jagged,
    request_times: np.ndarray,
    targets: History | None = None,
) -> EventBatch:
    entries = None
    if isinstance(dataset, FeaturedDataset) and dataset.user_series is not None:
        entries = entries_of(dataset.user_series, rows, events, dataset.max_feature_tokens)
    return EventBatch.of_arrays(
        events.offsets, _values(events), request_times, targets, context=events.context, entries=entries
    )


def entries_of(series: UserSeries, rows: np.ndarray, events: Jagged, max_entries: int) -> Entries:
    """Return the entries of users' slow series ahead of their events; rows: int64 [B], user rows.

    Of a series' entries between two events the last one counts, which is what holds at the second. Of a user with more
    than `max_entries`, at least one a series, those go first that others of their series follow, the oldest first.
    """
    merged = series.merged(rows, events)
    at = np.flatnonzero(merged.kinds != MAIN)
    owner = np.searchsorted(merged.offsets, at, side="right") - 1
    # An entry is not later than its user's last event, so the next event behind it is the user's own.
    places, kinds = np.cumsum(merged.kinds == MAIN)[at], merged.kinds[at]
    holds = ~_followed(kinds, places)
    at, owner, places, kinds = at[holds], owner[holds], places[holds], kinds[holds]
    changes = _followed(kinds, owner)
    room = max_entries - np.bincount(owner[~changes], minlength=len(rows))
    kept = ~changes
    kept[changes] = _from_behind(owner[changes]) < room[owner[changes]]
    at, places, kinds = at[kept], places[kept], kinds[kept]
    return Entries(names=series.names, places=places, series=kinds - 1, codes=merged.values[at], times=merged.times[at])


def _followed(kinds: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return bool [E]: whether a later entry has the same kind and group; groups int64 [E] do not decrease."""
    order = np.lexsort((kinds, groups))
    followed = np.zeros(len(kinds), bool)
    same = (kinds[order][1:] == kinds[order][:-1]) & (groups[order][1:] == groups[order][:-1])
    followed[order[:-1][same]] = True
    return followed


def _from_behind(groups: np.ndarray) -> np.ndarray:
    """Return how many later ones each of groups, int64 not decreasing, has."""
    return np.searchsorted(groups, groups, side="right") - 1 - np.arange(len(groups))


def _values(span: Jagged) -> History:
    return span.items, span.actions, span.times

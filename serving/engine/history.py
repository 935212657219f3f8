"""A caller's history becomes the events the model sees: the same window and the same vocabulary as in training.

Invariant: which events are visible depends on the length of the whole history alone, sent or not, so an appended event
leaves the cached prefix untouched except once in `chunk` events.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gr_platform.sequences.window import window_start
from serving.engine.requests import History

if TYPE_CHECKING:
    from gr_platform.sequences.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class VisibleEvents:
    """The events a model sees, int64 [n] each, items as dense indices; `num_unknown` of them are out of vocabulary."""

    items: np.ndarray
    actions: np.ndarray
    times: np.ndarray
    num_unknown: int


def visible_events(history: History, vocabulary: "Vocabulary", *, max_events: int, chunk: int) -> VisibleEvents:
    """Return the last events of `history` that the model's window shows; all that was sent if it begins later."""
    start = window_start(history.offset + len(history.items), max_events, chunk)
    first = max(0, start - history.offset)
    items = dense(history.items[first:], vocabulary)
    return VisibleEvents(
        items=items,
        actions=history.actions[first:],
        times=history.times[first:],
        num_unknown=count_unknown(items, vocabulary),
    )


def dense(ids: np.ndarray, vocabulary: "Vocabulary") -> np.ndarray:
    """Return dense indices int64 of raw ids; none for none."""
    return vocabulary.lookup(ids) if len(ids) else np.zeros(0, np.int64)


def count_unknown(indices: np.ndarray, vocabulary: "Vocabulary") -> int:
    """Return how many of the indices are out-of-vocabulary buckets."""
    return int(np.count_nonzero(indices < vocabulary.first_item))

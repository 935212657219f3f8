"""Which token of a batch is what: the one place that counts tokens.

Invariant: a user's tokens are the start token, then the events in order, each behind the entries of slow series that
precede it. The token that answers an event never sees it: the item token itself in ranking, which is ahead of the
action, and in retrieval the event before it, or the start token.

Legend: B users, L events, E entries, T tokens.
"""

from dataclasses import dataclass

import numpy as np

from gr_platform.models.config import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Indices of tokens, int64. offsets [B + 1]; starts [B]: of the start tokens; events [L]: of each event's item (its
    action is the next one in ranking); entries [E]; answers [L]: of what answers each event; last [B]."""

    offsets: np.ndarray
    starts: np.ndarray
    events: np.ndarray
    entries: np.ndarray
    answers: np.ndarray
    last: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Number of tokens T."""
        return int(self.offsets[-1])

    @property
    def positions(self) -> np.ndarray:
        """Place of each token in its user's sequence, int64 [T]."""
        return np.arange(self.num_tokens) - np.repeat(self.starts, np.diff(self.offsets))


def layout(kind: Kind, event_offsets: np.ndarray, places: np.ndarray) -> Layout:
    """Return where the tokens of a batch lie.

    event_offsets: int64 [B + 1], of the users' events; places: int64 [E], not decreasing, the event of the batch that
    each entry precedes.
    """
    per_event = 2 if kind == "ranking" else 1
    num_users, num_events = len(event_offsets) - 1, int(event_offsets[-1])
    owner = np.repeat(np.arange(num_users), np.diff(event_offsets))
    # Ahead of an event lie the events before it, one start token of each user up to its own, and entries.
    events = per_event * np.arange(num_events) + owner + 1
    offsets = per_event * event_offsets + np.arange(num_users + 1)
    entries = per_event * places + owner[places] + 1 + np.arange(len(places))
    if len(places):
        events += np.searchsorted(places, np.arange(num_events), side="right")
        offsets += np.searchsorted(places, event_offsets)
    starts, answers = offsets[:-1], events
    if kind == "retrieval":
        answers = np.empty_like(events)
        answers[1:] = events[:-1]
        some = np.diff(event_offsets) > 0
        answers[event_offsets[:-1][some]] = starts[some]
    return Layout(offsets=offsets, starts=starts, events=events, entries=entries, answers=answers, last=offsets[1:] - 1)

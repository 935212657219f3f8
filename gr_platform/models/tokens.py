"""Events become the tokens that HSTU reads: one rule for training, evaluation and serving.

Invariant: the tokens of a prefix of a history are a prefix of its tokens. Under next-time one value of the last token
(its query time) is that of the next event or of the request, so it is the one token that must not be cached.

Legend: n events, L tokens.
"""

from dataclasses import dataclass

import numpy as np

START, ITEM, ACTION, EVENT, FEATURE = 0, 1, 2, 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """L tokens, each field int64 [L].

    kinds: START, ITEM, ACTION (ranking) or EVENT (retrieval: item and action merged). items: dense item index, 0 where
    the token carries none. actions: bitmask over the data set's actions, 0 where none. times: when it happened, ms.
    query_times: the time `t'` that the token looks from: its own (ranking), the next event's or the request's.
    """

    kinds: np.ndarray
    items: np.ndarray
    actions: np.ndarray
    times: np.ndarray
    query_times: np.ndarray

    def __len__(self) -> int:
        return len(self.kinds)

    def slice(self, start: int, stop: int) -> "Tokens":
        """Return tokens start..stop-1."""
        return Tokens(
            kinds=self.kinds[start:stop],
            items=self.items[start:stop],
            actions=self.actions[start:stop],
            times=self.times[start:stop],
            query_times=self.query_times[start:stop],
        )


def ranking_tokens(
    items: np.ndarray,
    actions: np.ndarray,
    times: np.ndarray,
    request_time: int,
    *,
    next_times: np.ndarray | None = None,
) -> Tokens:
    """Return start, item_0, action_0, item_1, action_1, ... with own-time: L = 1 + 2n.

    All arrays int64 [n]. The start token's time is the first event's, or `request_time` if there is none. No token of a
    non-empty history depends on `request_time`. next_times: as in `retrieval_tokens`; the start token's time is read.
    """
    num_events = len(items)
    kinds = np.full(1 + 2 * num_events, ACTION, np.int64)
    kinds[0] = START
    kinds[1::2] = ITEM
    item_field = np.zeros(1 + 2 * num_events, np.int64)
    item_field[1::2] = items
    action_field = np.zeros(1 + 2 * num_events, np.int64)
    action_field[2::2] = actions
    time_field = np.empty(1 + 2 * num_events, np.int64)
    time_field[0] = (times if next_times is None else next_times)[0] if num_events else request_time
    time_field[1::2] = times
    time_field[2::2] = times
    return Tokens(kinds=kinds, items=item_field, actions=action_field, times=time_field, query_times=time_field)


def retrieval_tokens(
    items: np.ndarray,
    actions: np.ndarray,
    times: np.ndarray,
    request_time: int,
    *,
    next_times: np.ndarray | None = None,
) -> Tokens:
    """Return start, event_0, event_1, ... with next-time: L = 1 + n.

    All arrays int64 [n]. Token i looks from the time of event i (the start token from the first event's), the last one
    from `request_time`. next_times: what tokens 0..n-1 look from where events between these were dropped (training
    alone); the first is the start token's own time too.
    """
    num_events = len(items)
    next_times = times if next_times is None else next_times
    kinds = np.full(1 + num_events, EVENT, np.int64)
    kinds[0] = START
    first_time = next_times[:1] if num_events else np.array([request_time], np.int64)
    return Tokens(
        kinds=kinds,
        items=np.concatenate([np.zeros(1, np.int64), items]),
        actions=np.concatenate([np.zeros(1, np.int64), actions]),
        times=np.concatenate([first_time, times]),
        query_times=np.concatenate([next_times, np.array([request_time], np.int64)]),
    )

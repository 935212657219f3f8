"""Made-up visitors: who comes when, with what history, and what they ask; nothing is sent here.

Invariant: the same `Traffic` gives the same visits in the same order, however fast a server answers them. A user's
history grows by what a visit leaves behind, so the next visit asks with a longer one.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from gr_platform.sequences.window import window_start
from serving.engine.requests import History

START_MS = 1_577_836_800_000
VisitKind = Literal["score", "recommend", "probe", "retrieve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What visitors are like.

    zipf: a user's share falls with rank ** -zipf. first_events: shortest and longest history at the start, drawn
    log-uniformly. events_per_visit: mean of a Poisson draw. num_candidates, weights: how many candidates a visit
    scores, and how often; recommend_share of the visits ask for the best `k` of the catalogue instead.
    max_events, chunk: of the served model; a service sends no more events than the model sees.
    """

    first_id: int
    num_items: int
    num_actions: int
    max_events: int
    chunk: int
    num_users: int = 400
    zipf: float = 1.1
    first_events: tuple[int, int] = (8, 256)
    events_per_visit: float = 1.0
    num_candidates: tuple[int, ...] = (16, 128, 512, 2048)
    weights: tuple[float, ...] = (0.5, 0.3, 0.15, 0.05)
    recommend_share: float = 0.25
    k: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.num_candidates) != len(self.weights) or abs(sum(self.weights) - 1) > 1e-9:
            raise ValueError(f"Traffic.weights are {self.weights}, must be one for each num_candidates and sum to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One request: candidates [m] (score, probe) or none (recommend, retrieve: the best `k` are asked for); cacheable:
    history tokens a cache may hold."""

    kind: VisitKind
    history: History
    candidates: np.ndarray
    request_time: int
    cacheable: int
    k: int = 10


class Visitors(Protocol):
    """Who comes."""

    def visit(self) -> Visit:
        """Return the next visit."""
        ...


class Population:
    """The users of one traffic and their histories."""

    def __init__(self, traffic: Traffic) -> None:
        """Draw every user's first history."""
        self._traffic = traffic
        self._rng = np.random.default_rng(traffic.seed)
        shares = np.arange(1, traffic.num_users + 1) ** -traffic.zipf
        self._shares = self._rng.permutation(shares / shares.sum())
        low, high = np.log(traffic.first_events)
        lengths = np.exp(self._rng.uniform(low, high, traffic.num_users)).astype(int)
        empty = np.zeros(0, np.int64)
        self._events = [(empty, empty, empty + START_MS) for _ in lengths]
        for user, length in enumerate(lengths):
            self._append(user, int(length), START_MS)

    def visit(self) -> Visit:
        """Return the next visit and let it leave its events behind."""
        traffic, rng = self._traffic, self._rng
        user = int(rng.choice(traffic.num_users, p=self._shares))
        items, actions, times = self._events[user]
        start = max(0, len(items) - traffic.max_events)
        history = History(items=items[start:], actions=actions[start:], times=times[start:], offset=start)
        request_time = int(times[-1]) + int(10 ** rng.uniform(3, 8))
        visible = len(items) - window_start(len(items), traffic.max_events, traffic.chunk)
        asks_list = rng.random() < traffic.recommend_share
        count = int(rng.choice(traffic.num_candidates, p=traffic.weights))
        candidates = self._items(0 if asks_list else count)
        self._append(user, int(rng.poisson(traffic.events_per_visit)), request_time)
        # Ranking caches start, items and actions; retrieval all but the token of the last event.
        ranking, retrieval = 2 * visible + 1, visible
        return Visit(
            kind="recommend" if asks_list else "score",
            history=history,
            candidates=candidates,
            request_time=request_time,
            cacheable=ranking + (retrieval if asks_list else 0),
            k=traffic.k,
        )

    def _append(self, user: int, count: int, after_ms: int) -> None:
        rng = self._rng
        new = (
            self._items(count),
            1 << rng.integers(0, self._traffic.num_actions, count),
            after_ms + np.cumsum((10 ** rng.uniform(3, 6, count)).astype(np.int64)),
        )
        items, actions, times = (np.concatenate(columns) for columns in zip(self._events[user], new, strict=True))
        self._events[user] = (items, actions, times)

    def _items(self, count: int) -> np.ndarray:
        return self._traffic.first_id + self._rng.integers(0, self._traffic.num_items, count)


def arrivals(rate: float, seconds: float, seed: int) -> np.ndarray:
    """Return the times, float64 seconds from the start, of a Poisson process of `rate` a second for `seconds`."""
    rng = np.random.default_rng(seed)
    expected = rate * seconds
    gaps = rng.exponential(1 / rate, int(expected + 10 * np.sqrt(expected) + 10))
    times = np.cumsum(gaps)
    return times[times < seconds]

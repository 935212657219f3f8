"""The users of a stream as visitors: they live through its days event by event, and ask before each with what they have
done so far.

Invariant: nothing is sent here. A visit's history is all that its user did before the event that it stands for, as a
service that logs at once would send it, so it grows by the minute; which visits there are depends on the stream and the
seed alone, not on the server. What is wrong with a day's file changes no visit: people did what they did.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr_platform.sequences.window import window_start
from serving.bench.traffic import Visit, VisitKind
from serving.engine.requests import History

K = 10
NUM_CANDIDATES = 50
RECOMMEND_SHARE = 0.6
PROBED_USERS, PROBE_CANDIDATES = 6, 16
PROBED: tuple[VisitKind, ...] = ("score", "recommend", "retrieve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What a served model sees of a history, which tells how much of it a cache can hold."""

    max_events: int
    chunk: int

    def visible(self, num_events: int) -> int:
        """Return how many of so many events a model sees."""
        return num_events - window_start(num_events, self.max_events, self.chunk)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lived(Visit):
    """A visit on day `day` of the replay. target: the item that the user took next. probe: its number, else -1."""

    day: int
    target: Any = None
    probe: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposures:
    """A log in order of time, one row an exposure: users (codes), items, actions (masks), times (ms UTC), all [n].

    by_user int64 [n]: the rows of one user after the other; place int64 [n]: where a row stands there; first int64
    [users]: where a user begins there.
    """

    users: np.ndarray
    items: np.ndarray
    actions: np.ndarray
    times: np.ndarray
    by_user: np.ndarray
    place: np.ndarray
    first: np.ndarray

    def before(self, row: int, most: int) -> History:
        """Return what the user of an exposure did before it, at most the last `most` events."""
        begin, end = int(self.first[self.users[row]]), int(self.place[row])
        start = max(begin, end - most)
        rows = self.by_user[start:end]
        return History(items=self.items[rows], actions=self.actions[rows], times=self.times[rows], offset=start - begin)


def read(paths: Sequence[Path], actions: Sequence[str]) -> Exposures:
    """Return the exposures of a stream's files, whose rows of one user, item and time are one."""
    columns = ["user_id", "item_id", "action", "event_ts"]
    table = pa.concat_tables([pq.read_table(path, columns=columns) for path in paths])
    users = table["user_id"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    coded = table["item_id"].combine_chunks().dictionary_encode()
    items, times = coded.indices.to_numpy().astype(np.int64), table["event_ts"].to_numpy()
    bits = pc.index_in(table["action"].cast(pa.string()), value_set=pa.array(actions, pa.string())).to_numpy()
    order = np.lexsort((items, users, times))
    keys = np.stack([times[order], users[order], items[order]])
    starts = np.flatnonzero(np.append(True, (keys[:, 1:] != keys[:, :-1]).any(axis=0)))
    masks = np.bitwise_or.reduceat(1 << bits[order].astype(np.int64), starts)
    rows = order[starts]
    by_user = np.argsort(users[rows], kind="stable")
    place = np.empty_like(by_user)
    place[by_user] = np.arange(len(by_user))
    counts = np.bincount(users[rows])
    return Exposures(
        users=users[rows],
        items=coded.dictionary.to_numpy(zero_copy_only=False)[items[rows]],
        actions=masks,
        times=times[rows],
        by_user=by_user,
        place=place,
        first=np.cumsum(counts) - counts,
    )


class StreamVisitors:
    """Who comes on the day that is lived, probes among them. `live` moves on to a day."""

    def __init__(
        self, exposures: Exposures, edges: Sequence[int], windows: dict[str, Window], *, probe_share: float, seed: int
    ) -> None:
        """edges: the beginning of each day and the end of the last, ms UTC; windows: kind of model -> what it sees."""
        self._exposures, self._windows = exposures, windows
        self._rng, self._probe_share = np.random.default_rng(seed), probe_share
        self._rows = np.searchsorted(exposures.times, edges)
        self._most = max(window.max_events for window in windows.values())
        self._known = np.arange(self._rows[0])
        self._probes = self._made_probes()
        self.live(1)

    def live(self, day: int) -> None:
        """Let it be day number `day`, from 1, from its first event on."""
        self._day = day
        self._begin, self._end = int(self._rows[day - 1]), int(self._rows[day])
        self._next = self._begin

    def visit(self) -> Lived:
        """Return a probe or the visit of the day's next event; after the last one comes the first one again."""
        if self._rng.random() < self._probe_share:
            probe = int(self._rng.integers(len(self._probes)))
            return self._lived(*self._probes[probe], probe=probe)
        row = self._next
        self._next = self._begin + (row + 1 - self._begin) % max(1, self._end - self._begin)
        kind: VisitKind = "recommend" if self._rng.random() < RECOMMEND_SHARE else "score"
        others = self._rng.choice(self._known, NUM_CANDIDATES - 1)
        return self._lived(kind, row, np.append(row, others))

    @property
    def probes(self) -> list[Lived]:
        """The probes by their numbers: each of PROBED_USERS users asks all of PROBED."""
        return [self._lived(*probe, probe=number) for number, probe in enumerate(self._probes)]

    def _made_probes(self) -> list[tuple[VisitKind, int, np.ndarray]]:
        """Return kind, row and candidates' rows of the probes: histories of all lengths from before the replay."""
        exposures, known = self._exposures, self._known
        lengths = exposures.place[known] - exposures.first[exposures.users[known]]
        by_length = known[np.argsort(lengths, kind="stable")]
        chosen = by_length[(np.linspace(0.5, 1, PROBED_USERS) * (len(known) - 1)).astype(int)]
        return [(kind, int(row), self._rng.choice(known, PROBE_CANDIDATES)) for row in chosen for kind in PROBED]

    def _lived(self, kind: VisitKind, row: int, candidates: np.ndarray, *, probe: int = -1) -> Lived:
        exposures = self._exposures
        history = exposures.before(row, self._most)
        num_events = history.offset + len(history.items)
        ranking = 2 * self._windows["ranking"].visible(num_events) + 1
        retrieval = self._windows["retrieval"].visible(num_events)
        return Lived(
            kind=kind,
            history=history,
            candidates=exposures.items[candidates] if kind == "score" else exposures.items[:0],
            request_time=int(exposures.times[row]),
            cacheable=(ranking if num_events else 0) + (retrieval if kind == "recommend" else 0),
            k=K,
            day=self._day,
            target=exposures.items[row],
            probe=probe,
        )

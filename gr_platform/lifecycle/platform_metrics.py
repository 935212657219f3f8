"""The platform's figures for Prometheus, gathered when they are asked for, part by part.

Invariant: a scrape never fails and never waits longer than its deadline: a part that cannot be read, or not in time,
shows `gr_platform_up{part=...} 0` and no figures, rather than old ones. What was read is kept for some seconds, so
scrapes cost the same however many ask.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gr_platform.errors import sentence_for

log = logging.getLogger(__name__)

DEADLINE_S = 5.0
KEPT_S = 5.0
Figures = Callable[[], Iterable[Metric]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A name, what reads its figures, and for how long they are kept."""

    name: str
    read: Figures
    kept_s: float = KEPT_S


@dataclass(slots=True)
class _State:
    reading: Future[tuple[list[Metric], float]] | None = None
    read_at: float | None = None
    figures: list[Metric] = field(default_factory=list)
    seconds: float = 0.0
    # None: not read yet.
    ok: bool | None = None


class PlatformCollector(Collector):
    """Reads its parts side by side; safe to ask from several threads."""

    def __init__(self, parts: Sequence[Part], *, deadline_s: float = DEADLINE_S) -> None:
        self._parts = {part.name: part for part in parts}
        self._states = {part.name: _State() for part in parts}
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(len(parts), thread_name_prefix="gr-figures")

    def describe(self) -> list[Metric]:
        """Return nothing: so nothing is read before somebody asks."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield which parts could be read, how long that took, and their figures."""
        yield from self.gather(self._deadline_s)

    def gather(self, deadline_s: float, *, one_by_one: bool = False) -> list[Metric]:
        """Return what `collect` yields; waits so long for parts that take their time.

        one_by_one: for the first reading. Parts that import the same libraries in two threads at once may find one of
        them half imported.
        """
        with self._lock:
            until = time.monotonic() + deadline_s
            for name, part in self._parts.items():
                state = self._states[name]
                self._begin(state, part)
                if one_by_one and state.reading is not None:
                    wait([state.reading], timeout=max(0.0, until - time.monotonic()))
            wait(
                [state.reading for state in self._states.values() if state.reading], max(0.0, until - time.monotonic())
            )
            for name, state in self._states.items():
                self._end(name, state)
            return [*self._about(), *(each for state in self._states.values() for each in state.figures)]

    def _begin(self, state: _State, part: Part) -> None:
        # One that still reads from last time is not asked a second time.
        due = state.read_at is None or time.monotonic() - state.read_at >= part.kept_s
        if state.reading is None and due:
            state.reading = self._pool.submit(_timed, part.read)

    def _end(self, name: str, state: _State) -> None:
        if state.reading is None:
            return
        before = state.ok
        if not state.reading.done():
            state.ok, state.figures = False, []
            reason = "it takes too long"
        else:
            # Whatever is wrong with one part, the others are shown.
            error = state.reading.exception()
            state.figures, state.seconds = ([], 0.0) if error else state.reading.result()
            state.ok, state.reading, state.read_at = error is None, None, time.monotonic()
            # The sentence first: what a database says of itself may hold its address.
            reason = (sentence_for(error) or repr(error)) if error else ""
        if before is not False and not state.ok:
            log.warning("event=figures_not_read part=%s reason=%r", name, reason)

    def _about(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("gr_platform_up", "Whether a part of the platform could be read", labels=["part"])
        took = GaugeMetricFamily("gr_platform_read_seconds", "How long the last reading took", labels=["part"])
        for name, state in self._states.items():
            up.add_metric([name], float(bool(state.ok)))
            took.add_metric([name], state.seconds)
        yield up
        yield took


def _timed(read: Figures) -> tuple[list[Metric], float]:
    started = time.monotonic()
    figures = list(read())
    return figures, time.monotonic() - started

"""A server model's figures on the server's metrics endpoint: counters, and a histogram of latencies.

Invariant: a figure costs a message to the server, so figures are brought up to date twice a second by a thread of their
own, never while a request waits.
"""

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

PERIOD_S = 0.5
LATENCY_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
# Latencies that are kept until the next round; what comes beyond is not observed one by one.
MAX_OBSERVED = 1000
# How requests of every model end.
REQUESTS = {
    "gr_requests_total": "Requests answered with a result",
    "gr_rejected_total": "Requests refused because too many waited, or what they need was not there",
    "gr_cancelled_total": "Requests whose deadline passed or whose caller went away",
    "gr_failed_total": "Requests that failed inside",
}
# Code of an error -> what counts it. Requests that break the contract are counted by the server.
ENDS = {"UNAVAILABLE": "gr_rejected_total", "CANCELLED": "gr_cancelled_total", "INTERNAL": "gr_failed_total"}


class Figures:
    """Counters by name, labelled with the model's name, and `gr_request_seconds`. Safe to share between threads."""

    def __init__(
        self,
        pb_utils: Any,
        model: str,
        counters: Mapping[str, str],
        refresh: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """counters: name -> what it counts. refresh: called before each round; totals that are counted elsewhere.

        Created once for each loaded model; `close` ends the thread after a last round.
        """
        kinds, labels = pb_utils.MetricFamily, {"model": model}
        # The server forgets a metric whose family object is collected.
        self._families = {
            name: kinds(name=name, description=text, kind=kinds.COUNTER) for name, text in counters.items()
        }
        self._counters = {name: family.Metric(labels=labels) for name, family in self._families.items()}
        text = "Seconds from a request's arrival to its answer"
        self._latency_family = kinds(name="gr_request_seconds", description=text, kind=kinds.HISTOGRAM)
        self._latency = self._latency_family.Metric(labels=labels, buckets=list(LATENCY_BUCKETS_S))
        self._latencies: queue.Queue[float] = queue.Queue(MAX_OBSERVED)
        self._totals: dict[str, float] = dict.fromkeys(counters, 0.0)
        self._shown = dict(self._totals)
        self._refresh = refresh or dict
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="gr-metrics", daemon=True)
        self._thread.start()

    def add(self, name: str, count: int = 1) -> None:
        """Count more."""
        with self._lock:
            self._totals[name] += count

    def add_failure(self, code: str) -> None:
        """Count a request that ended with an error of this code."""
        if code in ENDS:
            self.add(ENDS[code])

    def add_answer(self, seconds: float) -> None:
        """Count an answered request and remember how long it took."""
        self.add("gr_requests_total")
        self.observe(seconds)

    def observe(self, seconds: float) -> None:
        """Remember how long an answered request took."""
        try:
            self._latencies.put_nowait(seconds)
        except queue.Full:
            return

    def close(self) -> None:
        """Bring everything up to date a last time."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(PERIOD_S):
            self._show()
        self._show()

    def _show(self) -> None:
        elsewhere = self._refresh()
        with self._lock:
            totals = {**self._totals, **elsewhere}
        for name, total in totals.items():
            if total > self._shown[name]:
                self._counters[name].increment(total - self._shown[name])
                self._shown[name] = total
        for _ in range(self._latencies.qsize()):
            self._latency.observe(self._latencies.get_nowait())

"""An engine's figures on the server's metrics endpoint, labelled with the model's name.

Invariant: a figure costs a message to the server, so figures are brought up to date twice a second by a thread of their
own, never while a request waits.
"""

import queue
import threading
import time
from typing import Any

from serving.engine.engine import Engine
from serving.engine.jobs import Job

PERIOD_S = 0.5
LATENCY_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
# Latencies that are kept until the next round; what comes beyond is not observed one by one.
MAX_OBSERVED = 1000
_COUNTERS = {
    "gr_requests_total": "Requests answered with a result",
    "gr_rejected_total": "Requests refused because too many waited",
    "gr_cancelled_total": "Requests whose deadline passed or whose caller went away",
    "gr_failed_total": "Requests that failed inside",
    "gr_unknown_ids_total": "Item ids in requests that the vocabulary does not know",
    "gr_cache_hit_tokens_total": "Tokens found in the K/V cache",
    "gr_cache_prefill_tokens_total": "Tokens looked for in the K/V cache and not found",
    "gr_cache_delta_tokens_total": "Of these, tokens after a prefix that was found",
    "gr_cache_evictions_total": "Pages dropped from the K/V cache for room",
    "gr_answers_total": "Candidates scored, or lists retrieved",
    "gr_steps_total": "Steps of the engine",
    "gr_wait_seconds_total": "Seconds that requests waited for pages and for a place in a step",
    "gr_encode_seconds_total": "Seconds of encoding histories",
    "gr_answer_seconds_total": "Seconds of microbatches of candidates, or of searching the catalogue",
}
_GAUGES = {
    "gr_cache_bytes": "Bytes held by the K/V cache, pages in use included",
    "gr_queue_requests": "Requests in the engine",
}


class EngineMetrics:
    """Families are created once per loaded model; `close` ends the thread after a last round."""

    def __init__(self, pb_utils: Any, model: str, engine: Engine) -> None:
        """`pb_utils`: the server's own module."""
        kinds, labels = pb_utils.MetricFamily, {"model": model}
        described = [
            *((n, d, kinds.COUNTER) for n, d in _COUNTERS.items()),
            *((n, d, kinds.GAUGE) for n, d in _GAUGES.items()),
        ]
        # The server forgets a metric whose family object is collected.
        self._families = {n: kinds(name=n, description=d, kind=kind) for n, d, kind in described}
        self._metrics = {name: family.Metric(labels=labels) for name, family in self._families.items()}
        latency = "gr_request_seconds"
        self._families[latency] = kinds(
            name=latency, description="Seconds from the engine's queue to the answer", kind=kinds.HISTOGRAM
        )
        self._latency = self._families[latency].Metric(labels=labels, buckets=list(LATENCY_BUCKETS_S))
        self._seen = dict.fromkeys(_COUNTERS, 0.0)
        self._engine = engine
        self._latencies: queue.Queue[float] = queue.Queue(MAX_OBSERVED)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gr-metrics", daemon=True)
        self._thread.start()

    def observe(self, job: Job) -> None:
        """Remember how long an answered request took."""
        try:
            self._latencies.put_nowait(time.monotonic() - job.arrived)
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
        for name, total in self._totals().items():
            if total > self._seen[name]:
                self._metrics[name].increment(total - self._seen[name])
                self._seen[name] = total
        self._metrics["gr_cache_bytes"].set(self._engine.model.cache.counters.size_bytes)
        self._metrics["gr_queue_requests"].set(self._engine.num_jobs)
        for _ in range(self._latencies.qsize()):
            self._latency.observe(self._latencies.get_nowait())

    def _totals(self) -> dict[str, float]:
        totals, cache = self._engine.totals, self._engine.model.cache.counters
        ended = totals.ended.copy()
        return {
            "gr_requests_total": ended.pop("ok", 0),
            "gr_rejected_total": ended.pop("UNAVAILABLE", 0),
            "gr_cancelled_total": ended.pop("CANCELLED", 0),
            "gr_failed_total": sum(ended.values()),
            "gr_unknown_ids_total": totals.num_unknown,
            "gr_cache_hit_tokens_total": cache.hit_tokens,
            "gr_cache_prefill_tokens_total": cache.prefill_tokens,
            "gr_cache_delta_tokens_total": cache.delta_tokens,
            "gr_cache_evictions_total": cache.evictions,
            "gr_answers_total": totals.num_answers,
            "gr_steps_total": totals.num_steps,
            "gr_wait_seconds_total": totals.wait_s,
            "gr_encode_seconds_total": totals.encode_s,
            "gr_answer_seconds_total": totals.answer_s,
        }

"""An engine's figures on the server's metrics endpoint, labelled with the model's name.

Invariant: what the engine counts itself is read, never counted again.
"""

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.engine.engine import Engine
from serving.engine.jobs import Job
from serving.figures import REQUESTS, Figures

# Of the answers of a round, the scores of so many count, the last ones; their mean looks back over LOOK_BACK of them.
MAX_SCORED = 8
LOOK_BACK = 200
_COUNTERS = {
    **REQUESTS,
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
# Parameter of the model, in ms -> gauge, in seconds since 1970; NaN where the bundle does not say.
_MOMENTS = {
    "trained_until_ms": ("gr_model_trained_until_seconds", "Unix time of the newest event that the model learned from"),
    "exported_ms": ("gr_model_exported_seconds", "Unix time at which the model's bundle was written"),
}
_SCORES = {
    "gr_score_mean": "Mean probability that candidates got of late, in a sample of answers",
    "gr_score_std": "Standard deviation of these probabilities",
}


class ScoreMoments:
    """Running mean and standard deviation of scores by task, each answer weighted alike, older ones ever less."""

    def __init__(self, num_tasks: int, look_back: int = LOOK_BACK) -> None:
        self._mean, self._square = np.zeros(num_tasks), np.zeros(num_tasks)
        self._num, self._look_back = 0, look_back

    def add(self, scores: np.ndarray) -> None:
        """Take an answer's scores, float [C, tasks]; one without candidates, or with a score that is no number, does
        not count."""
        if not len(scores) or not np.isfinite(scores).all():
            return
        self._num += 1
        weight = max(1 / self._num, 1 / self._look_back)
        self._mean += weight * (scores.mean(0, dtype=np.float64) - self._mean)
        self._square += weight * (np.square(scores, dtype=np.float64).mean(0) - self._square)

    def figures(self) -> dict[str, np.ndarray]:
        """Return gauge -> value by task; {} before the first answer."""
        if not self._num:
            return {}
        std = np.sqrt(np.maximum(0.0, self._square - self._mean**2))
        return {"gr_score_mean": self._mean, "gr_score_std": std}


class EngineMetrics:
    """Families are created once per loaded model; `close` ends the thread after a last round."""

    def __init__(self, pb_utils: Any, model: str, engine: Engine, parameters: Mapping[str, str] | None = None) -> None:
        """`pb_utils`: the server's own module. parameters: those of the model's config.pbtxt."""
        kinds, labels = pb_utils.MetricFamily, {"model": model}
        # The server forgets a metric whose family object is collected.
        self._families = {n: kinds(name=n, description=d, kind=kinds.GAUGE) for n, d in _GAUGES.items()}
        self._gauges = {name: family.Metric(labels=labels) for name, family in self._families.items()}
        self._show_moments(kinds, labels, parameters or {})
        self._scores, self._tasks = deque[np.ndarray](maxlen=MAX_SCORED), _tasks_of(engine)
        self._score_moments = ScoreMoments(len(self._tasks))
        self._families |= {n: kinds(name=n, description=d, kind=kinds.GAUGE) for n, d in _SCORES.items() if self._tasks}
        self._task_metrics = {
            name: [self._families[name].Metric(labels=labels | {"task": task}) for task in self._tasks]
            for name in _SCORES
        }
        self._engine = engine
        self._figures = Figures(pb_utils, model, _COUNTERS, self._refresh)

    def observe(self, job: Job) -> None:
        """Remember how long an answered request took."""
        if self._tasks:
            self._scores.append(job.work.scores)
        self._figures.observe(time.monotonic() - job.arrived)

    def close(self) -> None:
        """Bring everything up to date a last time."""
        self._figures.close()

    def _show_moments(self, kinds: Any, labels: dict[str, str], parameters: Mapping[str, str]) -> None:
        self._moments = []
        for parameter, (name, description) in _MOMENTS.items():
            at_ms = parameters.get(parameter)
            self._families[name] = kinds(name=name, description=description, kind=kinds.GAUGE)
            self._moments.append(self._families[name].Metric(labels=labels))
            # The server keeps what the model before it said: the age of models that are gone must not stay.
            self._moments[-1].set(int(at_ms) / 1000 if at_ms else math.nan)

    def _refresh(self) -> dict[str, float]:
        """Bring the gauges up to date and return the totals of the engine's counters."""
        self._gauges["gr_cache_bytes"].set(self._engine.model.cache.counters.size_bytes)
        self._gauges["gr_queue_requests"].set(self._engine.num_jobs)
        if self._scores:
            for _ in range(len(self._scores)):
                self._score_moments.add(self._scores.popleft())
            for name, values in self._score_moments.figures().items():
                for metric, value in zip(self._task_metrics[name], values.tolist(), strict=True):
                    metric.set(value)
        return self._totals()

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


def _tasks_of(engine: Engine) -> tuple[str, ...]:
    """Return what an engine's scores are probabilities of; a retrieval model's are none."""
    return engine.model.bundle.tasks if engine.model.kind == "ranking" else ()

"""A queue of requests becomes steps: each encodes new tokens of several users and answers some of what they ask.

Invariant: one thread steps. A job is waiting (no pages), then encoding, then answering; it leaves by `done` exactly
once and gives its pages back. What a step computes is decided by the scheduler, never what it comes out as.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serving.engine.jobs import EngineError, Job, QueueFullError, Terms
from serving.engine.model import Model
from serving.engine.pace import Pace
from serving.engine.recent import RecentHistories
from serving.engine.scheduler import share

log = logging.getLogger(__name__)
Outcome = Any
# Requests of a step whose callers are asked for: with hundreds in the engine, asking would take longer than answering.
MAX_ASKED = 4
# So many requests are taken whatever is expected: an estimate may be wrong, and a step takes several.
MIN_QUEUE = 4
# Who waits longer than this for pages comes before every priority.
PATIENCE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """max_queue: requests in the engine, more are refused; max_wait_s: one that is expected to wait longer for those is
    refused; max_users: of one step (1: no batching); step_tokens: new tokens of a step, so that a long history does not
    hold the others."""

    max_queue: int = 256
    max_wait_s: float = 0.5
    max_users: int = 32
    step_tokens: int = 1024


@dataclass(slots=True, kw_only=True)
class Totals:
    """What was done since the start: seconds by stage, steps, answers (candidates or lists), requests by their end."""

    wait_s: float = 0.0
    encode_s: float = 0.0
    answer_s: float = 0.0
    num_steps: int = 0
    num_answers: int = 0
    num_unknown: int = 0
    ended: dict[str, int] = field(default_factory=dict)

    def count(self, end: str) -> None:
        """Record how a request ended: "ok", or the error's code."""
        self.ended[end] = self.ended.get(end, 0) + 1


class Engine:
    """Drives one model. `submit` may be called by any thread; `ask` is for callers without `start`."""

    def __init__(self, model: Model, limits: Limits | None = None) -> None:
        self.model, self.limits, self.totals = model, limits or Limits(), Totals()
        self.recent, self._pace = RecentHistories(), Pace()
        self._num_ended = 0
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._arrived: deque[Job] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def num_jobs(self) -> int:
        """How many requests are in the engine."""
        return len(self._arrived) + len(self._waiting) + len(self._running)

    def submit(self, request: Any, done: Callable[[Job, Outcome], None], terms: Terms | None = None) -> None:
        """Take a request; `done(job, result or exception)` is called once, by the thread that steps.

        Raises InvalidRequestError, and QueueFullError if too many wait.
        """
        if self.num_jobs >= self.limits.max_queue:
            raise self._refusal(f"{self.num_jobs} requests wait for this model already; try again later")
        job = self.model.prepare(request)
        job.done, job.terms = done, terms or job.terms
        self._check_wait(job)
        with self._wake:
            if self._closing or (self._thread is not None and not self._thread.is_alive()):
                raise self._refusal("the model is being unloaded; try again")
            self._arrived.append(job)
            self._wake.notify()

    def _check_wait(self, job: Job) -> None:
        """Raise QueueFullError if the job would wait too long, or past its deadline: what is taken is answered in time.

        The most urgent (priority 0) are not asked.
        """
        others = [*self._arrived, *self._waiting, *self._running]
        if job.terms.priority == 0 or len(others) < MIN_QUEUE:
            return
        wait_s, most_s = self._pace.wait_s(job, others), self.limits.max_wait_s
        if job.terms.deadline is not None:
            most_s = min(most_s, job.terms.deadline - time.monotonic())
        if wait_s > most_s:
            raise self._refusal(
                f"{len(others)} requests wait for this model already, this one for {wait_s:.1f} s; try again later"
            )

    def _refusal(self, reason: str) -> QueueFullError:
        self.totals.count(QueueFullError.code)
        return QueueFullError(reason)

    def ask(self, request: Any, terms: Terms | None = None) -> Any:
        """Return the result of a request, stepping until it is there. Raises what it ends with."""
        outcomes: list[Outcome] = []
        self.submit(request, lambda job, outcome: outcomes.append(outcome), terms)
        while not outcomes:
            self.step()
        if isinstance(outcomes[0], Exception):
            raise outcomes[0]
        return outcomes[0]

    def start(self) -> None:
        """Step in a thread of its own until `close`."""
        self._thread = threading.Thread(target=self._run, name="gr-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more requests, answer those that are here, and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are being answered."""
        return self._thread is not None and self._thread.is_alive()

    def step(self) -> None:
        """Move every job on as far as its share of one step goes."""
        began, ended, computed_s = time.perf_counter(), self._num_ended, self.totals.encode_s + self.totals.answer_s
        self._take_arrived()
        self._drop_late()
        self._admit()
        self._drop_gone()
        self._encode()
        self._answer()
        self._finish()
        self.totals.num_steps += 1
        computed_s = self.totals.encode_s + self.totals.answer_s - computed_s
        self._pace.request.add(time.perf_counter() - began - computed_s, self._num_ended - ended)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self.num_jobs and not self._closing:
                    self._wake.wait()
                if self._closing and not self.num_jobs:
                    return
            try:
                self.step()
            except Exception as error:
                self._fail([(job, 0) for job in [*self._waiting, *self._running]], error)

    def _take_arrived(self) -> None:
        while self._arrived:
            self._waiting.append(self._arrived.popleft())

    def _drop_late(self) -> None:
        now = time.monotonic()
        for job in [*self._waiting, *self._running]:
            if (failure := job.late(now)) is not None:
                self._end(job, failure)

    def _drop_gone(self) -> None:
        """End requests whose callers have gone, before anything is computed for them: one that waits costs nothing."""
        now = time.monotonic()
        jobs = [job for job in self._running if job.may_be_gone(now)]
        for job in sorted(jobs, key=lambda job: job.asked)[:MAX_ASKED]:
            try:
                failure: Exception | None = job.gone(now)
            except Exception as error:
                failure = error
            if failure is not None:
                self._end(job, failure)

    def _admit(self) -> None:
        """Give pages to the jobs that wait while there is room: urgent ones first, and before them who waited long."""
        patient_since = time.monotonic() - PATIENCE_S
        for job in sorted(self._waiting, key=lambda job: (job.arrived > patient_since) and 1 + job.terms.priority):
            lease = self.model.cache.acquire(job.tokens.slice(0, job.keep), shared=job.shared)
            if lease is None:
                return
            job.lease, job.num_encoded, job.admitted = lease, lease.num_cached, time.monotonic()
            self.totals.wait_s += job.admitted - job.arrived
            self._pace.missed.add(job.tokens_left, len(job.tokens))
            self._waiting.remove(job)
            self._running.append(job)

    def _encode(self) -> None:
        jobs = [job for job in self._running if job.tokens_left]
        parts = share(jobs, lambda job: job.tokens_left, self.limits.step_tokens, self.limits.max_users)
        if not parts:
            return
        began = time.perf_counter()
        pieces = [job.piece(count) for job, count in parts]
        try:
            rows = iter(self.model.compute.encode(pieces))
        except Exception as error:
            self._fail(parts, error)
            return
        for (job, count), piece in zip(parts, pieces, strict=True):
            job.num_encoded += count
            job.row = next(rows) if piece.wants_row else None
            if job.num_encoded == len(job.tokens) and job.shared and job.lease is not None:
                self.model.cache.commit(job.lease)
        seconds = time.perf_counter() - began
        self.totals.encode_s += seconds
        self._pace.token.add(seconds, sum(count for _, count in parts))

    def _answer(self) -> None:
        jobs = [job for job in self._running if not job.tokens_left and job.answers_left]
        parts = share(jobs, lambda job: job.answers_left, self.model.budget(jobs), self.limits.max_users)
        if not parts:
            return
        began = time.perf_counter()
        try:
            self.model.answer(parts)
        except Exception as error:
            self._fail(parts, error)
            return
        seconds, num_answers = time.perf_counter() - began, sum(count for _, count in parts)
        self.totals.num_answers += num_answers
        self.totals.answer_s += seconds
        self._pace.answer.add(seconds, num_answers)

    def _finish(self) -> None:
        for job in [job for job in self._running if not job.tokens_left and not job.answers_left]:
            self.totals.num_unknown += job.num_unknown
            if job.lease is not None and job.lease.first_key:
                self.recent.note(job.lease.first_key, job.tokens.slice(0, job.keep))
            self._end(job, self.model.result(job))

    def _fail(self, parts: list[tuple[Job, int]], error: Exception) -> None:
        # The engine serves everyone: what breaks a step ends the requests in it, not the thread.
        log.error("event=step_failed num_jobs=%d", len(parts), exc_info=error)
        for job, _ in parts:
            self._end(job, error)

    def _end(self, job: Job, outcome: Outcome) -> None:
        if job.lease is not None:
            self.model.cache.release(job.lease)
            self._running.remove(job)
        else:
            self._waiting.remove(job)
        self._num_ended += 1
        code = getattr(outcome, "code", "INTERNAL") if isinstance(outcome, Exception) else "ok"
        self.totals.count(code)
        try:
            job.done(job, outcome)
        except Exception as error:
            log.error("event=answer_not_sent", exc_info=error)


__all__ = ["Engine", "EngineError", "Limits", "Totals"]

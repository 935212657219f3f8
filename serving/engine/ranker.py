"""M-FALCON for ranking: the history once, then candidates in microbatches against its K/V.

Invariant: a score depends on the model, the visible history, the candidate and the request's time; not on what is
cached, on other candidates, on other users or on the microbatch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gr_platform.bundle.compute import Ask, Piece, Tunable
from gr_platform.models.tokens import ranking_tokens
from serving.engine.history import count_unknown, dense, visible_events
from serving.engine.jobs import Job
from serving.engine.microbatches import Microbatches
from serving.engine.model import Model
from serving.engine.requests import RankRequest, check_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """`scores` float32 [C, tasks], probabilities in the order asked; tokens found in the cache; unknown ids met."""

    scores: np.ndarray
    cached_tokens: int
    num_unknown: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidates:
    """Dense items int64 [C], the request's time, and room for their scores float32 [C, tasks]."""

    items: np.ndarray
    request_time: int
    scores: np.ndarray


class Ranker(Model):
    """A ranking model behind the engine."""

    kind: ClassVar[str] = "ranking"

    def prepare(self, request: RankRequest) -> Job:
        """Return the job of a request. Raises InvalidRequestError."""
        bundle = self.bundle
        check_rank(request, len(bundle.declaration.actions))
        config = bundle.config
        events = visible_events(request.history, bundle.vocabulary, max_events=config.max_events, chunk=config.chunk)
        tokens = ranking_tokens(events.items, events.actions, events.times, request.request_time)
        items = dense(request.candidates, bundle.vocabulary)
        scores = np.empty((len(items), len(bundle.tasks)), np.float32)
        return Job(
            tokens=tokens,
            keep=len(tokens),
            # An empty history's start token carries the request's time, so nobody else can use it.
            shared=len(events.items) > 0,
            num_answers=len(items),
            num_unknown=events.num_unknown + count_unknown(items, bundle.vocabulary),
            work=_Candidates(items=items, request_time=request.request_time, scores=scores),
        )

    def answer(self, parts: Sequence[tuple[Job, int]]) -> None:
        """Score the next so many candidates of each job."""
        spans = [slice(job.num_answered, job.num_answered + count) for job, count in parts]
        asks = [
            Ask(
                candidates=job.work.items[span],
                request_time=job.work.request_time,
                past=job.keep,
                pages=job.lease.pages if job.lease is not None else np.zeros(0, np.int32),
            )
            for (job, _), span in zip(parts, spans, strict=True)
        ]
        for (job, count), span, scores in zip(parts, spans, self.compute.score(asks), strict=True):
            job.work.scores[span] = scores
            job.num_answered += count

    def result(self, job: Job) -> RankResult:
        """Return the scores of all candidates."""
        return RankResult(scores=job.work.scores, cached_tokens=job.cached_tokens, num_unknown=job.num_unknown)

    def warm_up(self) -> None:
        """Run and time microbatches of every size against histories of every length, and prefills."""

        def score(num_candidates: int, num_past: int) -> None:
            candidates = np.zeros(num_candidates, np.int64)
            pages = self.warm_pages(num_past)
            self.compute.score([Ask(candidates=candidates, request_time=0, past=num_past, pages=pages)])

        for num_tokens in self.lengths()[1:]:
            zeros = np.zeros(num_tokens // 2, np.int64)
            tokens = ranking_tokens(zeros, zeros, zeros, 0)
            pages = self.warm_pages(len(tokens))
            self.compute.encode([Piece(tokens=tokens, past=0, pages=pages, keep=len(tokens))])
        if isinstance(self.compute, Tunable):
            self.compute.tune()
        self.microbatches = Microbatches.measured(score, self.lengths()[1:])

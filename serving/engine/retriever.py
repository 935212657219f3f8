"""Retrieval: the user's vector as of the request, then the exact best k of the whole catalogue.

Invariant: under next-time the last token looks from the request's time, so it is recomputed for every request and never
cached; every token before it looks from an event's time and is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gr_platform.bundle.compute import Piece, Tunable
from gr_platform.models.tokens import retrieval_tokens
from serving.engine.history import dense, visible_events
from serving.engine.jobs import Job
from serving.engine.microbatches import Microbatches
from serving.engine.model import Model
from serving.engine.requests import RetrieveRequest, check_retrieve
from serving.engine.top_k import best_items

# As in training: a vector's length is never divided by less.
_EPSILON = 1e-6
# Users whose scores of a block are looked through together.
_USERS_A_STEP = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrieveResult:
    """`items` raw ids and `scores` float32, best first; tokens found in the cache; unknown ids met in the history."""

    items: np.ndarray
    scores: np.ndarray
    cached_tokens: int
    num_unknown: int


@dataclass(slots=True, kw_only=True)
class _List:
    """How many items are asked for, rows int64 (ascending) that must not be among them, and what was found."""

    k: int
    withheld: np.ndarray
    rows: np.ndarray
    scores: np.ndarray


class Retriever(Model):
    """A retrieval model and its item vectors behind the engine."""

    kind: ClassVar[str] = "retrieval"

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._never = np.flatnonzero(~self.bundle.vocabulary.active)
        self.microbatches = Microbatches.fixed(_USERS_A_STEP)

    def prepare(self, request: RetrieveRequest) -> Job:
        """Return the job of a request. Raises InvalidRequestError."""
        bundle = self.bundle
        check_retrieve(request, len(bundle.declaration.actions))
        config = bundle.config
        events = visible_events(request.history, bundle.vocabulary, max_events=config.max_events, chunk=config.chunk)
        tokens = retrieval_tokens(events.items, events.actions, events.times, request.request_time)
        none = np.zeros(0, np.int64)
        return Job(
            tokens=tokens,
            keep=len(tokens) - 1,
            shared=len(tokens) > 1,
            num_answers=1,
            num_unknown=events.num_unknown,
            work=_List(k=request.k, withheld=self._withheld(request), rows=none, scores=none),
        )

    def answer(self, parts: Sequence[tuple[Job, int]]) -> None:
        """Find the list of each job."""
        users = np.stack([job.row for job, _ in parts if job.row is not None])
        users /= np.maximum(np.linalg.norm(users, axis=1, keepdims=True), _EPSILON)
        users /= np.float32(self.bundle.config.temperature)
        ks, withheld = [job.work.k for job, _ in parts], [job.work.withheld for job, _ in parts]
        lists = best_items(users, self.bundle.item_vectors, ks, withheld)
        for (job, _), (rows, scores) in zip(parts, lists, strict=True):
            job.work.rows, job.work.scores = rows, scores
            job.num_answered = 1

    def result(self, job: Job) -> RetrieveResult:
        """Return the list, fewer than k items if fewer are available."""
        return RetrieveResult(
            items=self.bundle.vocabulary.ids(job.work.rows),
            scores=job.work.scores,
            cached_tokens=job.cached_tokens,
            num_unknown=job.num_unknown,
        )

    def warm_up(self) -> None:
        """Run prefills of every length, one user and several, and the search of the catalogue."""
        for num_tokens in (1, *self.lengths()[1:]):
            zeros = np.zeros(num_tokens - 1, np.int64)
            tokens = retrieval_tokens(zeros, zeros, zeros, 0)
            pages = self.warm_pages(len(tokens))
            rows = self.compute.encode([Piece(tokens=tokens, past=0, pages=pages, keep=len(tokens) - 1)])
        if isinstance(self.compute, Tunable):
            self.compute.tune()
        for num_users in (1, _USERS_A_STEP):
            users = np.repeat(rows, num_users, axis=0)
            best_items(users, self.bundle.item_vectors, [10] * num_users, [self._never] * num_users)

    def _withheld(self, request: RetrieveRequest) -> np.ndarray:
        """Return the rows that this request must not get: inactive ones, what it excludes and, if so declared, what the
        user saw."""
        raw = [request.exclude]
        if self.bundle.declaration.exclude_seen == "all":
            raw.append(request.history.items)
        rows = np.concatenate([dense(ids, self.bundle.vocabulary) for ids in raw])
        return np.union1d(self._never, rows) if len(rows) else self._never

"""One request on its way through the engine, and how it ends.

Invariant: a job ends once: with a result, or with an error whose text may be shown to the caller (anything but an
`EngineError` or an `InvalidRequestError` may not).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gr_platform.bundle.compute import Piece
from gr_platform.models.tokens import Tokens
from serving.engine.cache import Lease

# Asking the server whether a caller has gone takes a message to another process: not more often than this.
CANCEL_POLL_S = 0.02
DEFAULT_PRIORITY = 1


class EngineError(RuntimeError):
    """The engine does not answer this request; `code` is the server's name of the reason."""

    code = "UNAVAILABLE"


class QueueFullError(EngineError):
    """More requests wait than the engine takes."""


class LateError(EngineError):
    """The request's deadline passed before it was answered."""

    code = "CANCELLED"


class CancelledError(EngineError):
    """The caller has gone."""

    code = "CANCELLED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How a caller wants to be served: priority (0 first), deadline on time.monotonic's clock, whether it has gone."""

    priority: int = DEFAULT_PRIORITY
    deadline: float | None = None
    is_cancelled: Callable[[], bool] | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """A request as work: tokens to encode, of which the first `keep` are kept, then `num_answers` answers.

    shared: whether others may find its tokens in the cache. An answer is a candidate's scores, or the whole list of a
    retrieval. rows [d]: of the last token, where it is not kept.
    """

    tokens: Tokens
    keep: int
    shared: bool
    num_answers: int
    num_unknown: int
    work: Any
    terms: Terms = field(default_factory=Terms)
    done: Callable[["Job", Any], None] = lambda job, outcome: None
    lease: Lease | None = None
    num_encoded: int = 0
    num_answered: int = 0
    row: np.ndarray | None = None
    arrived: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    asked: float = 0.0

    @property
    def tokens_left(self) -> int:
        """How many tokens are not encoded yet."""
        return len(self.tokens) - self.num_encoded

    @property
    def answers_left(self) -> int:
        """How many answers are missing."""
        return self.num_answers - self.num_answered

    @property
    def cached_tokens(self) -> int:
        """How many tokens were found in the cache."""
        return self.lease.num_cached if self.lease is not None else 0

    def piece(self, num_tokens: int) -> Piece:
        """Return the next tokens of an admitted job as what a model encodes."""
        assert self.lease is not None
        start, stop = self.num_encoded, self.num_encoded + num_tokens
        return Piece(
            tokens=self.tokens.slice(start, stop),
            past=start,
            pages=self.lease.pages,
            keep=min(stop, self.keep) - start,
        )

    def late(self, now: float) -> LateError | None:
        """Return that the job's deadline has passed, or None."""
        if self.terms.deadline is None or now <= self.terms.deadline:
            return None
        waited = 1e3 * (now - self.arrived)
        return LateError(f"the request's deadline passed after {waited:.0f} ms in the engine")

    def may_be_gone(self, now: float) -> bool:
        """Return whether it is time to ask if the caller has gone."""
        return self.terms.is_cancelled is not None and now - max(self.arrived, self.asked) >= CANCEL_POLL_S

    def gone(self, now: float) -> CancelledError | None:
        """Ask whether the caller has gone; return that it has, or None."""
        self.asked = now
        cancelled = self.terms.is_cancelled is not None and self.terms.is_cancelled()
        return CancelledError("the caller has cancelled the request") if cancelled else None

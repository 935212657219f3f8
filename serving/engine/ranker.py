"""M-FALCON for ranking: the history once, then candidates in microbatches against its K/V.

Invariant: a score depends on the model, the visible history, the candidate and the request's time; not on what is
cached, on other candidates or on the microbatch size.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gr_platform.bundle.compute import KV, concat_kv
from gr_platform.models.tokens import Tokens, ranking_tokens
from serving.engine.cache import KVCache
from serving.engine.history import count_unknown, dense, visible_events
from serving.engine.requests import RankRequest, check_rank

if TYPE_CHECKING:
    from gr_platform.bundle.load import Bundle


@dataclass(frozen=True, slots=True, kw_only=True)
class RankResult:
    """`scores` float32 [C, tasks], probabilities in the order asked; tokens found in the cache; unknown ids met."""

    scores: np.ndarray
    cached_tokens: int
    num_unknown: int


class Ranker:
    """A ranking model with its cache. One caller at a time."""

    def __init__(self, bundle: "Bundle", *, cache_bytes: int, num_threads: int) -> None:
        """`cache_bytes` bounds the K/V kept between requests."""
        self._bundle = bundle
        self._compute = bundle.compute(num_threads)
        self.cache = KVCache(bundle.digest, cache_bytes)

    def score(self, request: RankRequest) -> RankResult:
        """Return the probabilities of every task for every candidate. Raises InvalidRequestError."""
        bundle = self._bundle
        check_rank(request, len(bundle.declaration.actions))
        config = bundle.config
        events = visible_events(request.history, bundle.vocabulary, max_events=config.max_events, chunk=config.chunk)
        tokens = ranking_tokens(events.items, events.actions, events.times, request.request_time)
        kv, cached_tokens = self._history(tokens, keep=len(events.items) > 0)
        candidates = dense(request.candidates, bundle.vocabulary)
        return RankResult(
            scores=self._score(candidates, request.request_time, kv),
            cached_tokens=cached_tokens,
            num_unknown=events.num_unknown + count_unknown(candidates, bundle.vocabulary),
        )

    def warm_up(self) -> None:
        """Run the shapes that requests have, leaving the cache empty: the first caller must not pay for it."""
        for num_events in (0, self._bundle.config.max_events):
            zeros = np.zeros(num_events, np.int64)
            tokens = ranking_tokens(zeros, zeros, zeros, 0)
            _, kv = self._compute.encode(tokens, self._compute.empty())
            for num_candidates in (1, self._bundle.microbatch_size):
                self._score(np.zeros(num_candidates, np.int64), 0, kv)

    def _history(self, tokens: Tokens, *, keep: bool) -> tuple[KV, int]:
        """Return the K/V of all tokens and how many came from the cache.

        Without `keep` the cache is not used: an empty history's start token carries the request's time.
        """
        past = (self.cache.lookup(tokens) if keep else None) or self._compute.empty()
        num_cached = len(past)
        if num_cached == len(tokens):
            return past, num_cached
        _, new = self._compute.encode(tokens.slice(num_cached, len(tokens)), past)
        kv = concat_kv([past, new]) if num_cached else new
        if keep:
            self.cache.insert(tokens, kv)
        return kv, num_cached

    def _score(self, candidates: np.ndarray, request_time: int, kv: KV) -> np.ndarray:
        size = self._bundle.microbatch_size
        parts = [
            self._compute.score(candidates[start : start + size], request_time, kv)
            for start in range(0, len(candidates), size)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, len(self._bundle.tasks)), np.float32)

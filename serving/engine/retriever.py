"""Retrieval: the user's vector as of the request, then the exact best k of the whole catalogue.

Invariant: under next-time the last token looks from the request's time, so it is recomputed for every request and never
cached; every token before it looks from an event's time and is.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gr_platform.bundle.compute import concat_kv
from gr_platform.models.tokens import Tokens, retrieval_tokens
from serving.engine.cache import KVCache
from serving.engine.history import dense, visible_events
from serving.engine.requests import RetrieveRequest, check_retrieve

if TYPE_CHECKING:
    from gr_platform.bundle.load import Bundle

# As in training: a vector's length is never divided by less.
_EPSILON = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrieveResult:
    """`items` raw ids and `scores` float32, best first; tokens found in the cache; unknown ids met in the history."""

    items: np.ndarray
    scores: np.ndarray
    cached_tokens: int
    num_unknown: int


class Retriever:
    """A retrieval model with its cache and its item vectors. One caller at a time."""

    def __init__(self, bundle: "Bundle", *, cache_bytes: int, num_threads: int) -> None:
        """`cache_bytes` bounds the K/V kept between requests; the item vectors come on top."""
        self._bundle = bundle
        self._compute = bundle.compute(num_threads)
        self._never = np.flatnonzero(~bundle.vocabulary.active)
        self.cache = KVCache(bundle.digest, cache_bytes)

    def retrieve(self, request: RetrieveRequest) -> RetrieveResult:
        """Return the best k available items, fewer if fewer are available. Raises InvalidRequestError."""
        bundle = self._bundle
        check_retrieve(request, len(bundle.declaration.actions))
        config = bundle.config
        events = visible_events(request.history, bundle.vocabulary, max_events=config.max_events, chunk=config.chunk)
        tokens = retrieval_tokens(events.items, events.actions, events.times, request.request_time)
        user, cached_tokens = self._user_vector(tokens)
        scores = self._bundle.item_vectors @ user / np.float32(config.temperature)
        scores[self._never] = -np.inf
        scores[self._withheld(request)] = -np.inf
        best = top_k(scores, request.k)
        return RetrieveResult(
            items=bundle.vocabulary.ids(best),
            scores=scores[best],
            cached_tokens=cached_tokens,
            num_unknown=events.num_unknown,
        )

    def warm_up(self) -> None:
        """Run the shapes that requests have, leaving the cache empty: the first caller must not pay for it."""
        for num_events in (0, self._bundle.config.max_events):
            zeros = np.zeros(num_events, np.int64)
            rows, _ = self._compute.encode(retrieval_tokens(zeros, zeros, zeros, 0), self._compute.empty())
            top_k(self._bundle.item_vectors @ rows[-1], 10)

    def _user_vector(self, tokens: Tokens) -> tuple[np.ndarray, int]:
        """Return the normalised last row [d] and how many tokens came from the cache."""
        settled = tokens.slice(0, len(tokens) - 1)
        past = (self.cache.lookup(settled) if len(settled) else None) or self._compute.empty()
        num_cached = len(past)
        rows, new = self._compute.encode(tokens.slice(num_cached, len(tokens)), past)
        if num_cached < len(settled):
            self.cache.insert(settled, concat_kv([past, new]).slice(0, len(settled)))
        user = rows[-1]
        return user / max(float(np.linalg.norm(user)), _EPSILON), num_cached

    def _withheld(self, request: RetrieveRequest) -> np.ndarray:
        """Return the rows that this request must not get: what it excludes and, if so declared, what the user saw."""
        raw = [request.exclude]
        if self._bundle.declaration.exclude_seen == "all":
            raw.append(request.history.items)
        return np.concatenate([dense(ids, self._bundle.vocabulary) for ids in raw])


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the indices of the k highest finite scores, best first, equal ones by index; fewer if fewer are finite."""
    k = min(k, int(np.count_nonzero(scores > -np.inf)))
    if k == 0:
        return np.zeros(0, np.int64)
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
    above = np.flatnonzero(scores > threshold)
    # Ties at the boundary: the lowest indices, so that equal scores always give the same list.
    level = np.flatnonzero(scores == threshold)[: k - len(above)]
    chosen = np.concatenate([above, level])
    return chosen[np.lexsort((chosen, -scores[chosen]))]

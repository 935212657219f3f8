"""The two operations that M-FALCON is made of, as a protocol: who implements them decides speed, never the result.

Invariant: K/V lie in pages that belong to the implementation, where it computes; whoever calls decides which page holds
whose tokens, and never sees a row.

Legend: B users, L new tokens of one, P past tokens of one, C candidates of one.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from gr_platform.models.config import ModelConfig
from gr_platform.models.tokens import Tokens

PAGE_TOKENS = 16
ComputePath = Literal["auto", "torch", "onnx"]
# What K/V are kept in, and bytes of an element.
CacheType = Literal["fp32", "fp16", "bf16"]
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# A warm-up that measures must not take long.
TUNING_CALLS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """L new tokens of one user after `past` tokens, of which the first `keep` are kept.

    pages int32: where the user's tokens lie, in order, with room for past + keep. keep is L or, where the last token
    looks from the request's time and must not be kept, L - 1: its row is then computed.
    """

    tokens: Tokens
    past: int
    pages: np.ndarray
    keep: int

    @property
    def wants_row(self) -> bool:
        """Whether the last token's row is asked for."""
        return self.keep < len(self.tokens)

    def slots(self) -> np.ndarray:
        """Return where the kept tokens' K/V go, int64 [keep]: page * PAGE_TOKENS + place in it."""
        places = np.arange(self.past, self.past + self.keep)
        return self.pages[places // PAGE_TOKENS].astype(np.int64) * PAGE_TOKENS + places % PAGE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Candidates int64 [C] (dense item indices) of one user as of `request_time` ms, whose P tokens lie in `pages`."""

    candidates: np.ndarray
    request_time: int
    past: int
    pages: np.ndarray


class Compute(Protocol):
    """A loaded model with room for the K/V of `num_pages` pages."""

    num_pages: int

    def encode(self, pieces: Sequence[Piece]) -> np.ndarray:
        """Write the kept tokens' K/V to their pages and return the rows [R, d] of the pieces that want one."""
        ...

    def score(self, asks: Sequence[Ask]) -> list[np.ndarray]:
        """Ranking only: return probabilities [C, tasks] of each ask's candidates against the history in its pages.

        Each candidate is an item token at the request's time at the position after the history; it sees the history and
        itself, never another candidate.
        """
        ...


@runtime_checkable
class Tunable(Protocol):
    """A `Compute` that settles while it warms up what it computes by."""

    def tune(self) -> None:
        """Measure and choose; writes to pages, so before anybody's are there."""
        ...

    def paths(self) -> Sequence[Compute]:
        """Return every path that may be chosen, over the same pages."""
        ...


def page_bytes(config: ModelConfig, item_bytes: int = 4) -> int:
    """Return the bytes of one page: K/V of PAGE_TOKENS tokens in every layer, and their times."""
    row = config.num_layers * config.num_heads * (config.qk_dim + config.v_dim) * item_bytes
    return PAGE_TOKENS * (row + 8)


def pages_for(num_tokens: int) -> int:
    """Return how many pages hold this many tokens."""
    return -(-num_tokens // PAGE_TOKENS)


def most_tokens(config: ModelConfig) -> int:
    """Return how many tokens of a user can be kept: all of a history of max_events events and its start token."""
    return 1 + config.max_events * (2 if config.kind == "ranking" else 1)


def least_seconds(call: Callable[[], object], *, num_calls: int = 7) -> float:
    """Return the least time of some calls, after one that pays for what is made once."""
    call()
    seconds = []
    for _ in range(num_calls):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)

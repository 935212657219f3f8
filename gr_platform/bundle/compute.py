"""The two operations that M-FALCON is made of, as a protocol: who implements them decides speed, never the result.

Legend: L new tokens, P past tokens (cached), C candidates, H heads.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gr_platform.models.tokens import Tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class KV:
    """Keys and values of P tokens in every layer, with the tokens' times.

    times int64 [P]; k float [layers, P, H, qk_dim]; v float [layers, P, H, v_dim].
    """

    times: np.ndarray
    k: np.ndarray
    v: np.ndarray

    def __len__(self) -> int:
        return len(self.times)

    @property
    def size_bytes(self) -> int:
        """Bytes held by the arrays."""
        return self.times.nbytes + self.k.nbytes + self.v.nbytes

    def slice(self, start: int, stop: int) -> "KV":
        """Return tokens start..stop-1 (views)."""
        return KV(times=self.times[start:stop], k=self.k[:, start:stop], v=self.v[:, start:stop])


def concat_kv(parts: list[KV]) -> KV:
    """Return consecutive parts as one contiguous KV."""
    if len(parts) == 1:
        return parts[0]
    return KV(
        times=np.concatenate([p.times for p in parts]),
        k=np.concatenate([p.k for p in parts], axis=1),
        v=np.concatenate([p.v for p in parts], axis=1),
    )


class Compute(Protocol):
    """A loaded model. Stateless: K/V go in and come out, so a cache may hold them."""

    def empty(self) -> KV:
        """Return the K/V of no tokens, in this model's shapes and dtype."""
        ...

    def encode(self, tokens: Tokens, past: KV) -> tuple[np.ndarray, KV]:
        """Return the encoder's output rows [L, d] of `tokens` after `past`, and the K/V of the L new tokens alone."""
        ...

    def score(self, candidates: np.ndarray, request_time: int, past: KV) -> np.ndarray:
        """Ranking only: return probabilities [C, tasks] of dense item indices int64 [C] against the cached history.

        Each candidate is an item token at `request_time` at the position after the history; it sees the history and
        itself, never another candidate.
        """
        ...

"""Visible events of several users as one jagged batch, and the tokens made of them.

Invariant: tokens come from tokens.py, the rule that serving uses, user by user.

Legend: B users, L events, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gr_platform.models.config import Kind
from gr_platform.models.tokens import ranking_tokens, retrieval_tokens
from kernels import JaggedTimes

History = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Jagged tokens: kinds, items, actions, positions int64 [T]; `jagged` holds offsets, times and time buckets."""

    kinds: Tensor
    items: Tensor
    actions: Tensor
    positions: Tensor
    jagged: JaggedTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class EventBatch:
    """Visible events of B users: offsets int64 [B + 1]; items, actions, times int64 [L]; request_times int64 [B] ms."""

    offsets: Tensor
    items: Tensor
    actions: Tensor
    times: Tensor
    request_times: Tensor
    histories: Sequence[History] = field(repr=False)

    def __len__(self) -> int:
        return len(self.histories)

    @staticmethod
    def of(histories: Sequence[History], request_times: Sequence[int] | np.ndarray) -> "EventBatch":
        """Return the batch of (items, actions, times) arrays, int64 [n] each, cut to the visible window already."""
        lengths = np.array([0] + [len(items) for items, _, _ in histories], np.int64)
        items, actions, times = (
            torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *(history[i] for history in histories)]))
            for i in range(3)
        )
        return EventBatch(
            offsets=torch.from_numpy(np.cumsum(lengths)),
            items=items,
            actions=actions,
            times=times,
            request_times=torch.from_numpy(np.asarray(request_times, np.int64)),
            histories=histories,
        )

    def tokens(self, kind: Kind) -> TokenBatch:
        """Return the tokens that a model of this kind reads."""
        build = ranking_tokens if kind == "ranking" else retrieval_tokens
        users = [build(*h, int(t)) for h, t in zip(self.histories, self.request_times.tolist(), strict=True)]

        def joined(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *(getattr(user, name) for user in users)]))

        offsets = torch.from_numpy(np.cumsum([0] + [len(user) for user in users], dtype=np.int64))
        positions = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(user)) for user in users)])
        return TokenBatch(
            kinds=joined("kinds"),
            items=joined("items"),
            actions=joined("actions"),
            positions=torch.from_numpy(positions),
            jagged=JaggedTimes.of(offsets, joined("times"), joined("query_times")),
        )

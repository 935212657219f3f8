"""Visible events of several users as one jagged batch, and the tokens made of them.

Invariant: tokens come from tokens.py, the rule that serving uses, user by user.

Legend: B users, L events, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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
    """Visible events of B users: offsets int64 [B + 1]; items, actions, times int64 [L]; request_times int64 [B] ms.

    target_items, target_actions, target_times int64 [L]: the event that each token but a user's last one answers, from
    the start token on. They are the events themselves, unless training dropped some of them (Stochastic Length).
    """

    offsets: Tensor
    items: Tensor
    actions: Tensor
    times: Tensor
    target_items: Tensor
    target_actions: Tensor
    target_times: Tensor
    request_times: Tensor

    def __len__(self) -> int:
        return len(self.request_times)

    @property
    def histories(self) -> list[History]:
        """Items, actions and times of each user (views)."""
        values = [each.numpy() for each in (self.items, self.actions, self.times)]
        return [(values[0][span], values[1][span], values[2][span]) for span in self._spans()]

    @staticmethod
    def of(histories: Sequence[History], request_times: Sequence[int] | np.ndarray) -> "EventBatch":
        """Return the batch of (items, actions, times) arrays, int64 [n] each, cut to the visible window already."""
        lengths = np.array([0] + [len(items) for items, _, _ in histories], np.int64)
        items, actions, times = (
            np.concatenate([np.zeros(0, np.int64), *(history[i] for history in histories)]) for i in range(3)
        )
        return EventBatch.of_arrays(np.cumsum(lengths), (items, actions, times), request_times)

    @staticmethod
    def of_arrays(
        offsets: np.ndarray,
        events: History,
        request_times: Sequence[int] | np.ndarray,
        targets: History | None = None,
    ) -> "EventBatch":
        """Return the batch of jagged arrays without copying them: events, targets are items, actions, times int64 [L].

        targets: see the class; the events where None.
        """
        items, actions, times = (torch.from_numpy(values) for values in events)
        target_items, target_actions, target_times = (torch.from_numpy(values) for values in targets or events)
        return EventBatch(
            offsets=torch.from_numpy(offsets),
            items=items,
            actions=actions,
            times=times,
            target_items=target_items,
            target_actions=target_actions,
            target_times=target_times,
            request_times=torch.from_numpy(np.asarray(request_times, np.int64)),
        )

    def tokens(self, kind: Kind) -> TokenBatch:
        """Return the tokens that a model of this kind reads."""
        build = ranking_tokens if kind == "ranking" else retrieval_tokens
        next_times = self.target_times.numpy()
        users = [
            build(*history, at, next_times=next_times[span])
            for history, at, span in zip(self.histories, self.request_times.tolist(), self._spans(), strict=True)
        ]

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

    def _spans(self) -> list[slice]:
        return [slice(begin, end) for begin, end in pairwise(self.offsets.tolist())]

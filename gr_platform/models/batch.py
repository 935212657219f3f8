"""Visible events of several users as one jagged batch, and the tokens made of them.

Invariant: without slow series a user's tokens are those of tokens.py, the rule that serving uses (tested). Batches lie
in main memory, where numpy lays out their tokens; a model moves what it reads to the device of its weights.

Legend: B users, L events, E entries of slow series, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gr_platform.models.config import Kind
from gr_platform.models.features import context_key, user_key
from gr_platform.models.layout import Layout, layout
from gr_platform.models.tokens import ACTION, EVENT, FEATURE, ITEM, START
from kernels import JaggedTimes

History = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Jagged tokens: kinds, items, actions, positions int64 [T]; `jagged` holds offsets, times and time buckets.

    codes: context columns and slow series (`features.keys_of`) -> int64 [T], 0 where a token has none. answers int64
    [L]: the token that answers each event (layout.py); last int64 [B]: each user's last one. These two stay in main
    memory, where they are chosen from.
    """

    kinds: Tensor
    items: Tensor
    actions: Tensor
    positions: Tensor
    jagged: JaggedTimes
    codes: dict[str, Tensor]
    answers: Tensor
    last: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """E entries of users' slow series in the order of their tokens, int64 [E] each.

    places: the event of the batch that an entry directly precedes, not decreasing; series: which of `names`; codes;
    times: since when, ms.
    """

    names: tuple[str, ...]
    places: np.ndarray
    series: np.ndarray
    codes: np.ndarray
    times: np.ndarray

    @staticmethod
    def none() -> "Entries":
        """Return no entries of no series."""
        nothing = np.zeros(0, np.int64)
        return Entries(names=(), places=nothing, series=nothing, codes=nothing, times=nothing)

    def repeated(self, begin: int, end: int, length: int, num_times: int) -> "Entries":
        """Return the entries ahead of events begin..end-1 again and again, where a copy has `length` events."""
        mine = slice(*np.searchsorted(self.places, (begin, end)).tolist())
        places = self.places[mine] - begin + length * np.arange(num_times)[:, None]
        return Entries(
            names=self.names,
            places=places.ravel(),
            series=np.tile(self.series[mine], num_times),
            codes=np.tile(self.codes[mine], num_times),
            times=np.tile(self.times[mine], num_times),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EventBatch:
    """Visible events of B users: offsets int64 [B + 1]; items, actions, times int64 [L]; request_times int64 [B] ms.

    target_items, target_actions, target_times int64 [L]: the event that each answering token answers, from the start
    token on. They are the events themselves, unless training dropped some of them (Stochastic Length).
    context: column -> codes int64 [L]; entries: of the users' slow series.
    """

    offsets: Tensor
    items: Tensor
    actions: Tensor
    times: Tensor
    target_items: Tensor
    target_actions: Tensor
    target_times: Tensor
    request_times: Tensor
    context: dict[str, Tensor] = field(default_factory=dict)
    entries: Entries = field(default_factory=Entries.none)

    def __len__(self) -> int:
        return len(self.request_times)

    @property
    def histories(self) -> list[History]:
        """Items, actions and times of each user (views)."""
        values = [each.numpy() for each in (self.items, self.actions, self.times)]
        spans = [slice(begin, end) for begin, end in pairwise(self.offsets.tolist())]
        return [(values[0][span], values[1][span], values[2][span]) for span in spans]

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
        *,
        context: Mapping[str, np.ndarray] | None = None,
        entries: Entries | None = None,
    ) -> "EventBatch":
        """Return the batch of jagged arrays without copying them: events, targets are items, actions, times int64 [L].

        targets, context, entries: see the class; the events themselves and nothing where None.
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
            context={name: torch.from_numpy(codes) for name, codes in (context or {}).items()},
            entries=entries or Entries.none(),
        )

    def asked(self, user: int, candidates: Tensor) -> "EventBatch":
        """Return a user's events once for each of candidates int64 [C], which comes last: at the time of the request,
        without action or context."""
        begin, end = self.offsets[user : user + 2].tolist()
        num, nothing = len(candidates), torch.zeros_like(candidates)

        def copies(values: Tensor, last: Tensor) -> np.ndarray:
            return torch.cat([values[begin:end].expand(num, -1), last[:, None]], 1).flatten().numpy()

        at, length = self.request_times[user].expand(num), end - begin + 1
        return EventBatch.of_arrays(
            length * np.arange(num + 1),
            (copies(self.items, candidates), copies(self.actions, nothing), copies(self.times, at)),
            at.numpy(),
            context={name: copies(codes, nothing) for name, codes in self.context.items()},
            entries=self.entries.repeated(begin, end, length, num),
        )

    def layout(self, kind: Kind) -> Layout:
        """Return where the tokens that a model of this kind reads lie."""
        return layout(kind, self.offsets.numpy(), self.entries.places)

    def moved(self, device: torch.device) -> "EventBatch":
        """Return the events on a device, for a model that reads them and no tokens: those are laid out before."""
        tensors = {each.name: value for each in fields(self) if isinstance(value := getattr(self, each.name), Tensor)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in tensors.items()}
        return replace(self, **moved, context={name: codes.to(device) for name, codes in self.context.items()})

    def tokens(self, kind: Kind, device: torch.device | str = "cpu") -> TokenBatch:
        """Return the tokens that a model of this kind reads, on the device of its weights."""
        at = self.layout(kind)
        kinds = np.full(at.num_tokens, EVENT if kind == "retrieval" else ACTION, np.int64)
        kinds[at.starts], kinds[at.entries] = START, FEATURE
        if kind == "ranking":
            kinds[at.events] = ITEM
        times, query_times = self._times(kind, at)
        jagged = (torch.from_numpy(values).to(device) for values in (at.offsets, times, query_times))
        return TokenBatch(
            kinds=torch.from_numpy(kinds).to(device),
            items=_placed(at, at.events, self.items.numpy()).to(device),
            actions=_placed(at, at.events + (kind == "ranking"), self.actions.numpy()).to(device),
            positions=torch.from_numpy(at.positions).to(device),
            jagged=JaggedTimes.of(*jagged),
            codes={name: codes.to(device) for name, codes in self._codes(at).items()},
            answers=torch.from_numpy(at.answers),
            last=torch.from_numpy(at.last),
        )

    def _times(self, kind: Kind, at: Layout) -> tuple[np.ndarray, np.ndarray]:
        """Return when tokens happened and the times they look from, int64 [T] each: see tokens.py; entries look from
        their own, so that nothing later changes them."""
        requests, offsets = self.request_times.numpy(), self.offsets.numpy()
        times = np.empty(at.num_tokens, np.int64)
        times[at.starts] = requests
        some = np.diff(offsets) > 0
        times[at.starts[some]] = self.target_times.numpy()[offsets[:-1][some]]
        times[at.events], times[at.entries] = self.times.numpy(), self.entries.times
        if kind == "ranking":
            times[at.events + 1] = self.times.numpy()
            return times, times
        query_times = np.empty_like(times)
        query_times[at.entries] = self.entries.times
        query_times[at.answers], query_times[at.last] = self.target_times.numpy(), requests
        return times, query_times

    def _codes(self, at: Layout) -> dict[str, Tensor]:
        """Return the context of the tokens that have an item, and what entries say."""
        codes = {context_key(name): _placed(at, at.events, column.numpy()) for name, column in self.context.items()}
        for number, name in enumerate(self.entries.names):
            said = np.where(self.entries.series == number, self.entries.codes, 0)
            codes[user_key(name)] = _placed(at, at.entries, said)
        return codes


def _placed(at: Layout, where: np.ndarray, values: np.ndarray) -> Tensor:
    """Return values at tokens `where`, 0 at the others, int64 [T]."""
    out = np.zeros(at.num_tokens, np.int64)
    out[where] = values
    return torch.from_numpy(out)

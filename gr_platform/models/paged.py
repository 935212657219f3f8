"""K/V of many users in pages, and the step that reads and extends them: what an engine hands to a model.

Invariant: a page belongs to one user's prefix at a time, and a token's rows are written once, before anyone reads them;
who owns which page is the cache's business, not the model's.

Legend: B users of a step, L new tokens (or candidates), P past tokens of a user, H heads, D / Dv head dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from gr_platform.bundle.compute import PAGE_TOKENS, Ask, Piece
from gr_platform.models.config import ModelConfig
from kernels import PastKV, shared_tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedPast:
    """The past of B users side by side, each of num_tokens int64 [B] tokens, then zeros up to P of the longest.

    times int64 [B, P] ms; k [B, P, H, D] and v [B, P, H, Dv] of each layer.
    """

    num_tokens: Tensor
    times: Tensor
    k: Sequence[Tensor]
    v: Sequence[Tensor]

    @staticmethod
    def of_one(times: Tensor, k: Sequence[Tensor], v: Sequence[Tensor]) -> "PaddedPast":
        """Return the past of one user: times [P], k [P, H, D] and v [P, H, Dv] of each layer."""
        num_tokens = torch.tensor([len(times)], device=times.device)
        return PaddedPast(num_tokens=num_tokens, times=times[None], k=[x[None] for x in k], v=[x[None] for x in v])


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPages:
    """k [layers, pages, page, H, D], v [layers, pages, page, H, Dv], times int64 [pages, page] ms."""

    k: Tensor
    v: Tensor
    times: Tensor

    @staticmethod
    def of(config: ModelConfig, num_pages: int, dtype: torch.dtype, device: torch.device) -> "KVPages":
        """Return room for `num_pages` pages; on the CPU the system gives memory when a page is first written."""
        shape = (config.num_layers, num_pages, PAGE_TOKENS, config.num_heads)
        return KVPages(
            k=torch.empty(*shape, config.qk_dim, dtype=dtype, device=device),
            v=torch.empty(*shape, config.v_dim, dtype=dtype, device=device),
            times=torch.empty(num_pages, PAGE_TOKENS, dtype=torch.int64, device=device),
        )

    def past(self, layer: int, step: "Step") -> PastKV:
        """Return the past of the step's users in one layer."""
        return PastKV(self.k[layer], self.v[layer], self.times, step.past_offsets, step.page_table)

    def of_user(self, step: "Step", user: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return one user's past times [P], k [P, H, D] and v [P, H, Dv] of each layer, copied together."""
        start, stop = step.past_offsets[user : user + 2].tolist()
        pages = step.page_table[user, : -(-(stop - start) // PAGE_TOKENS)].long()
        past = slice(0, stop - start)
        return (
            self.times[pages].flatten(0, 1)[past],
            list(self.k[:, pages].flatten(1, 2)[:, past]),
            list(self.v[:, pages].flatten(1, 2)[:, past]),
        )

    def write_times(self, step: "Step") -> None:
        """Keep the times of the step's tokens that are kept."""
        self.times.view(-1).index_copy_(0, step.slots, step.times.index_select(0, step.kept))

    def write(self, layer: int, step: "Step", k: Tensor, v: Tensor) -> None:
        """Keep the rows of k [L, H, D] and v [L, H, Dv] of the step's tokens that are kept."""
        for pages, rows in ((self.k[layer], k), (self.v[layer], v)):
            kept = rows if len(step.kept) == len(rows) else rows.index_select(0, step.kept)
            pages.flatten(0, 1).index_copy_(0, step.slots, kept.to(pages.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """New tokens, or candidates, of B users over the past of each.

    seq_offsets int64 [B + 1]; times, query_times int64 [L] ms; past_offsets int64 [B + 1] and page_table int32 [B, most
    pages] of the past; kept int64 [K]: tokens whose K/V go to slots int64 [K]; num_targets int64 [B] where all are
    candidates; tiles: what the layers share (`share`).
    """

    seq_offsets: Tensor
    times: Tensor
    query_times: Tensor
    past_offsets: Tensor
    page_table: Tensor
    kept: Tensor
    slots: Tensor
    num_targets: Tensor | None = None
    tiles: list[Tensor] | None = field(default=None, repr=False)

    def share(self, pages: KVPages) -> "Step":
        """Return the step with the work done that is the same in every layer."""
        past = pages.past(0, self)
        tiles = shared_tiles(self.seq_offsets, self.times, self.query_times, past, self.num_targets)
        return replace(self, tiles=tiles)

    def of_last(self, rows: Tensor) -> "Step":
        """Return the step of the tokens `rows` int64 [R] alone, each the last of its user and the only one not kept."""
        users = torch.searchsorted(self.seq_offsets, rows, right=True) - 1
        past = self.past_offsets.diff()[users] + self.seq_offsets.diff()[users] - 1
        return Step(
            seq_offsets=torch.arange(len(rows) + 1, device=rows.device),
            times=self.times[rows],
            query_times=self.query_times[rows],
            past_offsets=torch.nn.functional.pad(past.cumsum(0), (1, 0)),
            page_table=self.page_table[users],
            kept=self.kept[:0],
            slots=self.slots[:0],
        )


def step_of(pieces: Sequence[Piece], device: torch.device) -> Step:
    """Return the step that computes the new tokens of these pieces."""
    lengths = [len(piece.tokens) for piece in pieces]
    offsets = _offsets(lengths)
    kept = np.concatenate([start + np.arange(p.keep) for start, p in zip(offsets, pieces, strict=False)])
    slots = np.concatenate([p.slots() for p in pieces])
    return Step(
        seq_offsets=_on(offsets, device),
        times=_on(np.concatenate([p.tokens.times for p in pieces]), device),
        query_times=_on(np.concatenate([p.tokens.query_times for p in pieces]), device),
        past_offsets=_on(_offsets([p.past for p in pieces]), device),
        page_table=_on(_table([p.pages for p in pieces]), device),
        kept=_on(kept, device),
        slots=_on(slots, device),
    )


def step_of_asks(asks: Sequence[Ask], device: torch.device) -> Step:
    """Return the step that computes these asks' candidates."""
    counts = [len(ask.candidates) for ask in asks]
    times = _on(np.repeat(np.array([ask.request_time for ask in asks], np.int64), counts), device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return Step(
        seq_offsets=_on(_offsets(counts), device),
        times=times,
        query_times=times,
        past_offsets=_on(_offsets([ask.past for ask in asks]), device),
        page_table=_on(_table([ask.pages for ask in asks]), device),
        kept=none,
        slots=none,
        num_targets=_on(np.array(counts, np.int64), device),
    )


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)


def _table(pages: list[np.ndarray]) -> np.ndarray:
    table = np.zeros((len(pages), max(map(len, pages), default=0)), np.int32)
    for row, own in zip(table, pages, strict=True):
        row[: len(own)] = own
    return table


def _on(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)

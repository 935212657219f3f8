"""Cached HSTU attention on the CPU: per user, blocks of queries against the keys up to the block's last row.

Invariant: a user's operands are copies of its own (BLAS rounds by alignment) in shapes that its own lengths decide, so
its rows are bit-equal whatever else is in the batch. Pages are joined once a user; candidates of one request share one
row of bias. Buckets are read in the order that `buckets` yields them.

Legend: P past tokens, h new history tokens and m candidates of a user, H heads, D / Dv head dims, r queries, c keys.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.hstu_attention.cpu import biased_scores, of_user
from kernels.hstu_attention.cpu_bias import TileBias
from kernels.hstu_attention.tiles import ROWS, TILE_ELEMENTS, bucket_of, bucket_of_ordered
from kernels.hstu_attention_cached.reference import past_of


@dataclass(frozen=True, slots=True)
class Users:
    """Where the rows of the users of a step lie: `bounds` of new tokens, `targets` of them, bounds of past tokens."""

    bounds: list[int]
    targets: list[int]
    past_bounds: list[int]
    page_table: Tensor | None

    def __iter__(self) -> Iterator[tuple[int, slice, slice]]:
        """Yield each user's number, rows of its new history, and rows of its candidates."""
        for user, ((start, stop), m) in enumerate(zip(itertools.pairwise(self.bounds), self.targets, strict=True)):
            yield user, slice(start, stop - m), slice(stop - m, stop)

    def keys(self, user: int, past: Tensor, new: Tensor) -> Tensor:
        """Return past and new rows of a user as one copy [P + h, ...]."""
        seen = past_of(user, past, self.past_bounds, self.page_table)
        return torch.cat([seen, new]) if len(new) or self.page_table is None else seen

    def longest(self) -> int:
        """Return the most keys that a row of new history sees; 0 where all rows are candidates."""
        past = (stop - start for start, stop in itertools.pairwise(self.past_bounds))
        new = (rows.stop - rows.start for _, rows, _ in self)
        return max((p + h for p, h in zip(past, new, strict=True) if h), default=0)


def _blocks(rows: slice) -> Iterator[slice]:
    for first in range(rows.start, rows.stop, ROWS):
        yield slice(first, min(first + ROWS, rows.stop))


def _candidate_blocks(rows: slice, num_keys: int) -> Iterator[slice]:
    size = max(16, TILE_ELEMENTS // max(1, num_keys))
    for first in range(rows.start, rows.stop, size):
        yield slice(first, min(first + size, rows.stop))


def _ascending(times: Tensor) -> bool:
    """Return whether times never decrease, and lie so close that no difference of them overflows."""
    if len(times) == 0:
        return True
    first, last = int(times[0]), int(times[-1])
    return first > -(1 << 62) and last - first < 1 << 62 and bool((times[1:] >= times[:-1]).all())


def buckets(users: Users, times: Tensor, query_times: Tensor, past_times: Tensor) -> Iterator[Tensor]:
    """Yield the time buckets uint8 of every tile in the order that `forward` walks them."""
    for user, new, own in users:
        key_times = users.keys(user, past_times, times[new])
        ordered = _ascending(key_times) and bool((query_times[new] >= times[new]).all())
        num_past = len(key_times) - (new.stop - new.start)
        for rows in _blocks(new):
            seen = key_times[: num_past + rows.stop - new.start]
            if ordered:
                yield bucket_of_ordered(query_times[rows][None].contiguous(), seen[None].contiguous())[0]
            else:
                yield bucket_of((query_times[rows, None] - seen[None, :]).abs_())
        for rows in _candidate_blocks(own, len(key_times)):
            asked = query_times[rows]
            if bool((asked == asked[0]).all()):
                asked = asked[:1]
            yield bucket_of((asked[:, None] - key_times[None, :]).abs_())
            yield bucket_of((query_times[rows] - times[rows]).abs_())


def forward(
    new: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    users: Users,
    past: tuple[Tensor, Tensor, Tensor],
    pos_weight: Tensor,
    time_weight: Tensor,
    tiles: list[Tensor] | None,
    max_seq_len: int,
    max_attn_len: int,
) -> Tensor:
    """Return the attention [L, H, Dv] of the new tokens; tiles: what `buckets` yields, or None: formed on the way."""
    q, k, v, times, query_times = new
    past_k, past_v, past_times = past
    out = torch.empty(v.shape, dtype=v.dtype)
    each = iter(tiles) if tiles is not None else buckets(users, times, query_times, past_times)
    width = -(-users.longest() // ROWS) * ROWS
    bias = TileBias(pos_weight, time_weight, q.new_empty(0), None, width, max_attn_len)
    for user, history, own in users:
        k_all, v_all = (users.keys(user, x, fresh[history]).transpose(0, 1) for x, fresh in ((past_k, k), (past_v, v)))
        num_past = k_all.shape[1] - (history.stop - history.start)
        for rows in _blocks(history):
            num_keys = num_past + rows.stop - history.start
            tile = bias.of_block(next(each)[None])
            weights = F.silu(biased_scores(of_user(q, rows), k_all[:, :num_keys], tile), inplace=True)
            out[rows] = torch.bmm(weights, v_all[:, :num_keys]).div_(max_seq_len).transpose(0, 1)
        for rows in _candidate_blocks(own, k_all.shape[1]):
            queries = of_user(q, rows)
            tile = bias.of_targets(next(each)).expand(queries.shape[1], -1)
            result = torch.bmm(F.silu(biased_scores(queries, k_all, tile[None]), inplace=True), v_all)
            alone = (queries * of_user(k, rows)).sum(-1) + bias.of_themselves(next(each))
            result.addcmul_(F.silu(alone)[..., None], of_user(v, rows))
            out[rows] = result.div_(max_seq_len).transpose(0, 1)
    return out

"""Cached HSTU attention on the CPU: per user, blocks of queries against the past and against the new tokens.

Invariant: a block's scores fit the cache, the past is read where it lies (pages are joined once a user), and candidates
of one request share one row of bias.

Legend: P past tokens, h new history tokens and m candidates of a user, H heads, D / Dv head dims, r queries, c keys.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.hstu_attention.cpu_bias import MASKED
from kernels.hstu_attention.tiles import TILE_ELEMENTS, bucket_of
from kernels.hstu_attention_cached.reference import past_of

Rows = tuple[Tensor, Tensor, Tensor, Tensor]


def _bias(
    positions: Tensor,
    query_times: Tensor,
    first_key: int,
    key_times: Tensor,
    weights: tuple[Tensor, Tensor],
    window: int,
) -> Tensor:
    """Return the bias [r, c] of queries at `positions` over keys from position `first_key` on, hidden pairs MASKED."""
    pos_weight, time_weight = weights
    distance = positions[:, None] - (first_key + torch.arange(len(key_times)))[None, :]
    hidden = distance < 0
    if window:
        hidden |= distance > window
    buckets = bucket_of((query_times[:, None] - key_times[None, :]).abs_()).long()
    bias = time_weight[buckets].add_(pos_weight[distance.clamp_(min=0)])
    return bias.masked_fill_(hidden, MASKED)


def _over(q_HrD: Tensor, k_cHD: Tensor, v_cHD: Tensor, bias: Tensor) -> Tensor:
    """Return SiLU(q k^T + bias) v [H, r, Dv] over one stretch of keys; bias [r, c] or [1, c]."""
    wide = bias.expand(q_HrD.shape[0], q_HrD.shape[1], -1)
    scores = torch.baddbmm(wide, q_HrD, k_cHD.permute(1, 2, 0))
    return torch.bmm(F.silu(scores, inplace=True), v_cHD.transpose(0, 1))


def _blocks(first: int, last: int, num_keys: int) -> Iterator[slice]:
    size = max(16, TILE_ELEMENTS // max(1, num_keys))
    for begin in range(first, last, size):
        yield slice(begin, min(begin + size, last))


def forward(
    new: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    bounds: list[int],
    targets: list[int],
    past: tuple[Tensor, Tensor, Tensor],
    past_bounds: list[int],
    page_table: Tensor | None,
    pos_weight: Tensor,
    time_weight: Tensor,
    max_seq_len: int,
    max_attn_len: int,
) -> Tensor:
    """Return the attention [L, H, Dv] of the new tokens; see `op.hstu_attention_cached`."""
    q, k, v, times, query_times = new
    out = torch.empty(v.shape, dtype=v.dtype)
    weights = (pos_weight, time_weight)
    for user, ((start, stop), m) in enumerate(zip(itertools.pairwise(bounds), targets, strict=True)):
        past_k, past_v, past_times = (past_of(user, x, past_bounds, page_table) for x in past)
        num_past, split = len(past_k), stop - m
        stretches = [(0, past_k, past_v, past_times), (num_past, k[start:split], v[start:split], times[start:split])]
        stretches = [stretch for stretch in stretches if len(stretch[1])]
        num_keys = num_past + split - start
        for rows in itertools.chain(_blocks(start, split, num_keys), _blocks(split, stop, num_keys)):
            queries, asked = q[rows].transpose(0, 1), query_times[rows]
            positions = (num_past + torch.arange(rows.start - start, rows.stop - start)).clamp_(max=num_keys)
            if rows.start >= split and bool((asked == asked[0]).all()):
                positions, asked = positions[:1], asked[:1]
            result = v.new_zeros(v.shape[1], rows.stop - rows.start, v.shape[2])
            for first, k_part, v_part, key_times in stretches:
                result += _over(
                    queries, k_part, v_part, _bias(positions, asked, first, key_times, weights, max_attn_len)
                )
            if rows.start >= split:
                own = time_weight[bucket_of((query_times[rows] - times[rows]).abs_()).long()] + pos_weight[0]
                alone = (q[rows] * k[rows]).sum(-1) + own[:, None]
                result += (F.silu(alone)[..., None] * v[rows]).transpose(0, 1)
            out[rows] = result.transpose(0, 1).div_(max_seq_len)
    return out

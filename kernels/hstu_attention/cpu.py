"""HSTU attention on the CPU: padded products of users of like length, tile by tile, computed again in the backward.

Invariant: no tensor of n x n outlives its tile but the time buckets of a batch that is small enough to keep them
(tiles.PLAN_BYTES), and a user's rows are bit-equal whatever else is in the batch: its operands are copies of its own
(BLAS rounds by alignment) in shapes that its own length decides.

Legend: L tokens, G users of a group, H heads, D / Dv head dims, n padded history, r queries and c keys of a tile.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.hstu_attention.cpu_bias import TileBias
from kernels.hstu_attention.tiles import ROWS, Group, Span, groups, spans, tile_buckets

silu_backward = torch.ops.aten.silu_backward


@dataclass(frozen=True, slots=True)
class Batch:
    """What is not learned: users, times, the flat buckets of their tiles (or none), N, and the window (0: none)."""

    users: list[Span]
    times: Tensor
    query_times: Tensor
    plan: Tensor
    max_seq_len: int
    max_attn_len: int

    @staticmethod
    def of(
        seq_offsets: Tensor,
        times: Tensor,
        query_times: Tensor,
        num_targets: Tensor | None,
        plan: Tensor,
        max_seq_len: int,
        max_attn_len: int,
    ) -> "Batch":
        """Return the batch; `plan` holds the buckets, or nothing: then each walk forms them tile by tile."""
        users = spans(seq_offsets.tolist(), None if num_targets is None else num_targets.tolist())
        return Batch(users, times, query_times, plan, max_seq_len, max_attn_len)

    def bias(self, pos_weight: Tensor, time_weight: Tensor) -> TileBias:
        """Return the biases of one walk over the tiles."""
        longest = max((user.h for user in self.users), default=0)
        width = -(-longest // ROWS) * ROWS
        formed = None if len(self.plan) else tile_buckets(self.users, self.times, self.query_times)
        return TileBias(pos_weight, time_weight, self.plan, formed, width, self.max_attn_len)

    def first_key(self, first: int) -> int:
        """Return the first key that some query from row `first` on sees."""
        return max(0, first - self.max_attn_len) if self.max_attn_len else 0


def _padded(x_LHD: Tensor, rows: Tensor) -> Tensor:
    """Return the rows int64 [G, n] of a group as a contiguous copy [G * H, n, D]."""
    num_users, n = rows.shape
    heads, dim = x_LHD.shape[1:]
    taken = x_LHD.index_select(0, rows.view(-1)).view(num_users, n, heads, dim)
    return taken.transpose(1, 2).contiguous().view(num_users * heads, n, dim)


def _unpad(out_LHD: Tensor, x_GHnD: Tensor, rows: Tensor, real: Tensor) -> None:
    """Write the real rows of a group to their places."""
    num_users, n = rows.shape
    by_row = x_GHnD.view(num_users, -1, n, x_GHnD.shape[-1]).transpose(1, 2).reshape(num_users * n, *out_LHD.shape[1:])
    kept = real.view(-1).nonzero().view(-1)
    # Rows are moved whole; indexing by a mask takes twice as long.
    out_LHD.index_copy_(0, rows.view(-1).index_select(0, kept), by_row.index_select(0, kept))


def biased_scores(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """Return q k^T + bias [G * H, r, c]; bias [G, r, c] is shared by the heads."""
    heads = len(q) // len(bias)
    scores = bias[:, None].expand(-1, heads, -1, -1).contiguous().view(len(q), *bias.shape[1:])
    return scores.baddbmm_(q, k.transpose(1, 2))


def of_user(x_LHD: Tensor, rows: slice) -> Tensor:
    """Return rows of one user as a contiguous copy [H, rows, D]."""
    return x_LHD[rows].transpose(0, 1).clone(memory_format=torch.contiguous_format)


def _by_heads(d_scores: Tensor, num_users: int) -> Tensor:
    """Return the gradient of the bias [G, r, c]: the sum over heads."""
    return d_scores.view(num_users, -1, *d_scores.shape[1:]).sum(1)


def forward(q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, time_weight: Tensor, batch: Batch) -> Tensor:
    """Return attention [L, H, Dv], see `reference.hstu_attention`."""
    out = v.new_empty(v.shape)
    bias = batch.bias(pos_weight, time_weight)
    for group in groups(batch.users):
        rows, real = group.rows()
        q_pad, k_pad, v_pad = (_padded(x, rows) for x in (q, k, v))
        out_pad = torch.empty_like(v_pad)
        for first, last in group.row_blocks():
            keys = slice(batch.first_key(first), last)
            buckets = bias.next_buckets(len(rows), last - first, last)[:, :, keys]
            scores = biased_scores(q_pad[:, first:last], k_pad[:, keys], bias.of_block(buckets))
            out_pad[:, first:last] = torch.bmm(F.silu(scores, inplace=True), v_pad[:, keys])
        _unpad(out, out_pad.div_(batch.max_seq_len), rows, real)
    for user in batch.users:
        if user.m:
            _targets_forward(out, (q, k, v), user, bias, batch.max_seq_len)
    return out


def _targets_forward(
    out: Tensor, qkv: tuple[Tensor, Tensor, Tensor], user: Span, bias: TileBias, max_seq_len: int
) -> None:
    """Write the rows of a user's targets, which see the history and themselves."""
    k_past, v_past = (of_user(x, user.history()) for x in qkv[1:])
    for rows in user.target_rows():
        q, k, v = (of_user(x, rows) for x in qkv)
        tile = bias.of_targets(bias.next_buckets(q.shape[1], user.h))
        result = torch.bmm(F.silu(biased_scores(q, k_past, tile[None]), inplace=True), v_past)
        alone = (q * k).sum(-1) + bias.of_themselves(bias.next_buckets(q.shape[1]))
        out[rows] = result.addcmul_(F.silu(alone)[..., None], v).div_(max_seq_len).transpose(0, 1)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, time_weight: Tensor, batch: Batch
) -> Gradients:
    """Return the gradients of q, k, v, pos_weight and time_weight."""
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    bias = batch.bias(pos_weight, time_weight)
    for group in groups(batch.users):
        rows, real = group.rows()
        grads = _group_backward(grad, (q, k, v), group, rows, real, bias, batch)
        for whole, of_group in zip((dq, dk, dv), grads, strict=True):
            _unpad(whole, of_group, rows, real)
    for user in batch.users:
        if user.m:
            _targets_backward((dq, dk, dv), grad, (q, k, v), user, bias, batch.max_seq_len)
    return dq, dk, dv, *bias.gradients()


def _group_backward(
    grad: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    group: Group,
    rows: Tensor,
    real: Tensor,
    bias: TileBias,
    batch: Batch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the padded gradients of q, k and v [G * H, n, D] of a group's history, and collect those of the bias."""
    q, k, v = (_padded(x, rows) for x in qkv)
    heads = qkv[0].shape[1]
    padding = ~real.repeat_interleave(heads, 0)[..., None]
    d_out = _padded(grad, rows).div_(batch.max_seq_len).masked_fill_(padding, 0.0)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for first, last in group.row_blocks():
        block, keys = slice(first, last), slice(batch.first_key(first), last)
        buckets = bias.next_buckets(len(rows), last - first, last)[:, :, keys]
        scores = biased_scores(q[:, block], k[:, keys], bias.of_block(buckets))
        dv[:, keys] += torch.bmm(F.silu(scores).transpose(1, 2), d_out[:, block])
        d_scores = silu_backward(torch.bmm(d_out[:, block], v[:, keys].transpose(1, 2)), scores)
        dq[:, block] = torch.bmm(d_scores, k[:, keys])
        dk[:, keys] += torch.bmm(d_scores.transpose(1, 2), q[:, block])
        bias.collect_block(_by_heads(d_scores, len(rows)), buckets)
    return dq, dk, dv


def _targets_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    user: Span,
    bias: TileBias,
    max_seq_len: int,
) -> None:
    """Write the gradients of a user's targets and add theirs to its history's k and v."""
    dq, dk, dv = grads
    past = user.history()
    k_past, v_past = (of_user(x, past) for x in qkv[1:])
    for rows in user.target_rows():
        q, k, v = (of_user(x, rows) for x in qkv)
        d_out = of_user(grad, rows).div_(max_seq_len)
        buckets, own = bias.next_buckets(q.shape[1], user.h), bias.next_buckets(q.shape[1])
        scores = biased_scores(q, k_past, bias.of_targets(buckets)[None])
        d_scores = silu_backward(torch.bmm(d_out, v_past.transpose(1, 2)), scores)
        alone = (q * k).sum(-1) + bias.of_themselves(own)
        d_alone = silu_backward((d_out * v).sum(-1), alone)[..., None]
        dq[rows] = (torch.bmm(d_scores, k_past) + d_alone * k).transpose(0, 1)
        dk[rows], dv[rows] = (d_alone * q).transpose(0, 1), (F.silu(alone)[..., None] * d_out).transpose(0, 1)
        dk[past] += torch.bmm(d_scores.transpose(1, 2), q).transpose(0, 1)
        dv[past] += torch.bmm(F.silu(scores).transpose(1, 2), d_out).transpose(0, 1)
        bias.collect_targets(d_scores.sum(0), buckets)
        bias.collect_themselves(d_alone.sum((0, 2)), own)

"""Jagged HSTU attention that keeps no [n, n] tensor for the backward pass: it is computed again there.

Invariant: users are computed one by one, on copies of their own, so a user's output is bit-equal whatever else is in
the batch. A view would not do: BLAS rounds by the operands' alignment, which depends on the users before.

Legend: as in reference.py; n tokens of one user.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.hstu_attention.time_buckets import NUM_TIME_BUCKETS


def _distance_bias(pos_weight: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Return the position bias [longest, longest] and the distances it was taken by (clamped at 0)."""
    steps = torch.arange(longest, device=pos_weight.device)
    distance = (steps[:, None] - steps[None, :]).clamp(min=0)
    return pos_weight[distance], distance


def _of_user(x_LHD: Tensor, user: slice) -> Tensor:
    """Return one user's rows as a contiguous copy [H, n, D]."""
    return x_LHD[user].transpose(0, 1).clone(memory_format=torch.contiguous_format)


def _scores(q_HnD: Tensor, k_HnD: Tensor, pos_bias: Tensor, time_weight: Tensor, buckets: Tensor) -> Tensor:
    """Return q k^T + rab [H, n, n] of one user."""
    bias = time_weight.index_select(0, buckets.view(-1)).view(buckets.shape)
    bias += pos_bias[: len(buckets), : len(buckets)]
    return torch.baddbmm(bias.expand(len(q_HnD), -1, -1), q_HnD, k_HnD.transpose(1, 2))


class _HSTUAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos_weight: Tensor,
        time_weight: Tensor,
        bounds: list[int],
        buckets: list[Tensor],
        divisor: int,
    ) -> Tensor:
        longest = max((len(b) for b in buckets), default=0)
        pos_bias, _ = _distance_bias(pos_weight, longest)
        out = torch.empty_like(v)
        for start, stop, bucket in zip(bounds, bounds[1:], buckets, strict=False):
            user = slice(start, stop)
            scores = _scores(_of_user(q, user), _of_user(k, user), pos_bias, time_weight, bucket)
            weights = torch.nn.functional.silu(scores, inplace=True).tril_()
            out[user] = torch.bmm(weights, _of_user(v, user)).div_(divisor).transpose(0, 1)
        ctx.save_for_backward(q, k, v, pos_weight, time_weight)
        ctx.bounds, ctx.buckets, ctx.divisor = bounds, buckets, divisor
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, pos_weight, time_weight = ctx.saved_tensors
        longest = max((len(b) for b in ctx.buckets), default=0)
        pos_bias, distance = _distance_bias(pos_weight, longest)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_distance = torch.zeros_like(pos_bias)
        d_time = torch.zeros(NUM_TIME_BUCKETS, dtype=torch.float64, device=time_weight.device)
        for start, stop, bucket in zip(ctx.bounds, ctx.bounds[1:], ctx.buckets, strict=False):
            user, n = slice(start, stop), stop - start
            q_HnD, k_HnD, v_HnD = _of_user(q, user), _of_user(k, user), _of_user(v, user)
            grad_HnD = _of_user(grads[0], user).div_(ctx.divisor)
            scores = _scores(q_HnD, k_HnD, pos_bias, time_weight, bucket)
            sigmoid = torch.sigmoid(scores)
            silu = scores * sigmoid
            # d silu(s) / ds = sigmoid + silu * (1 - sigmoid)
            slope = sigmoid.addcmul(silu, 1 - sigmoid)
            dv[user] = torch.bmm(silu.tril_().transpose(1, 2), grad_HnD).transpose(0, 1)
            d_scores = torch.bmm(grad_HnD, v_HnD.transpose(1, 2)).mul_(slope).tril_()
            dq[user] = torch.bmm(d_scores, k_HnD).transpose(0, 1)
            dk[user] = torch.bmm(d_scores.transpose(1, 2), q_HnD).transpose(0, 1)
            d_bias = d_scores.sum(0)
            d_distance[:n, :n] += d_bias
            d_time += torch.bincount(bucket.view(-1), d_bias.view(-1).double(), minlength=NUM_TIME_BUCKETS)
        d_pos = torch.bincount(distance.view(-1), d_distance.view(-1).double(), minlength=len(pos_weight))
        return (
            dq, dk, dv,
            d_pos.to(pos_weight.dtype), d_time.to(time_weight.dtype), None, None, None,
        )  # fmt: skip


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: list[int],
    buckets: list[Tensor],
    pos_weight: Tensor,
    time_weight: Tensor,
    divisor: int,
) -> Tensor:
    """Return what `reference.hstu_attention` returns; `buckets` (int32 [n, n] a user) are shared by the layers."""
    return _HSTUAttention.apply(q, k, v, pos_weight, time_weight, bounds, buckets, divisor)

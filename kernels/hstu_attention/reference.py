"""HSTU attention in plain PyTorch: obviously right, differentiable, the truth every faster path is held to.

Invariant: a query sees keys at its own position and before, nothing else; `divisor` (N) is a constant of the model.

Legend: L tokens in the batch, B users, H heads, D / Dv head dims, Lq queries, Lk keys, P past tokens, C candidates.
Source: PAPER section 2 (equations of the HSTU layer).
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.hstu_attention.time_buckets import pairwise_time_buckets


def _attend(q_CHD: Tensor, k_LHD: Tensor, bias: Tensor) -> Tensor:
    """Return SiLU(q k^T + bias) [H, C, L]; bias [C, L] is shared by the heads."""
    return F.silu(torch.einsum("chd,lhd->hcl", q_CHD, k_LHD) + bias)


def hstu_attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_times: Tensor,
    key_times: Tensor,
    pos_weight: Tensor,
    time_weight: Tensor,
    divisor: int,
) -> Tensor:
    """Return the attention output [Lq, H, Dv] of one user's last Lq tokens over all Lk of them.

    q [Lq, H, D]; k [Lk, H, D] and v [Lk, H, Dv] hold the cached tokens followed by the Lq new ones; query_times int64
    [Lq] and key_times int64 [Lk] in ms; pos_weight [max_seq_len] by distance, time_weight [129] by bucket.
    """
    num_queries, num_keys = q.shape[0], k.shape[0]
    rows = torch.arange(num_queries, device=q.device) + (num_keys - num_queries)
    distance = rows[:, None] - torch.arange(num_keys, device=q.device)[None, :]
    bias = pos_weight[distance.clamp(min=0)] + time_weight[pairwise_time_buckets(query_times, key_times)]
    weights = _attend(q, k, bias) * (distance >= 0).to(q.dtype)
    return torch.einsum("hcl,lhd->chd", weights, v) / divisor


def hstu_attention_candidates(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    request_time: Tensor,
    past_times: Tensor,
    pos_weight: Tensor,
    time_weight: Tensor,
    divisor: int,
) -> Tensor:
    """Return the attention output [C, H, Dv] of C candidates that each see the history and themselves (M-FALCON).

    q, k [C, H, D] and v [C, H, Dv] of the candidates; past_k [P, H, D], past_v [P, H, Dv]; request_time int64 [1] and
    past_times int64 [P] in ms. All candidates stand at position P, so they share one row of bias.
    Source: PAPER section 4.
    """
    num_past = past_k.shape[0]
    distance = num_past - torch.arange(num_past, device=q.device)
    bias = pos_weight[distance] + time_weight[pairwise_time_buckets(request_time, past_times)[0]]
    over_history = torch.einsum("hcl,lhd->chd", _attend(q, past_k, bias[None, :]), past_v)
    to_itself = F.silu((q * k).sum(-1, keepdim=True) + (pos_weight[0] + time_weight[0])) * v
    return (over_history + to_itself) / divisor


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    times: Tensor,
    query_times: Tensor,
    pos_weight: Tensor,
    time_weight: Tensor,
    divisor: int,
) -> Tensor:
    """Return causal attention [L, H, Dv] of jagged sequences, one user after the other.

    q, k [L, H, D], v [L, H, Dv]; seq_offsets int64 [B + 1]; times, query_times int64 [L] ms; weights as in
    `hstu_attention_cached`.
    """
    bounds = seq_offsets.tolist()
    outputs = [
        hstu_attention_cached(
            q[start:stop],
            k[start:stop],
            v[start:stop],
            query_times[start:stop],
            times[start:stop],
            pos_weight,
            time_weight,
            divisor,
        )
        for start, stop in itertools.pairwise(bounds)
    ]
    return torch.cat(outputs) if outputs else v.new_zeros((0, *v.shape[1:]))

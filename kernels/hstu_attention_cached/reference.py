"""Cached HSTU attention in plain PyTorch; `attend_new` and `attend_candidates` are what exported graphs are made of.

Invariant: the rows equal those of the whole sequence computed at once.

Legend: P past tokens of a user, L new ones, C candidates, H heads, D / Dv head dims.
Source: PAPER section 4.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.hstu_attention.time_buckets import looked_up, pairwise_time_buckets


def _weights(q_CHD: Tensor, k_LHD: Tensor, bias: Tensor) -> Tensor:
    """Return SiLU(q k^T + bias) [..., H, C, L]; bias [..., C, L] is shared by the heads."""
    products = q_CHD.transpose(-2, -3) @ k_LHD.transpose(-2, -3).transpose(-1, -2)
    return F.silu(products + bias[..., None, :, :])


def _weighted(weights_HCL: Tensor, v_LHD: Tensor) -> Tensor:
    """Return the weighted sums [..., C, H, Dv]."""
    return (weights_HCL @ v_LHD.transpose(-2, -3)).transpose(-2, -3)


def attend_new(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_times: Tensor,
    key_times: Tensor,
    pos_weight: Tensor,
    time_weight: Tensor,
    max_seq_len: int,
    max_attn_len: int = 0,
) -> Tensor:
    """Return the attention [L, H, Dv] of one user's last L tokens over all P + L of them, causal.

    q [L, H, D]; k [P + L, H, D] and v [P + L, H, Dv] hold the past tokens, then the new ones; query_times int64 [L] and
    key_times int64 [P + L] in ms; pos_weight [N] by distance, time_weight [129] by bucket.
    """
    num_queries, num_keys = q.shape[0], k.shape[0]
    rows = torch.arange(num_queries, device=q.device) + (num_keys - num_queries)
    distance = rows[:, None] - torch.arange(num_keys, device=q.device)[None, :]
    sees = distance >= 0
    if max_attn_len:
        sees = sees & (distance <= max_attn_len)
    buckets = pairwise_time_buckets(query_times, key_times)
    bias = looked_up(pos_weight, distance.clamp(min=0)) + looked_up(time_weight, buckets)
    return _weighted(_weights(q, k, bias) * sees.to(q.dtype), v) / max_seq_len


def attend_candidates(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    request_times: Tensor,
    past_times: Tensor,
    pos_weight: Tensor,
    time_weight: Tensor,
    max_seq_len: int,
    max_attn_len: int = 0,
    own_times: Tensor | None = None,
    num_past: Tensor | None = None,
) -> Tensor:
    """Return the attention [C, H, Dv] of C candidates that each see one user's history and themselves (M-FALCON).

    q, k [C, H, D] and v [C, H, Dv] of the candidates; past_k [P, H, D], past_v [P, H, Dv]; past_times int64 [P] and
    request_times int64 [1] (of all) or [C] in ms; own_times int64 [C]: the candidates' times as keys, None where they
    are the request's. All candidates stand behind the past. Several users at once: every argument with a dimension
    more in front, and num_past int64 [B], how many of the P rows are a user's; the others are zero.
    """
    if num_past is None:
        num_past = torch.tensor(past_k.shape[-3], device=q.device)
    distance = (num_past[..., None] - torch.arange(past_k.shape[-3], device=q.device)).clamp(min=0)
    buckets = pairwise_time_buckets(request_times, past_times)
    bias = looked_up(pos_weight, distance)[..., None, :] + looked_up(time_weight, buckets)
    weights = _weights(q, past_k, bias)
    if max_attn_len:
        weights = weights * (distance <= max_attn_len).to(q.dtype)[..., None, None, :]
    over_history = _weighted(weights, past_v)
    own_bias = pos_weight[0] + time_weight[0]
    if own_times is not None:
        apart = request_times - own_times
        own_bucket = pairwise_time_buckets(apart, torch.zeros(1, dtype=torch.int64, device=apart.device))
        own_bias = (pos_weight[0] + time_weight[own_bucket])[..., None]
    to_itself = F.silu((q * k).sum(-1, keepdim=True) + own_bias) * v
    return (over_history + to_itself) / max_seq_len


def past_of(user: int, x: Tensor, offsets: list[int], page_table: Tensor | None) -> Tensor:
    """Return one user's past rows [P, ...] from contiguous rows [sum P, ...] or pages [pages, page, ...]."""
    length = offsets[user + 1] - offsets[user]
    if page_table is None:
        return x[offsets[user] : offsets[user + 1]]
    num_pages = -(-length // x.shape[1])
    return x[page_table[user, :num_pages].long()].flatten(0, 1)[:length]


def hstu_attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    times: Tensor,
    query_times: Tensor,
    num_targets: Tensor | None,
    past_k: Tensor,
    past_v: Tensor,
    past_times: Tensor,
    past_offsets: Tensor,
    page_table: Tensor | None,
    pos_weight: Tensor,
    time_weight: Tensor,
    max_seq_len: int,
    max_attn_len: int = 0,
) -> Tensor:
    """Return the attention [L, H, Dv] of the users' new tokens, one user after the other; see `op.py` for arguments."""
    bounds, past_bounds = seq_offsets.tolist(), past_offsets.tolist()
    targets = [0] * (len(bounds) - 1) if num_targets is None else num_targets.tolist()
    constants = (pos_weight, time_weight, max_seq_len, max_attn_len)
    outputs = [v.new_zeros((0, *v.shape[1:]))]
    for user, m in enumerate(targets):
        new, own = slice(bounds[user], bounds[user + 1] - m), slice(bounds[user + 1] - m, bounds[user + 1])
        seen_k, seen_v, seen_times = (
            torch.cat([past_of(user, past, past_bounds, page_table), x[new]])
            for past, x in ((past_k, k), (past_v, v), (past_times, times))
        )
        outputs.append(attend_new(q[new], seen_k, seen_v, query_times[new], seen_times, *constants))
        if m:
            outputs.append(
                attend_candidates(
                    q[own], k[own], v[own], seen_k, seen_v, query_times[own], seen_times, *constants, times[own]
                )
            )
    return torch.cat(outputs)

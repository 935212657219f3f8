"""HSTU attention in plain PyTorch: obviously right, differentiable, the truth every faster path is held to.

Invariant: a query sees keys at its own position and before, nothing else; `max_seq_len` (N) is a constant of the model.

Legend: L tokens in the batch, B users, H heads, D / Dv head dims, n tokens of one user, h of them history.
Source: PAPER section 2 (equations of the HSTU layer), section 4 (targets).
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.hstu_attention.time_buckets import pairwise_time_buckets


def visible_distance(num_tokens: int, num_targets: int, max_attn_len: int) -> tuple[Tensor, Tensor]:
    """Return which keys each token of one user sees, bool [n, n], and the distances between positions, int64 [n, n].

    The last `num_targets` tokens stand at one position, see the history and themselves; `max_attn_len` bounds the
    distance that is seen (0: no bound).
    """
    history = num_tokens - num_targets
    steps = torch.arange(num_tokens)
    position = steps.clamp(max=history)
    distance = position[:, None] - position[None, :]
    sees = (distance >= 0) & ((steps[None, :] < history) | torch.eye(num_tokens, dtype=torch.bool))
    if max_attn_len:
        sees &= distance <= max_attn_len
    return sees, distance.clamp(min=0)


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    time_weight: Tensor,
    seq_offsets: Tensor,
    times: Tensor,
    query_times: Tensor,
    num_targets: Tensor | None,
    max_seq_len: int,
    max_attn_len: int = 0,
) -> Tensor:
    """Return causal attention [L, H, Dv] of jagged sequences, one user after the other.

    q, k [L, H, D], v [L, H, Dv]; pos_weight [max_seq_len] by distance, time_weight [129] by bucket; seq_offsets int64
    [B + 1]; times, query_times int64 [L] ms; num_targets int64 [B] or None: a user's last tokens
    that are targets.
    """
    bounds = seq_offsets.tolist()
    targets = [0] * (len(bounds) - 1) if num_targets is None else num_targets.tolist()
    outputs = [v.new_zeros((0, *v.shape[1:]))]
    for (start, stop), m in zip(itertools.pairwise(bounds), targets, strict=True):
        user = slice(start, stop)
        sees, distance = (x.to(q.device) for x in visible_distance(stop - start, m, max_attn_len))
        bias = pos_weight[distance] + time_weight[pairwise_time_buckets(query_times[user], times[user])]
        scores = torch.einsum("chd,lhd->hcl", q[user], k[user]) + bias
        outputs.append(torch.einsum("hcl,lhd->chd", F.silu(scores) * sees.to(q.dtype), v[user]))
    return torch.cat(outputs) / max_seq_len

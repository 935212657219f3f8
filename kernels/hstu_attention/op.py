"""The one entry to jagged HSTU attention: per-batch work is done once and shared by the layers.

Invariant: the backends agree; which one runs is never visible in a score beyond rounding.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.hstu_attention import cpu, reference
from kernels.hstu_attention.time_buckets import TIME_THRESHOLDS_MS

Backend = Literal["reference", "cpu"]


@dataclass(frozen=True, slots=True)
class JaggedTimes:
    """Offsets and times of a jagged batch with its time buckets, computed once and used by every layer.

    seq_offsets int64 [B + 1]; times, query_times int64 [L] ms; buckets: int32 [n, n] for each user with n tokens.
    """

    seq_offsets: Tensor
    times: Tensor
    query_times: Tensor
    bounds: list[int]
    buckets: list[Tensor]

    @staticmethod
    def of(seq_offsets: Tensor, times: Tensor, query_times: Tensor) -> "JaggedTimes":
        """Check the offsets and compute the buckets. Raises ValueError naming the argument."""
        bounds = seq_offsets.tolist()
        if (
            not bounds
            or bounds[0] != 0
            or bounds[-1] != len(times)
            or any(a > b for a, b in itertools.pairwise(bounds))
        ):
            raise ValueError(
                f"seq_offsets must rise from 0 to the number of tokens {len(times)}, got {bounds[:3]}..{bounds[-1:]}"
            )
        if times.dtype != torch.int64 or query_times.dtype != torch.int64 or times.shape != query_times.shape:
            raise ValueError("times and query_times must be int64 of one shape, in milliseconds")
        thresholds = torch.tensor(TIME_THRESHOLDS_MS, dtype=torch.int64, device=times.device)
        buckets = []
        for start, stop in itertools.pairwise(bounds):
            difference = (query_times[start:stop, None] - times[None, start:stop]).abs_()
            buckets.append(torch.searchsorted(thresholds, difference, right=True, out_int32=True))
        return JaggedTimes(seq_offsets, times, query_times, bounds, buckets)


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    jagged: JaggedTimes,
    pos_weight: Tensor,
    time_weight: Tensor,
    divisor: int,
    *,
    backend: Backend = "cpu",
) -> Tensor:
    """Return causal attention with rab [L, H, Dv] of q, k [L, H, D] and v [L, H, Dv].

    Raises ValueError if a sequence is longer than `pos_weight` has distances for, or the lengths disagree.
    """
    longest = max((stop - start for start, stop in zip(jagged.bounds, jagged.bounds[1:], strict=False)), default=0)
    if longest > len(pos_weight):
        raise ValueError(
            f"a sequence has {longest} tokens, pos_weight allows {len(pos_weight)}; cut the history to max_events"
        )
    if not len(q) == len(k) == len(v) == len(jagged.times):
        raise ValueError(f"q, k, v have {len(q)}, {len(k)}, {len(v)} tokens, the offsets end at {len(jagged.times)}")
    if backend == "reference":
        return reference.hstu_attention(
            q, k, v, jagged.seq_offsets, jagged.times, jagged.query_times, pos_weight, time_weight, divisor
        )
    return cpu.hstu_attention(q, k, v, jagged.bounds, jagged.buckets, pos_weight, time_weight, divisor)

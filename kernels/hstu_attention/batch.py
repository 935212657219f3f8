"""What the layers of a step share: where the sequences of a jagged batch lie, their times, and the work done once.

Invariant: offsets, times and targets are checked here, once a batch, so the op itself is a pure function of tensors.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import require, require_tensor
from kernels.hstu_attention.tiles import bucket_plan, spans

# Queries a program of the Triton kernels takes; shorter tiles of it are cut from this one.
SCHEDULE_ROWS = 64


@dataclass(frozen=True, slots=True)
class JaggedTimes:
    """A jagged batch of B users and L tokens.

    seq_offsets int64 [B + 1]; times, query_times int64 [L] ms; num_targets int64 [B] or None: how many tokens at each
    user's end are M-FALCON targets; max_uih_len: the longest history in tokens, one row more where targets follow;
    plan: per-batch work, on the CPU the time buckets of every tile (uint8), on a GPU the order of tiles (int32 [T, 2]).
    """

    seq_offsets: Tensor
    times: Tensor
    query_times: Tensor
    num_targets: Tensor | None
    max_uih_len: int
    plan: Tensor

    @staticmethod
    def of(seq_offsets: Tensor, times: Tensor, query_times: Tensor, num_targets: Tensor | None = None) -> "JaggedTimes":
        """Check the batch and do its shared work. Raises ValueError naming the argument."""
        require_tensor("times", times, shape=(None,), dtype=torch.int64)
        require_tensor("query_times", query_times, shape=(len(times),), dtype=torch.int64, like=times)
        bounds = checked_offsets("seq_offsets", seq_offsets, len(times), like=times)
        targets = [0] * (len(bounds) - 1)
        if num_targets is not None:
            require_tensor("num_targets", num_targets, shape=(len(bounds) - 1,), dtype=torch.int64, like=times)
            targets = num_targets.tolist()
            for user, (length, m) in enumerate(zip(_lengths(bounds), targets, strict=True)):
                require(0 <= m <= length, f"num_targets[{user}]", m, f"between 0 and the user's {length} tokens")
        longest = max((n - m + (m > 0) for n, m in zip(_lengths(bounds), targets, strict=True)), default=0)
        if times.is_cuda:
            plan = schedule(bounds, targets).to(times.device)
        else:
            plan = bucket_plan(spans(bounds, targets), times, query_times)
        return JaggedTimes(seq_offsets, times, query_times, num_targets, longest, plan)


def _lengths(bounds: list[int]) -> list[int]:
    return [stop - start for start, stop in itertools.pairwise(bounds)]


def checked_offsets(argument: str, offsets: Tensor, total: int, *, like: Tensor) -> list[int]:
    """Return offsets as Python integers. Raises ValueError unless int64 [B + 1], from 0 to `total`, not decreasing."""
    require_tensor(argument, offsets, shape=(None,), dtype=torch.int64, like=like)
    bounds: list[int] = offsets.tolist()
    shown = f"{bounds[:3]}..{bounds[-1:]}"
    require(bool(bounds) and bounds[0] == 0, argument, shown, "int64 starting at 0")
    require(bounds[-1] == total, argument, shown, f"ending at the number of tokens, {total}")
    require(all(a <= b for a, b in itertools.pairwise(bounds)), argument, shown, "nowhere decreasing")
    return bounds


def schedule(bounds: list[int], num_targets: list[int], num_past: list[int] | None = None) -> Tensor:
    """Return (user, first row) int32 [T, 2] of all blocks of SCHEDULE_ROWS queries, those with most keys first.

    num_past: keys that each user's rows all see beside their own, from a cache.

    A GPU starts programs in order, so long blocks first leave short ones to fill the gaps at the end.
    """
    tiles = []
    past = num_past or [0] * len(num_targets)
    for user, (length, m, seen) in enumerate(zip(_lengths(bounds), num_targets, past, strict=True)):
        for first in range(0, length, SCHEDULE_ROWS):
            tiles.append((seen + min(first + SCHEDULE_ROWS, length - m), user, first))
    tiles.sort(key=lambda tile: (-tile[0], tile[1], tile[2]))
    return torch.tensor([tile[1:] for tile in tiles], dtype=torch.int32).view(-1, 2)

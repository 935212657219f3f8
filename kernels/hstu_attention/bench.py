"""Time and memory of HSTU attention on this machine, against padded eager attention and a loop over users.

Invariant: every variant computes the same function, both biases included, and is compared with the reference before it
is timed.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.hstu_attention import reference
from kernels.hstu_attention.op import JaggedTimes, hstu_attention
from kernels.hstu_attention.time_buckets import NUM_TIME_BUCKETS, TIME_THRESHOLDS_MS

NUM_USERS, NUM_HEADS, HEAD_DIM, MAX_LENGTH = 32, 4, 32, 1024
REPEATS = 3
Attention = Callable[[list[Tensor], JaggedTimes], Tensor]


def _padded(leaves: list[Tensor], jagged: JaggedTimes) -> Tensor:
    """Return attention with all users padded to the longest: the [B, H, n, n] tensors that fusing avoids."""
    q, k, v, pos_weight, time_weight = leaves
    lengths = jagged.seq_offsets.diff()
    longest = int(lengths.max())
    valid = torch.arange(longest)[None, :] < lengths[:, None]

    def pad(values: Tensor) -> Tensor:
        out = values.new_zeros(len(lengths), longest, *values.shape[1:])
        return out.index_put((valid,), values)

    times, query_times = pad(jagged.times), pad(jagged.query_times)
    difference = (query_times[:, :, None] - times[:, None, :]).abs()
    buckets = torch.searchsorted(torch.tensor(TIME_THRESHOLDS_MS), difference, right=True)
    distance = (torch.arange(longest)[:, None] - torch.arange(longest)[None, :]).clamp(min=0)
    bias = (pos_weight[distance] + time_weight[buckets])[:, None]
    weights = F.silu(torch.einsum("bchd,blhd->bhcl", pad(q), pad(k)) + bias).tril() / MAX_LENGTH
    return torch.einsum("bhcl,blhd->bchd", weights, pad(v))[valid]


def _loop(leaves: list[Tensor], jagged: JaggedTimes) -> Tensor:
    q, k, v, *weights = leaves
    return reference.hstu_attention(
        q, k, v, jagged.seq_offsets, jagged.times, jagged.query_times, weights[0], weights[1], MAX_LENGTH
    )


def _ours(leaves: list[Tensor], jagged: JaggedTimes) -> Tensor:
    fresh = JaggedTimes.of(jagged.seq_offsets, jagged.times, jagged.query_times)
    q, k, v, *weights = leaves
    return hstu_attention(q, k, v, fresh, weights[0], weights[1], MAX_LENGTH)


def _inputs() -> tuple[list[Tensor], JaggedTimes]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(MAX_LENGTH // 8, MAX_LENGTH + 1, (NUM_USERS,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(offsets[-1])
    times = torch.randint(0, 10**7, (total,), generator=generator).cumsum(0)
    shapes = [(total, NUM_HEADS, HEAD_DIM)] * 3 + [(MAX_LENGTH,), (NUM_TIME_BUCKETS,)]
    leaves = [torch.randn(*shape, generator=generator).mul_(0.3).requires_grad_() for shape in shapes]
    return leaves, JaggedTimes.of(offsets, times, times)


def _best_ms(attention: Attention, leaves: list[Tensor], jagged: JaggedTimes) -> tuple[float, float]:
    """Return the best forward and backward milliseconds of REPEATS runs."""
    forward, backward = [], []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        out = attention(leaves, jagged)
        middle = time.perf_counter()
        torch.autograd.grad(out.sum(), leaves)
        forward.append(middle - begin)
        backward.append(time.perf_counter() - middle)
    return 1e3 * min(forward), 1e3 * min(backward)


def _peak_gflops() -> float:
    """Return what `torch.mm` reaches on this machine with the current number of threads."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begin)
    return 2 * 1024**3 / min(seconds) / 1e9


def run(num_threads: int) -> list[dict[str, Any]]:
    """Return rows {name, value, unit, against, target}: ratios of this run, then the milliseconds behind them."""
    torch.set_num_threads(num_threads)
    leaves, jagged = _inputs()
    expected = _loop(leaves, jagged).detach()
    variants: dict[str, Attention] = {"padded eager": _padded, "loop over users": _loop, "ours": _ours}
    for name, attention in variants.items():
        if not torch.allclose(attention(leaves, jagged), expected, atol=1e-5 * float(expected.abs().max())):
            raise RuntimeError(f"{name} disagrees with the reference; its time would mean nothing")
    best = {name: _best_ms(attention, leaves, jagged) for name, attention in variants.items()}
    # Useful work: two products over the lower triangle.
    pairs = sum((b - a) * (b - a + 1) // 2 for a, b in itertools.pairwise(jagged.bounds))
    useful_gflop = 4 * pairs * NUM_HEADS * HEAD_DIM / 1e9
    share = 100 * useful_gflop / (best["ours"][0] / 1e3) / _peak_gflops()
    ratios = [
        ("attention forward, padded eager / ours", best["padded eager"][0] / best["ours"][0], 15.0),
        ("attention forward, loop over users / ours", best["loop over users"][0] / best["ours"][0], 1.7),
        ("attention backward, padded eager / ours", best["padded eager"][1] / best["ours"][1], 8.0),
        ("attention backward, loop over users / ours", best["loop over users"][1] / best["ours"][1], 1.7),
    ]
    rows = [{"name": n, "value": v, "unit": "x", "against": "same run", "target": t} for n, v, t in ratios]
    rows.append(
        {"name": "forward, share of torch.mm peak", "value": share, "unit": "%", "against": "torch.mm", "target": 22.0}
    )
    for name, (forward, backward) in best.items():
        for label, value in (("forward", forward), ("backward", backward)):
            rows.append({"name": f"{label}, {name}", "value": value, "unit": "ms", "against": None, "target": None})
    return rows

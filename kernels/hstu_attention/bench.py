"""Time and memory of HSTU attention on this machine, against padded eager attention and a loop over users.

Invariant: every variant computes the same function, both biases and the time buckets included, and is compared with the
reference before it is timed; the rounds of the variants alternate, so a slow moment of the machine hits all.
"""

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.hstu_attention.batch import JaggedTimes
from kernels.hstu_attention.op import hstu_attention
from kernels.hstu_attention.time_buckets import NUM_TIME_BUCKETS, TIME_THRESHOLDS_MS

NUM_USERS, NUM_HEADS, HEAD_DIM, MAX_LENGTH = 32, 4, 32, 1024
ROUNDS = 4
# Length -> rounds of batches in which all users have it, for the plot of docs/kernels.md.
LENGTHS = {128: 16, 256: 8, 512: 4, 1024: 2}
SHAPE = "lengths to 1,024, 32 users, 4 heads, d 32"
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
    """Return attention user by user with dense masks: what one writes first."""
    q, k, v, *weights = leaves
    return hstu_attention(q, k, v, jagged, weights[0], weights[1], MAX_LENGTH, backend="reference")


def _ours(leaves: list[Tensor], jagged: JaggedTimes) -> Tensor:
    fresh = JaggedTimes.of(jagged.seq_offsets, jagged.times, jagged.query_times)
    q, k, v, *weights = leaves
    return hstu_attention(q, k, v, fresh, weights[0], weights[1], MAX_LENGTH, backend="cpu")


VARIANTS: dict[str, Attention] = {"padded eager": _padded, "loop over users": _loop, "ours": _ours}


def inputs(num_users: int, longest: int, shortest: int) -> tuple[list[Tensor], JaggedTimes]:
    """Return q, k, v and both weights with gradients, and a batch of lengths drawn from shortest..longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (num_users,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(offsets[-1])
    times = torch.randint(0, 10**7, (total,), generator=generator).cumsum(0)
    shapes = [(total, NUM_HEADS, HEAD_DIM)] * 3 + [(MAX_LENGTH,), (NUM_TIME_BUCKETS,)]
    leaves = [torch.randn(*shape, generator=generator).mul_(0.3).requires_grad_() for shape in shapes]
    return leaves, JaggedTimes.of(offsets, times, times)


def best_ms(
    variants: dict[str, Attention], leaves: list[Tensor], jagged: JaggedTimes, rounds: int
) -> dict[str, tuple[float, float]]:
    """Return each variant's best forward and backward milliseconds of `rounds` alternating rounds of two runs."""
    expected = _loop(leaves, jagged).detach()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(rounds):
        # Twice each: the second run does not meet caches and pages that another variant left.
        for name, attention in ((name, variants[name]) for name in variants for _ in range(2)):
            begin = time.perf_counter()
            out = attention(leaves, jagged)
            middle = time.perf_counter()
            torch.autograd.grad(out.sum(), leaves)
            times[name].append((1e3 * (middle - begin), 1e3 * (time.perf_counter() - middle)))
            if not torch.allclose(out, expected, atol=1e-5 * float(expected.abs().max())):
                raise RuntimeError(f"{name} disagrees with the reference; its time would mean nothing")
    return {name: (min(f for f, _ in taken), min(b for _, b in taken)) for name, taken in times.items()}


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 1e6


def extra_memory_mb(attention: Attention, leaves: list[Tensor], jagged: JaggedTimes) -> float:
    """Return how far resident memory rises above its start during a forward and backward, results excluded.

    A small batch runs first: the buffers that the libraries make at their first call are not the attention's.
    """
    small, small_jagged = inputs(2, 64, 32)
    torch.autograd.grad(attention(small, small_jagged).sum(), small)
    done, peak, begin = threading.Event(), [0.0], _resident_mb()

    def watch() -> None:
        while not done.wait(0.0005):
            peak[0] = max(peak[0], _resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    out = attention(leaves, jagged)
    grads = torch.autograd.grad(out.sum(), leaves)
    done.set()
    watcher.join()
    results = sum(x.numel() * x.element_size() for x in (out, *grads)) / 1e6
    return max(0.0, peak[0] - begin - results)


def peak_gflops() -> float:
    """Return what `torch.mm` reaches on this machine with the current number of threads."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begin)
    return 2 * 1024**3 / min(seconds) / 1e9


def rows() -> list[dict[str, Any]]:
    """Return rows {name, value, unit, against, target}: ratios of this run, then the milliseconds behind them."""
    leaves, jagged = inputs(NUM_USERS, MAX_LENGTH, MAX_LENGTH // 8)
    memory = extra_memory_mb(_ours, leaves, jagged)
    best = best_ms(VARIANTS, leaves, jagged, ROUNDS)
    # Useful work: two products over the lower triangle.
    bounds = jagged.seq_offsets.tolist()
    pairs = sum((b - a) * (b - a + 1) // 2 for a, b in itertools.pairwise(bounds))
    useful_gflop = 4 * pairs * NUM_HEADS * HEAD_DIM / 1e9
    share = 100 * useful_gflop / (best["ours"][0] / 1e3) / peak_gflops()
    (padded_f, padded_b), (loop_f, loop_b), (ours_f, ours_b) = (best[name] for name in VARIANTS)
    ratios = [
        (f"attention forward, {SHAPE}: padded eager / ours", padded_f / ours_f, 15.0),
        ("the same, loop over users / ours", loop_f / ours_f, 1.7),
        ("attention backward: padded eager / ours", padded_b / ours_b, 8.0),
        ("attention backward: loop / ours", loop_b / ours_b, 1.7),
    ]
    found: list[dict[str, Any]] = [
        {"name": n, "value": v, "unit": "x", "against": "same run", "target": t} for n, v, t in ratios
    ]
    found.append(
        {"name": "extra memory, MB", "value": memory, "unit": "MB", "against": None, "target": 100.0, "at_most": True}
    )
    name = "forward, share of `torch.mm` peak on useful FLOPs"
    found.append({"name": name, "value": share, "unit": "%", "against": "torch.mm", "target": 22.0})
    found += _milliseconds(best, "")
    for length, rounds in LENGTHS.items():
        alike = inputs(NUM_USERS, length, length)
        found += _milliseconds(best_ms(VARIANTS, *alike, rounds), f", {NUM_USERS} users of {length}")
    return found


def _milliseconds(best: dict[str, tuple[float, float]], batch: str) -> list[dict[str, Any]]:
    return [
        {"name": f"{label}, {name}{batch}", "value": value, "unit": "ms", "against": None, "target": None}
        for name, both in best.items()
        for label, value in zip(("forward", "backward"), both, strict=True)
    ]

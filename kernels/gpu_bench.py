"""Time of HSTU attention on a GPU against eager, torch.compile and SDPA of the same shape, forward and backward.

Invariant: eager and compiled compute our function, biases and time buckets included, and are compared with it before
anything is timed. SDPA is softmax attention without a bias: the fastest attention of that shape that PyTorch has.

Legend: B users of n tokens each, H heads, D head dim; padded tensors are [B, H, n, D].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.hstu_attention import NUM_TIME_BUCKETS, TIME_THRESHOLDS_MS, JaggedTimes, hstu_attention
from kernels.roofline import TRAINING, TRAINING_LABEL, Shape

Attention = Callable[[], Tensor]
# Largest disagreement of 16 bit results, as a share of the largest element.
TOLERANCE = 2e-2


def inputs(shape: Shape, device: str, dtype: torch.dtype) -> tuple[list[Tensor], JaggedTimes]:
    """Return q, k, v [L, H, D] and both bias weights, all with gradients, and the batch."""
    generator = torch.Generator().manual_seed(0)
    total = shape.tokens
    sizes = [(total, shape.heads, dim) for dim in (shape.qk_dim, shape.qk_dim, shape.v_dim)]
    leaves = [torch.randn(*size, generator=generator).mul(0.3).to(device, dtype) for size in sizes]
    leaves += [torch.randn(n, generator=generator).mul(0.3).to(device) for n in (shape.history, NUM_TIME_BUCKETS)]
    times = torch.randint(0, 10**7, (total,), generator=generator).cumsum(0).to(device)
    offsets = torch.arange(0, total + 1, shape.history, device=device)
    return [leaf.requires_grad_() for leaf in leaves], JaggedTimes.of(offsets, times, times)


def padded(leaves: list[Tensor], jagged: JaggedTimes, shape: Shape, thresholds: Tensor) -> Tensor:
    """Return attention [L, H, D] by dense products: the [B, H, n, n] tensors that fusing avoids."""
    q, k, v = (_heads_first(x, shape) for x in leaves[:3])
    pos_weight, time_weight = leaves[3:]
    times = jagged.times.view(shape.num_users, -1)
    buckets = torch.searchsorted(thresholds, (times[:, :, None] - times[:, None, :]).abs(), right=True)
    steps = torch.arange(shape.history, device=q.device)
    distance = (steps[:, None] - steps[None, :]).clamp(min=0)
    bias = (pos_weight[distance] + time_weight[buckets])[:, None].to(q.dtype)
    weights = F.silu(q @ k.transpose(2, 3) + bias).tril() / shape.history
    return (weights @ v).transpose(1, 2).reshape(leaves[2].shape)


def _heads_first(x: Tensor, shape: Shape) -> Tensor:
    return x.view(shape.num_users, shape.history, *x.shape[1:]).transpose(1, 2)


def variants(shape: Shape, leaves: list[Tensor], jagged: JaggedTimes) -> dict[str, Attention]:
    """Return what is timed, name -> forward: ours first, then what computes the same, then SDPA."""
    thresholds = torch.tensor(TIME_THRESHOLDS_MS, device=jagged.times.device)
    compiled = torch.compile(padded, fullgraph=True, dynamic=False)
    q, k, v, pos_weight, time_weight = leaves

    def softmax() -> Tensor:
        heads = [_heads_first(x, shape) for x in (q, k, v)]
        return (
            F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
            .transpose(1, 2)
            .reshape(v.shape)
        )

    return {
        "ours": lambda: hstu_attention(q, k, v, jagged, pos_weight, time_weight, shape.history),
        "eager": lambda: padded(leaves, jagged, shape, thresholds),
        "torch.compile": lambda: compiled(leaves, jagged, shape, thresholds),
        "SDPA (softmax, no bias)": softmax,
    }


def check(found: dict[str, Attention]) -> None:
    """Raise RuntimeError if a variant that computes our function disagrees with it."""
    expected = found["ours"]().detach().float()
    for name in ("eager", "torch.compile"):
        difference = (found[name]().detach().float() - expected).abs().max()
        if difference > TOLERANCE * expected.abs().max():
            raise RuntimeError(f"{name} disagrees with ours by {difference:g}; its time would mean nothing")


def rows(shape: Shape = TRAINING, label: str = TRAINING_LABEL) -> list[dict[str, Any]]:
    """Return benchmark rows of this GPU in bf16: milliseconds and their ratio to ours. Needs a GPU."""
    from triton.testing import do_bench

    leaves, jagged = inputs(shape, "cuda", torch.bfloat16)
    found = variants(shape, leaves, jagged)
    check(found)
    gpu, taken = torch.cuda.get_device_name(), {}
    for name, attention in found.items():
        wanted = leaves[:3] if name.startswith("SDPA") else leaves

        # Together, because a compiled graph cannot be kept for a second backward.
        def both(attention: Attention = attention, wanted: list[Tensor] = wanted) -> None:
            torch.autograd.grad(attention().sum(), wanted)

        taken[name] = {"forward": do_bench(attention), "forward + backward": do_bench(both)}
    lines: list[dict[str, Any]] = []
    for direction in ("forward", "forward + backward"):
        for name, times in taken.items():
            row = {"name": f"attention {direction}, {label}: {name}", "value": times[direction], "unit": "ms"}
            ratio = times[direction] / taken["ours"][direction]
            lines.append(row | {"against": f"{ratio:.2f} x ours, {gpu}", "target": None})
    return lines

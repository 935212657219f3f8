"""What a layer keeps for its backward, HSTU against a softmax Transformer, and the time of its two halves.

Invariant: bytes are those of the storages that autograd holds, each once, parameters aside, as one more layer adds
them: what the layers of a batch share is left out. Every timed variant is compared with ours before it is timed.

Legend: L tokens, d width, 4 heads of d / 4 for q, k and v alike (h d_qk = h d_v = d, the paper's case).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.dropout import keep_mask
from kernels.hstu_attention import NUM_TIME_BUCKETS, JaggedTimes, hstu_attention
from kernels.norm_gate.op import hash_dropout, norm_gate, norm_gate_linear
from kernels.uvqk import uvqk

NUM_HEADS, DROPOUT, EPS = 4, 0.2, 1e-6
NUM_TOKENS, WIDTH = 256, 256
PAPER_HSTU, PAPER_TRANSFORMER = 14.0, 33.0
# An ML-1M batch of 128 users, at the widths of its two recipes.
STEP_TOKENS, STEP_WIDTHS = 13_900, (50, 400)
REPEATS = 7
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Work = Callable[[], Tensor]


class _HSTULayer(nn.Module):
    """The layer from our ops; `fused` also takes the output projection into the gate."""

    def __init__(self, width: int, num_tokens: int, attention: Attention, fused: bool) -> None:
        super().__init__()
        self.attention, self.fused = attention, fused
        self.uvqk = nn.Parameter(torch.randn(width, 4 * width) * 0.02)
        self.output = nn.Linear(width, width)
        self.pos_weight, self.time_weight = (nn.Parameter(torch.zeros(size)) for size in (num_tokens, NUM_TIME_BUCKETS))

    def forward(self, x: Tensor, seed: Tensor) -> Tensor:
        u, *vqk = uvqk(x, self.uvqk).chunk(4, dim=1)
        v, q, k = (part.unflatten(-1, (NUM_HEADS, -1)) for part in vqk)
        attended = self.attention(q, k, v, self.pos_weight, self.time_weight).flatten(1)
        if self.fused:
            weight, bias = self.output.weight, self.output.bias
            return norm_gate_linear(attended, u, weight, bias, x, dropout=DROPOUT, seed=seed)
        return x + self.output(norm_gate(attended, u, dropout=DROPOUT, seed=seed))


class _TransformerLayer(nn.Module):
    """A plain pre-LN layer: causal SDPA, feed-forward of 4 d with GELU, dropout after both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, seed: Tensor) -> Tensor:
        # native_dropout keeps a mask of one byte an element, as on a GPU; F.dropout on the CPU keeps one of x's type.
        def drop(y: Tensor) -> Tensor:
            return torch.native_dropout(y, DROPOUT, True)[0]

        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, NUM_HEADS, -1)).permute(1, 2, 0, 3).unbind()
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        x = x + drop(self.output(attended.transpose(0, 1).flatten(1)))
        return x + drop(self.down(F.gelu(self.up(self.norms[1](x)))))


def _saved_bytes(layers: Sequence[nn.Module], x: Tensor) -> int:
    """Return the bytes of all storages that a forward through the layers holds for its backward."""
    own = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
    held: dict[int, Tensor] = {}

    def pack(saved: Tensor) -> Tensor:
        if saved.untyped_storage().data_ptr() not in own:
            held[saved.untyped_storage().data_ptr()] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        for index, layer in enumerate(layers):
            x = layer(x, torch.tensor([index]))
    return sum(saved.untyped_storage().nbytes() for saved in held.values())


def _one_layer_adds(make: Callable[[], nn.Module], dtype: torch.dtype, num_tokens: int, width: int) -> float:
    """Return the bytes a token that one more layer keeps, as if an element had 2, over d."""
    x = torch.randn(num_tokens, width, dtype=dtype, requires_grad=True)
    layers = [make().to(dtype) for _ in range(3)]
    added = _saved_bytes(layers, x) - _saved_bytes(layers[:2], x)
    return added / num_tokens / width * 2 / dtype.itemsize


def activation_bytes(
    *,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    num_tokens: int = NUM_TOKENS,
    width: int = WIDTH,
    attention: Attention | None = None,
) -> list[dict[str, Any]]:
    """Return rows {name, value, unit, against, target}: bytes a token and layer over d, as if of bf16.

    attention: called with q, k, v, pos_weight and time_weight; kernels.hstu_attention unless given.
    """
    if attention is None:
        times = torch.arange(num_tokens) * 60_000
        jagged = JaggedTimes.of(torch.tensor([0, num_tokens]), times, times)

        def attention(q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, time_weight: Tensor) -> Tensor:
            return hstu_attention(q, k, v, jagged, pos_weight, time_weight, num_tokens)

    variants: dict[str, tuple[Callable[[], nn.Module], float | None, float | None]] = {
        "HSTU layer": (lambda: _HSTULayer(width, num_tokens, attention, True), PAPER_HSTU, PAPER_HSTU),
        "HSTU layer, gated rows saved": (lambda: _HSTULayer(width, num_tokens, attention, False), PAPER_HSTU, None),
        "Transformer layer": (lambda: _TransformerLayer(width), PAPER_TRANSFORMER, None),
    }
    return [
        {
            "name": f"activations, {name}, {str(dtype).removeprefix('torch.')}",
            "value": _one_layer_adds(make, dtype, num_tokens, width),
            "unit": "d bytes a token",
            "against": f"paper: {paper:g} d",
            "target": target,
            "at_most": True,
        }
        for dtype in dtypes
        for name, (make, paper, target) in variants.items()
    ]


def _best_ms(variants: dict[str, Work], leaves: list[Tensor], grad: Tensor) -> dict[str, float]:
    """Return the best milliseconds of forward and backward, the variants taking turns."""
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(REPEATS):
        for name, work in variants.items():
            begin = time.perf_counter()
            torch.autograd.grad(work(), leaves, grad)
            best[name] = min(best[name], 1e3 * (time.perf_counter() - begin))
    return best


def _same(ours: Tensor, other: Tensor, name: str) -> None:
    if not torch.allclose(ours, other, atol=1e-4 * float(other.abs().max())):
        raise RuntimeError(f"{name} disagrees with plain PyTorch; its time would mean nothing")


def _halves(width: int) -> list[tuple[str, Work, Work, list[Tensor]]]:
    """Return (name, eager, ours, leaves) of the layer's parts, dropout included where the layer has it."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    x, attended, wide = leaf(STEP_TOKENS, width), leaf(STEP_TOKENS, width), leaf(STEP_TOKENS, 4 * width)
    weight, out_weight, bias = leaf(width, 4 * width), leaf(width, width), leaf(width)
    seed, u = torch.tensor([1]), wide[:, :width]

    def normed(y: Tensor) -> Tensor:
        return F.layer_norm(y, (width,), eps=EPS)

    def gated(keep: Callable[[Tensor], Tensor]) -> Tensor:
        return keep(normed(attended) * u)

    def projected(keep: Callable[[Tensor], Tensor]) -> Tensor:
        return x + F.linear(gated(keep), out_weight, bias)

    def dropped(y: Tensor) -> Tensor:
        return F.dropout(y, DROPOUT)

    def hashed(y: Tensor) -> Tensor:
        return y * keep_mask(seed, STEP_TOKENS, width, DROPOUT) / (1 - DROPOUT)

    def our_gated() -> Tensor:
        return norm_gate(attended, u, dropout=DROPOUT, seed=seed)

    def our_projected() -> Tensor:
        return norm_gate_linear(attended, u, out_weight, bias, x, dropout=DROPOUT, seed=seed)

    def projection() -> Tensor:
        return F.silu(normed(x) @ weight)

    with torch.no_grad():
        _same(our_gated(), gated(hashed), "norm_gate")
        _same(our_projected(), projected(hashed), "norm_gate_linear")
        _same(uvqk(x, weight), projection(), "uvqk")
        _same(hash_dropout(x, DROPOUT, seed), hashed(x), "hash_dropout")
    return [
        ("uvqk", projection, lambda: uvqk(x, weight), [x, weight]),
        ("norm_gate", lambda: gated(dropped), our_gated, [attended, wide]),
        ("norm_gate_linear", lambda: projected(dropped), our_projected, [attended, wide, out_weight, bias, x]),
        ("hash_dropout", lambda: dropped(x), lambda: hash_dropout(x, DROPOUT, seed), [x]),
    ]


def run(num_threads: int) -> list[dict[str, Any]]:
    """Return rows {name, value, unit, against, target}: eager over ours, both passes, then milliseconds."""
    torch.set_num_threads(num_threads)
    ratios, times = [], []
    for width in STEP_WIDTHS:
        for part, eager, ours, leaves in _halves(width):
            name = f"{part}, {STEP_TOKENS:,} tokens, width {width}"
            best = _best_ms({"eager": eager, "ours": ours}, leaves, torch.ones_like(ours()))
            row = {"name": f"{name}, eager / ours", "value": best["eager"] / best["ours"], "unit": "x"}
            ratios.append({**row, "against": "same run", "target": None if part == "uvqk" else 1.0})
            for variant, value in best.items():
                times.append(
                    {"name": f"{name}, {variant}", "value": value, "unit": "ms", "against": None, "target": None}
                )
    return ratios + times

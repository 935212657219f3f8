"""How long each kernel should take on a GPU that is not here: FLOPs, instructions and bytes over the GPU's peaks.

Invariant: every row is a prediction, and says so; shapes, peaks and assumptions are data in this file. A kernel takes
the longer of its arithmetic and its memory traffic. Arithmetic is the time on the tensor cores plus that on the other
units: a program alternates between them, and no overlap is counted on. Launches (some 5 us each) are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

BF16, FP32 = 2, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Peaks of one GPU: dense bf16 TFLOP/s, 10^12 instructions/s of fp32 and of special units, GB/s of memory."""

    name: str
    tensor_tflops: float
    core_tips: float
    special_tips: float
    memory_gbs: float
    source: str


# Instructions: half the data sheet's fp32 FLOP/s. Special units (exp2, reciprocal, conversions of int64) take 16 a
# clock and multiprocessor, beside 64 (A100) and 128 (H100) of fp32: CUDA C++ Programming Guide, arithmetic throughput.
GPUS = (
    Gpu(
        name="A100 SXM 80GB",
        tensor_tflops=312,
        core_tips=19.5 / 2,
        special_tips=19.5 / 2 / 4,
        memory_gbs=2039,
        source="NVIDIA A100 data sheet, June 2021: 312 bf16, 19.5 fp32, 2,039 GB/s",
    ),
    Gpu(
        name="H100 SXM",
        tensor_tflops=989.4,
        core_tips=66.9 / 2,
        special_tips=66.9 / 2 / 8,
        memory_gbs=3350,
        source="NVIDIA H100 architecture white paper: 989.4 bf16 without sparsity, 66.9 fp32; data sheet: 3.35 TB/s",
    ),
    Gpu(
        name="H200",
        tensor_tflops=989.4,
        core_tips=66.9 / 2,
        special_tips=66.9 / 2 / 8,
        memory_gbs=4800,
        source="NVIDIA H200 data sheet: the arithmetic of the H100 SXM, 4.8 TB/s",
    ),
)

Kind = Literal["attention", "gemm", "rows"]
# Shares of the peaks that are reached.
TENSOR_EFFICIENCY: dict[Kind, float] = {
    # Triton's own fused attention reaches 329 to 477 of 989 TFLOP/s on an H100 (head dim 128, lengths 512 to 16 k):
    # github.com/pytorch/benchmark, pull request 2391.
    "attention": 0.40,
    # Assumed: large bf16 products of cuBLAS and Triton.
    "gemm": 0.65,
    "rows": 0.40,
}
# Assumed: issue slots lost to latency at two to three blocks a multiprocessor, and to power limits of the clock.
CORE_EFFICIENCY = 0.60
# Assumed: streams of whole rows.
MEMORY_EFFICIENCY = 0.80

# Instructions a pair and head, and those of them for special units, by head dim. Source: the sm_90 machine code of the
# bf16 kernels at the tilings that are launched; the inner loop of a tile, divided by the pairs of it that a thread
# holds. One int64 to float conversion a pair finds the bucket, exp2 and reciprocal make the sigmoid. Tiles on the
# diagonal count as their visible half, so short sequences are flattered.
# Backward of rab: the loop over heads is 45 (d 64 and 128); what 4 heads share is 91 and 77 for bucket, bias and
# mask plus 15 and 11 for each bucket number of the tile, taken as 6 (5 to 6.5 in causal 32 x 32 tiles of 1,024 tokens
# with uniform, log-normal and session-like gaps).
# Without rab: the forward compiled with its bucket and bias lines removed, what a kernel without rab would pay.
PAIR_INSTRUCTIONS: dict[str, dict[int, tuple[float, float]]] = {
    "forward": {64: (75.5, 3), 128: (82.2, 3)},
    "forward without rab": {64: (28.8, 2), 128: (32.9, 2)},
    "cached": {64: (78.6, 3), 128: (92.6, 3)},
    "backward of k, v": {64: (79.1, 3), 128: (106.4, 3)},
    "backward of q": {64: (77.8, 3), 128: (102.2, 3)},
    "backward of rab": {64: (89.7, 2.25), 128: (80.7, 2.25)},
}


def pair_instructions(part: str, shape: "Shape") -> tuple[float, float]:
    """Return instructions a pair and head of one attention kernel, all and special ones, for the shape's head dims."""
    return PAIR_INSTRUCTIONS[part][64 if max(shape.qk_dim, shape.v_dim) <= 64 else 128]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a kernel does: FLOPs on tensor cores, instructions on the other units, bytes to and from memory."""

    name: str
    kind: Kind
    tensor_flops: float = 0.0
    core_instructions: float = 0.0
    special_instructions: float = 0.0
    memory_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            name=self.name,
            kind=self.kind,
            tensor_flops=self.tensor_flops + other.tensor_flops,
            core_instructions=self.core_instructions + other.core_instructions,
            special_instructions=self.special_instructions + other.special_instructions,
            memory_bytes=self.memory_bytes + other.memory_bytes,
        )


def parts_ms(work: Work, gpu: Gpu) -> dict[str, float]:
    """Return the predicted milliseconds on tensor cores, other cores and memory."""
    core = max(work.core_instructions / gpu.core_tips, work.special_instructions / gpu.special_tips)
    return {
        "tensor": work.tensor_flops / (gpu.tensor_tflops * TENSOR_EFFICIENCY[work.kind]) / 1e9,
        "cores": core / CORE_EFFICIENCY / 1e9,
        "memory": work.memory_bytes / (gpu.memory_gbs * MEMORY_EFFICIENCY) / 1e6,
    }


def predicted_ms(work: Work, gpu: Gpu) -> float:
    """Return the longer of arithmetic and memory traffic in milliseconds."""
    parts = parts_ms(work, gpu)
    return max(parts["tensor"] + parts["cores"], parts["memory"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A batch of users with equal histories, and one layer of a model."""

    num_users: int
    history: int
    num_targets: int
    heads: int
    qk_dim: int
    v_dim: int
    model_dim: int

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.num_users * (self.history + self.num_targets)

    @property
    def pairs(self) -> int:
        """Query and key pairs of the batch: the causal half of the history, and targets with history and themselves."""
        n, m = self.history, self.num_targets
        return self.num_users * (n * (n + 1) // 2 + m * (n + 1))


# The measurement that the authors of the method give for their own kernels; not repeated by us. Lengths are dense.
PUBLIC = Shape(num_users=32, history=1024, num_targets=2048, heads=4, qk_dim=128, v_dim=128, model_dim=512)
PUBLIC_LAYERS, PUBLIC_MEASURED_MS = 5, 9.30
TRAINING = Shape(num_users=32, history=1024, num_targets=0, heads=4, qk_dim=64, v_dim=64, model_dim=256)
NUM_ITEMS, NUM_NEGATIVES, TOUCHED_ROWS = 1_000_000, 128, 1_000_000


def _attention(shape: Shape, name: str, part: str, products: tuple[int, int], tensors: tuple[int, int]) -> Work:
    """Work of one attention kernel; products and tensors: how many of width qk_dim and v_dim (read and written)."""
    pairs = shape.pairs * shape.heads
    core, special = pair_instructions(part, shape)
    product_width, tensor_width = (n[0] * shape.qk_dim + n[1] * shape.v_dim for n in (products, tensors))
    return Work(
        name=name,
        kind="attention",
        tensor_flops=2.0 * pairs * product_width,
        core_instructions=float(pairs * core),
        special_instructions=float(pairs * special),
        # Both times of a token are int64; keys and values that programs of a user share come from the cache.
        memory_bytes=float(shape.tokens * (shape.heads * tensor_width * BF16 + 16)),
    )


def attention_forward(shape: Shape, *, with_rab: bool = True) -> Work:
    """Q K^T and P V; without rab: a kernel that we do not have, to see what rab costs."""
    part = "forward" if with_rab else "forward without rab"
    return _attention(shape, f"hstu_attention {part}", part, (1, 1), (2, 2))


def attention_backward(shape: Shape) -> Work:
    """Three deterministic kernels, each with Q K^T and dO V^T again: dK and dV (4 products), dQ (3), rab (2)."""
    name = "hstu_attention backward"
    return (
        _attention(shape, name, "backward of k, v", (2, 2), (3, 3))
        + _attention(shape, name, "backward of q", (2, 1), (3, 2))
        + _attention(shape, name, "backward of rab", (1, 1), (2, 2))
    )


def attention_cached(shape: Shape) -> Work:
    """Targets alone against a cached history: its keys, values and times are read, never computed."""
    pairs = shape.num_users * shape.num_targets * (shape.history + 1) * shape.heads
    core, special = pair_instructions("cached", shape)
    rows = shape.num_users * (shape.heads * BF16 * (shape.qk_dim + shape.v_dim))
    return Work(
        name="hstu_attention_cached, targets against a cached history",
        kind="attention",
        tensor_flops=2.0 * pairs * (shape.qk_dim + shape.v_dim),
        core_instructions=float(pairs * core),
        special_instructions=float(pairs * special),
        memory_bytes=float(rows * (shape.history + 2 * shape.num_targets) + 8 * shape.tokens),
    )


def _widths(shape: Shape) -> tuple[int, int]:
    """Return the widths of u, v, q and k together, and of the attention's output."""
    return 2 * shape.heads * (shape.qk_dim + shape.v_dim), shape.heads * shape.v_dim


def uvqk_forward(shape: Shape) -> Work:
    """Statistics of the rows, then one product with the norm before and SiLU after it."""
    width, _ = _widths(shape)
    d, rows = shape.model_dim, shape.tokens
    return Work(
        name="uvqk forward",
        kind="gemm",
        tensor_flops=2.0 * rows * d * width,
        core_instructions=12.0 * rows * width,
        special_instructions=2.0 * rows * width,
        memory_bytes=float(BF16 * (rows * (2 * d + width) + d * width)),
    )


def uvqk_backward(shape: Shape) -> Work:
    """The product again, then those of the gradients of input and weight, which needs the input's norm."""
    width, _ = _widths(shape)
    d, rows = shape.model_dim, shape.tokens
    return Work(
        name="uvqk backward",
        kind="gemm",
        tensor_flops=3 * 2.0 * rows * d * width,
        core_instructions=18.0 * rows * width,
        special_instructions=2.0 * rows * width,
        # Rows of width d: input three times, norm and its gradient written and read, result; of width W: gradient,
        # that before SiLU written and read twice.
        memory_bytes=float(BF16 * (rows * (8 * d + 4 * width) + 3 * d * width)),
    )


def norm_gate_forward(shape: Shape, *, linear: bool = True) -> Work:
    """LayerNorm, gate and dropout of whole rows; then the output product, if `linear`, with the residual."""
    _, width = _widths(shape)
    d, rows = shape.model_dim, shape.tokens
    flops, rows_bytes = (2.0 * rows * width * d, width + 3 * d) if linear else (0.0, 0)
    return Work(
        name="norm_gate_linear forward" if linear else "norm_gate forward",
        kind="gemm",
        tensor_flops=flops,
        core_instructions=25.0 * rows * width,
        memory_bytes=float(BF16 * (rows * (3 * width + rows_bytes) + linear * d * width)),
    )


def norm_gate_backward(shape: Shape) -> Work:
    """The gradient's product, the gate's backward with the gated rows formed again, the weight's product."""
    _, width = _widths(shape)
    d, rows = shape.model_dim, shape.tokens
    return Work(
        name="norm_gate_linear backward",
        kind="gemm",
        tensor_flops=2 * 2.0 * rows * width * d,
        core_instructions=35.0 * rows * width,
        # Gate: gradient, attention and u read, three results written; products: the gradient twice, gated rows.
        memory_bytes=float(BF16 * (rows * (8 * width + 2 * d) + 2 * d * width)),
    )


def sampled_softmax_forward(tokens: int, width: int, negatives: int = NUM_NEGATIVES) -> Work:
    """Each token gathers its own rows of a table far larger than the cache; dot products on the ordinary cores."""
    gathered = tokens * (negatives + 1)
    return Work(
        name="sampled_softmax forward",
        kind="rows",
        core_instructions=float(gathered * 2 * width),
        special_instructions=float(gathered),
        memory_bytes=float(gathered * (BF16 * width + 8) + tokens * (BF16 * width + 2 * FP32)),
    )


def sampled_softmax_backward(tokens: int, width: int, negatives: int = NUM_NEGATIVES, items: int = NUM_ITEMS) -> Work:
    """Gathers again for the users' gradient; for the items', pairs sorted by item gather the users' rows."""
    gathered = tokens * (negatives + 1)
    # A stable radix sort of int64 keys with their places: eight passes that read and write 16 bytes each way.
    sort = 8 * 2 * 16 * gathered
    return Work(
        name="sampled_softmax backward",
        kind="rows",
        core_instructions=float(gathered * 5 * width),
        special_instructions=float(gathered),
        memory_bytes=float(
            gathered * (2 * BF16 * width + 8 + 2 * FP32 + 8) + sort + BF16 * width * (2 * tokens + items) + 8 * items
        ),
    )


def rowwise_adamw(rows: int, width: int) -> Work:
    """Weight and first moment read and written, gradient read, one second moment and one row number a row."""
    return Work(
        name="rowwise_adamw",
        kind="rows",
        core_instructions=14.0 * rows * width,
        memory_bytes=float(rows * (5 * FP32 * width + 2 * FP32 + 8)),
    )


def layer_forward(shape: Shape, *, with_rab: bool = True) -> tuple[Work, ...]:
    """Return the kernels of one layer's forward."""
    return uvqk_forward(shape), attention_forward(shape, with_rab=with_rab), norm_gate_forward(shape)


def public_model_ms(gpu: Gpu, *, with_rab: bool = True) -> float:
    """Return the predicted forward of the public measurement's model, all layers, embeddings and heads left out."""
    return PUBLIC_LAYERS * sum(predicted_ms(work, gpu) for work in layer_forward(PUBLIC, with_rab=with_rab))


PUBLIC_LABEL = "32 users, 1,024 history + 2,048 candidates, d 512, 4 heads of 128"
TRAINING_LABEL = "32 users of 1,024, d 256, 4 heads of 64"
SCENES: tuple[tuple[str, Callable[[], tuple[Work, ...]]], ...] = (
    (PUBLIC_LABEL, lambda: (*layer_forward(PUBLIC), attention_cached(PUBLIC))),
    (
        TRAINING_LABEL,
        lambda: (
            *layer_forward(TRAINING),
            norm_gate_forward(TRAINING, linear=False),
            attention_backward(TRAINING),
            uvqk_backward(TRAINING),
            norm_gate_backward(TRAINING),
        ),
    ),
    (
        "32,768 tokens, 128 negatives of 1 M items, d 256",
        lambda: (
            sampled_softmax_forward(TRAINING.tokens, TRAINING.model_dim),
            sampled_softmax_backward(TRAINING.tokens, TRAINING.model_dim),
        ),
    ),
    ("1 M touched rows, d 256", lambda: (rowwise_adamw(TOUCHED_ROWS, TRAINING.model_dim),)),
)


def rows() -> list[dict[str, Any]]:
    """Return benchmark rows, one a kernel, shape and GPU: predicted milliseconds and what they are made of."""
    found = []
    for scene, works in SCENES:
        for work in works():
            found += [_row(work, scene, gpu) for gpu in GPUS]
    return found + [_public_row(gpu, with_rab) for with_rab in (True, False) for gpu in GPUS]


def _public_row(gpu: Gpu, with_rab: bool) -> dict[str, Any]:
    measured = PUBLIC_MEASURED_MS if gpu.name == "H100 SXM" else None
    kernel = f"forward of {PUBLIC_LAYERS} layers, {'with' if with_rab else 'without'} rab"
    return {
        "name": f"{kernel}, {gpu.name}: prediction, not a measurement",
        "value": public_model_ms(gpu, with_rab=with_rab),
        "unit": "ms, predicted",
        "against": f"authors' kernels, measured: {measured:.2f} ms" if measured else None,
        "target": None,
        "kernel": kernel,
        "shape": PUBLIC_LABEL,
        "gpu": gpu.name,
        "against_ms": measured,
    }


def _row(work: Work, scene: str, gpu: Gpu) -> dict[str, Any]:
    parts = parts_ms(work, gpu)
    arithmetic = "tensor" if parts["tensor"] > parts["cores"] else "cores"
    bound = "memory" if parts["memory"] > parts["tensor"] + parts["cores"] else arithmetic
    return {
        "name": f"{work.name}, {scene}, {gpu.name}",
        "value": predicted_ms(work, gpu),
        "unit": "ms, predicted",
        "against": None,
        "target": None,
        "kernel": work.name,
        "shape": scene,
        "gpu": gpu.name,
        "tensor_gflop": work.tensor_flops / 1e9,
        "core_ginstructions": work.core_instructions / 1e9,
        "memory_mb": work.memory_bytes / 1e6,
        "bound": bound,
    }

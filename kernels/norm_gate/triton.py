"""The gated norm on GPUs: whole rows in registers, the dropout mask hashed where it is needed.

Invariant: one program owns its rows, so nothing is added across programs; statistics and gates are fp32 whatever the
tensors' type, cast right after each load.

Legend: L rows, W width, BLOCK_WIDTH the power of two that covers W.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import Variant
from kernels.dispatch import interpreted
from kernels.dropout import drop_below

FIRST_MULTIPLIER: tl.constexpr = tl.constexpr(0x21F0AAAD)
SECOND_MULTIPLIER: tl.constexpr = tl.constexpr(0x735A2D97)
HIGH_SALT: tl.constexpr = tl.constexpr(0x1E3779B9)
LOW_SALT: tl.constexpr = tl.constexpr(0x05EBCA6B)
MAX_DROPOUT_BLOCK = 1024


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * FIRST_MULTIPLIER
    x = (x ^ (x >> 15)) * SECOND_MULTIPLIER
    return x ^ (x >> 15)


@triton.jit
def _keep(seed_ptr, rows, columns, drop_below):
    """Return the mask [rows, columns] of kernels/dropout.py; uint32 wraps around and shifts in zeros."""
    # A block of one, not a scalar: the interpreter's scalars warn when they wrap around.
    seed = tl.load(seed_ptr + tl.arange(0, 1))
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    a = _mix(low + _mix(high ^ HIGH_SALT))
    b = _mix(high + _mix(low ^ LOW_SALT))
    row_keys = _mix(_mix(rows.to(tl.uint32) ^ a) + b)
    columns = columns.to(tl.uint32)
    multipliers = (_mix(_mix(columns ^ b) + a) >> 1) | 1
    offsets = _mix(_mix(columns + b) ^ a)
    bits = row_keys[:, None] * multipliers[None, :] + offsets[None, :]
    bits = (bits ^ (bits >> 15)) * SECOND_MULTIPLIER
    return (bits >> 2).to(tl.int32) >= drop_below


@triton.jit
def normalise_rows(x, inside, width, eps):
    """Return the rows' norm, 0 outside the width, their means and inverse deviations."""
    mean = tl.sum(x, axis=1) / width
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)
    return centred * rstd[:, None], mean, rstd


@triton.jit
def normalise_rows_backward(grad, normed, rstd, width):
    """Return the gradient of the rows from that of their norm; both are 0 outside the width."""
    mean_grad = tl.sum(grad, axis=1) / width
    mean_projection = tl.sum(grad * normed, axis=1) / width
    return (grad - mean_grad[:, None] - normed * mean_projection[:, None]) * rstd[:, None]


@triton.jit(do_not_specialize=["num_rows", "drop_below"])
def _norm_gate_fwd_kernel(
    attention_ptr,
    u_ptr,
    seed_ptr,
    out_ptr,
    num_rows,
    width,
    attention_stride,
    u_stride,
    eps,
    scale,
    drop_below,
    DROP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    far_rows = rows.to(tl.int64)[:, None]
    x = tl.load(attention_ptr + far_rows * attention_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + far_rows * u_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    normed, _, _ = normalise_rows(x, inside, width, eps)
    gated = normed * u * scale
    if DROP:
        gated = tl.where(_keep(seed_ptr, rows, columns, drop_below), gated, 0.0)
    tl.store(out_ptr + far_rows * width + columns[None, :], gated, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "drop_below"])
def _norm_gate_bwd_kernel(
    grad_ptr,
    attention_ptr,
    u_ptr,
    seed_ptr,
    grad_attention_ptr,
    grad_u_ptr,
    gated_ptr,
    num_rows,
    width,
    attention_stride,
    u_stride,
    eps,
    scale,
    drop_below,
    DROP: tl.constexpr,
    STORE_GATED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    far_rows = rows.to(tl.int64)[:, None]
    at = far_rows * width + columns[None, :]
    x = tl.load(attention_ptr + far_rows * attention_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + far_rows * u_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    normed, _, rstd = normalise_rows(x, inside, width, eps)
    factor = tl.where(inside, scale, 0.0)
    if DROP:
        factor = tl.where(_keep(seed_ptr, rows, columns, drop_below), factor, 0.0)
    grad *= factor
    if STORE_GATED:
        tl.store(gated_ptr + at, normed * u * factor, mask=inside)
    tl.store(grad_u_ptr + at, grad * normed, mask=inside)
    grad_x = normalise_rows_backward(grad * u, normed, rstd, width)
    tl.store(grad_attention_ptr + at, grad_x, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "drop_below"])
def _hash_dropout_kernel(
    x_ptr,
    seed_ptr,
    out_ptr,
    num_rows,
    width,
    x_stride,
    scale,
    drop_below,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    far_rows = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + far_rows * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    kept = tl.where(_keep(seed_ptr, rows, columns, drop_below), x * scale, 0.0)
    tl.store(out_ptr + far_rows * width + columns[None, :], kept, mask=inside)


def row_blocks(width: int, max_width: int | None = None) -> dict[str, int]:
    """Return launch constants: 16 elements of each tensor a thread, up to rows of 8,192."""
    block_width = max(16, triton.next_power_of_2(width))
    block_width = min(block_width, max_width or block_width)
    num_warps = min(16, max(4, block_width // 512))
    # The interpreter pays by the program, not by the element.
    elements = 1 << 16 if interpreted() else 2048
    return {"BLOCK_ROWS": max(1, elements // block_width), "BLOCK_WIDTH": block_width, "num_warps": num_warps}


def _chance(dropout: float, seed: Tensor | None, x: Tensor) -> tuple[Tensor, float, int]:
    """Return the seed (any tensor where nothing is dropped), the scale of kept elements and the integer they reach."""
    if seed is None or dropout == 0.0:
        return x, 1.0, 0
    return seed, 1.0 / (1.0 - dropout), drop_below(dropout)


def norm_gate(attention: Tensor, u: Tensor, dropout: float, seed: Tensor | None, eps: float) -> Tensor:
    """Return dropout(LayerNorm(attention) * u) [L, W]."""
    num_rows, width = attention.shape
    out = torch.empty((num_rows, width), dtype=attention.dtype, device=attention.device)
    if out.numel():
        chance, scale, reached = _chance(dropout, seed, attention)
        blocks, strides = row_blocks(width), (attention.stride(0), u.stride(0))
        with torch.cuda.device_of(attention):
            _norm_gate_fwd_kernel[(triton.cdiv(num_rows, blocks["BLOCK_ROWS"]),)](
                attention, u, chance, out, num_rows, width, *strides, eps, scale, reached, DROP=reached > 0, **blocks
            )
    return out


def norm_gate_backward(
    grad: Tensor,
    attention: Tensor,
    u: Tensor,
    dropout: float,
    seed: Tensor | None,
    eps: float,
    *,
    with_gated: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of attention and u, and the gated rows [L, W] (meaningless unless asked for)."""
    num_rows, width = attention.shape
    grad_attention = torch.empty((num_rows, width), dtype=attention.dtype, device=attention.device)
    grad_u = torch.empty_like(grad_attention)
    gated = torch.empty_like(grad_attention) if with_gated else grad_u
    if grad_u.numel():
        chance, scale, reached = _chance(dropout, seed, attention)
        blocks, strides = row_blocks(width), (attention.stride(0), u.stride(0))
        constants = {"DROP": reached > 0, "STORE_GATED": with_gated, **blocks}
        tensors = (grad.contiguous(), attention, u, chance, grad_attention, grad_u, gated)
        with torch.cuda.device_of(attention):
            _norm_gate_bwd_kernel[(triton.cdiv(num_rows, blocks["BLOCK_ROWS"]),)](
                *tensors, num_rows, width, *strides, eps, scale, reached, **constants
            )
    return grad_attention, grad_u, gated


def norm_gate_linear(
    attention: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    dropout: float,
    seed: Tensor | None,
    eps: float,
) -> Tensor:
    """Return residual + norm_gate(attention, u) @ weight^T + bias [L, d]; the gated rows are freed at once."""
    return torch.addmm(bias, norm_gate(attention, u, dropout, seed, eps), weight.t()).add_(residual)


def norm_gate_linear_backward(
    grad: Tensor, attention: Tensor, u: Tensor, weight: Tensor, dropout: float, seed: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of attention, u [L, W] and weight [d, W] from that of the output [L, d]."""
    grad_gated = grad @ weight
    grad_attention, grad_u, gated = norm_gate_backward(grad_gated, attention, u, dropout, seed, eps, with_gated=True)
    return grad_attention, grad_u, grad.t() @ gated


def hash_dropout(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """Return x [L, W] with a share of its elements zeroed and the rest divided by 1 - dropout: its own backward."""
    num_rows, width = x.shape
    x = x.contiguous()
    out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    if out.numel():
        blocks = row_blocks(width, MAX_DROPOUT_BLOCK)
        grid = (triton.cdiv(num_rows, blocks["BLOCK_ROWS"]), triton.cdiv(width, blocks["BLOCK_WIDTH"]))
        scale, reached = 1.0 / (1.0 - dropout), drop_below(dropout)
        with torch.cuda.device_of(x):
            _hash_dropout_kernel[grid](x, seed, out, num_rows, width, x.stride(0), scale, reached, **blocks)
    return out


def _argument_type(name: str, dtype: str) -> str:
    if name == "seed_ptr":
        return "*i64"
    if name.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if name in ("eps", "scale") else "i32"


def _variant(kernel: str, fn: Any, dtype: str, width: int, constants: dict[str, Any]) -> Variant:
    launch = {name: value for name, value in constants.items() if name in fn.arg_names}
    types = {name: "constexpr" if name in launch else _argument_type(name, dtype) for name in fn.arg_names}
    strided = tuple(name for name in fn.arg_names if name == "width" or name.endswith("_stride"))
    return Variant(
        kernel=kernel,
        label=f"{dtype} width {width}",
        fn=fn,
        signature=types,
        constexprs=launch,
        num_warps=constants["num_warps"],
        num_stages=3,
        aligned=strided if width % 16 == 0 else (),
    )


def aot_variants() -> list[Variant]:
    """Return forward, backward (with gated rows, its largest form) and dropout, with the mask, as launched."""
    found = []
    for dtype, width in itertools.product(("fp32", "bf16"), (50, 256, 512, 1024, 4096)):
        rows = {"DROP": True, "STORE_GATED": True, **row_blocks(width)}
        found += [
            _variant("forward", _norm_gate_fwd_kernel, dtype, width, rows),
            _variant("backward", _norm_gate_bwd_kernel, dtype, width, rows),
            _variant("dropout", _hash_dropout_kernel, dtype, width, row_blocks(width, MAX_DROPOUT_BLOCK)),
        ]
    return found

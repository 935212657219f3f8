"""The uvqk projection on GPUs: the product reads x and norms it on the way, SiLU and its slope are the epilogue.

Invariant: no norm and no pre-activation outlives its kernel in the forward. The backward writes the pre-activation's
gradient [L, W] and the norm [L, d], which feed two products of the BLAS library and are freed at once. Every sum has
one program for owner.

Legend: L rows, d width of x, W width of the output; M, N, K tile sizes over L, W, d.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import Variant
from kernels.dispatch import interpreted
from kernels.norm_gate.triton import normalise_rows, normalise_rows_backward, row_blocks


@triton.jit
def _load_rows(x_ptr, x_stride, rows, columns, num_rows, width):
    mask = (rows < num_rows)[:, None] & (columns < width)[None, :]
    at = rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
    return tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32), mask


@triton.jit(do_not_specialize=["num_rows"])
def _row_norm_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    normed_ptr,
    num_rows,
    width,
    x_stride,
    eps,
    STORE_NORMED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_WIDTH)
    x, inside = _load_rows(x_ptr, x_stride, rows, columns, num_rows, width)
    normed, mean, rstd = normalise_rows(x, inside, width, eps)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)
    if STORE_NORMED:
        tl.store(normed_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], normed, mask=inside)


@triton.jit
def _pre_activation(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    rows,
    columns,
    num_rows,
    width,
    out_width,
    x_stride,
    weight_stride,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return the tile [M, N] of LayerNorm(x) @ weight in fp32."""
    mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x, inside = _load_rows(x_ptr, x_stride, rows, inner, num_rows, width)
        normed = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        mask = (inner < width)[:, None] & (columns < out_width)[None, :]
        at = inner.to(tl.int64)[:, None] * weight_stride + columns[None, :]
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
        if INTERPRET:
            weight = weight.to(tl.float32)
        # Plain TF32 would lose 1e-3; "ieee" is also what AMD offers.
        acc += tl.dot(normed.to(weight.dtype), weight, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def _uvqk_fwd_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    width,
    out_width,
    x_stride,
    weight_stride,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # fmt: off
    pre = _pre_activation(
        x_ptr, mean_ptr, rstd_ptr, weight_ptr, rows, columns, num_rows, width, out_width, x_stride, weight_stride,
        INTERPRET, BLOCK_M, BLOCK_N, BLOCK_K,
    )
    # fmt: on
    mask = (rows < num_rows)[:, None] & (columns < out_width)[None, :]
    at = rows.to(tl.int64)[:, None] * out_width + columns[None, :]
    tl.store(out_ptr + at, pre * tl.sigmoid(pre), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _uvqk_bwd_kernel(
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    grad_pre_ptr,
    num_rows,
    width,
    out_width,
    x_stride,
    weight_stride,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # fmt: off
    pre = _pre_activation(
        x_ptr, mean_ptr, rstd_ptr, weight_ptr, rows, columns, num_rows, width, out_width, x_stride, weight_stride,
        INTERPRET, BLOCK_M, BLOCK_N, BLOCK_K,
    )
    # fmt: on
    mask = (rows < num_rows)[:, None] & (columns < out_width)[None, :]
    at = rows.to(tl.int64)[:, None] * out_width + columns[None, :]
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(pre)
    tl.store(grad_pre_ptr + at, grad * share * (1.0 + pre * (1.0 - share)), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _row_norm_bwd_kernel(
    grad_ptr,
    x_ptr,
    grad_x_ptr,
    num_rows,
    width,
    x_stride,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_WIDTH)
    x, inside = _load_rows(x_ptr, x_stride, rows, columns, num_rows, width)
    grad, _ = _load_rows(grad_ptr, width, rows, columns, num_rows, width)
    normed, _, rstd = normalise_rows(x, inside, width, eps)
    grad_x = normalise_rows_backward(grad, normed, rstd, width)
    tl.store(grad_x_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], grad_x, mask=inside)


# Tiles by bytes an element and whether all strides are multiples of 16: fp32 products run on the ordinary units, 16 bit
# ones on the tensor cores; ragged rows need an address an element, which the larger tile would spill.
TILES = {
    (4, True): {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4},
    (4, False): {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4},
    (2, True): {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8},
    (2, False): {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4},
}
INTERPRETER_TILES = {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 256}


def _tiles(itemsize: int, *strides: int) -> dict[str, Any]:
    chosen = TILES[itemsize, all(stride % 16 == 0 for stride in strides)]
    return {**(INTERPRETER_TILES if interpreted() else chosen), "INTERPRET": interpreted()}


def _row_norm(x: Tensor, eps: float, *, with_normed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return means and inverse deviations fp32 [L], and the norm [L, d] (meaningless unless asked for)."""
    num_rows, width = x.shape
    mean, rstd = torch.empty((2, num_rows), dtype=torch.float32, device=x.device)
    normed = torch.empty((num_rows, width), dtype=x.dtype, device=x.device) if with_normed else x
    blocks = row_blocks(width)
    _row_norm_kernel[(triton.cdiv(num_rows, blocks["BLOCK_ROWS"]),)](
        x, mean, rstd, normed, num_rows, width, x.stride(0), eps, STORE_NORMED=with_normed, **blocks
    )
    return mean, rstd, normed


def _grid(num_rows: int, out_width: int, tiles: dict[str, Any]) -> tuple[int, int]:
    return triton.cdiv(num_rows, tiles["BLOCK_M"]), triton.cdiv(out_width, tiles["BLOCK_N"])


def uvqk(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return SiLU(LayerNorm(x) @ weight) [L, W]."""
    (num_rows, width), out_width = x.shape, weight.shape[1]
    out = torch.empty((num_rows, out_width), dtype=x.dtype, device=x.device)
    if out.numel():
        strides = (x.stride(0), weight.stride(0))
        tiles = _tiles(x.element_size(), width, out_width, *strides)
        with torch.cuda.device_of(x):
            mean, rstd, _ = _row_norm(x, eps, with_normed=False)
            _uvqk_fwd_kernel[_grid(num_rows, out_width, tiles)](
                x, mean, rstd, weight, out, num_rows, width, out_width, *strides, **tiles
            )
    return out


def uvqk_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [L, d] and weight [d, W]."""
    (num_rows, width), out_width = x.shape, weight.shape[1]
    if not grad.numel():
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device), torch.zeros_like(weight)
    grad_x = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    grad_pre = torch.empty((num_rows, out_width), dtype=x.dtype, device=x.device)
    strides, blocks = (x.stride(0), weight.stride(0)), row_blocks(width)
    tiles = _tiles(x.element_size(), width, out_width, *strides)
    with torch.cuda.device_of(x):
        mean, rstd, normed = _row_norm(x, eps, with_normed=True)
        _uvqk_bwd_kernel[_grid(num_rows, out_width, tiles)](
            grad.contiguous(), x, mean, rstd, weight, grad_pre, num_rows, width, out_width, *strides, **tiles
        )
        _row_norm_bwd_kernel[(triton.cdiv(num_rows, blocks["BLOCK_ROWS"]),)](
            grad_pre @ weight.t(), x, grad_x, num_rows, width, x.stride(0), eps, **blocks
        )
    return grad_x, normed.t() @ grad_pre


def _argument_type(name: str, dtype: str) -> str:
    if name in ("mean_ptr", "rstd_ptr"):
        return "*fp32"
    if name.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if name == "eps" else "i32"


def _variant(kernel: str, fn: Any, dtype: str, width: int, constants: dict[str, Any]) -> Variant:
    launch = {name: value for name, value in constants.items() if name in fn.arg_names}
    types = {name: "constexpr" if name in launch else _argument_type(name, dtype) for name in fn.arg_names}
    strided = [name for name in ("width", "x_stride") if width % 16 == 0]
    strided += [name for name in ("out_width", "weight_stride") if 4 * width % 16 == 0]
    return Variant(
        kernel=kernel,
        label=f"{dtype} d {width}",
        fn=fn,
        signature=types,
        constexprs=launch,
        num_warps=constants["num_warps"],
        num_stages=3,
        aligned=tuple(name for name in strided if name in fn.arg_names),
    )


def aot_variants() -> list[Variant]:
    """Return every kernel as launched, for the widths of the recipes and W = 4 d."""
    found = []
    for (dtype, itemsize), width in itertools.product((("fp32", 4), ("bf16", 2)), (50, 256, 512, 1024)):
        rows, tiles = {"STORE_NORMED": True, **row_blocks(width)}, _tiles(itemsize, width, 4 * width)
        found += [
            _variant("norm", _row_norm_kernel, dtype, width, rows),
            _variant("forward", _uvqk_fwd_kernel, dtype, width, tiles),
            _variant("backward", _uvqk_bwd_kernel, dtype, width, tiles),
            _variant("backward of norm", _row_norm_bwd_kernel, dtype, width, rows),
        ]
    return found

"""Rowwise AdamW on a GPU: a program takes a tile of touched rows, gathers them, updates them and puts them back.

Invariant: a row belongs to one program, so nothing is atomic and results do not depend on the order of programs.

Legend: V rows of the table, R touched rows, d width.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import Variant

NUM_WARPS = 4
# Elements a program holds of weight, moment and gradient each: 8 a thread.
TILE_ELEMENTS = 1024
AOT_WIDTHS = (50, 64, 256, 1024)


@triton.jit(do_not_specialize=["num_touched"])
def _rowwise_adamw_kernel(
    weight_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    rows_ptr,
    grad_ptr,
    num_touched,
    num_rows,
    width,
    step_size,
    keep,
    beta1,
    rest1,
    beta2,
    rest2,
    inverse_root,
    eps,
    ALL_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    touched = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    holds = touched < num_touched
    row = touched
    if not ALL_ROWS:
        row = tl.load(rows_ptr + touched, mask=holds, other=0)
        # An id outside the table touches no memory; on the CPU it is refused.
        holds = holds & (row >= 0) & (row < num_rows)
    mask = holds[:, None] & (column[None, :] < width)
    at = row[:, None] * width + column[None, :]
    grad = tl.load(grad_ptr + touched[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
    moment = beta1 * tl.load(exp_avg_ptr + at, mask=mask, other=0.0) + rest1 * grad
    square = beta2 * tl.load(exp_avg_sq_ptr + row, mask=holds, other=0.0) + rest2 * (tl.sum(grad * grad, 1) / width)
    weight = keep * tl.load(weight_ptr + at, mask=mask, other=0.0)
    denominator = tl.sqrt(square) * inverse_root + eps
    tl.store(weight_ptr + at, weight - step_size * moment / denominator[:, None], mask=mask)
    tl.store(exp_avg_ptr + at, moment, mask=mask)
    tl.store(exp_avg_sq_ptr + row, square, mask=holds)


def _blocks(width: int) -> dict[str, int]:
    block_width = triton.next_power_of_2(width)
    return {"BLOCK_ROWS": max(1, TILE_ELEMENTS // block_width), "BLOCK_WIDTH": block_width}


def rowwise_adamw_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor | None,
    grad: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update weight, exp_avg [V, d] and exp_avg_sq [V] in place where `rows` (None: everywhere) says."""
    if not len(grad):
        return
    blocks = _blocks(weight.shape[1])
    with torch.cuda.device_of(weight):
        _rowwise_adamw_kernel[(triton.cdiv(len(grad), blocks["BLOCK_ROWS"]),)](
            weight,
            exp_avg,
            exp_avg_sq,
            # Never read when all rows are touched.
            torch.empty(1, dtype=torch.int64, device=weight.device) if rows is None else rows,
            grad,
            len(grad),
            len(weight),
            weight.shape[1],
            lr / (1 - beta1**step),
            1 - lr * weight_decay,
            beta1,
            # Taken here in double precision: 1 - fp32(0.999) is wrong in the fifth digit.
            1 - beta1,
            beta2,
            1 - beta2,
            1 / math.sqrt(1 - beta2**step),
            eps,
            ALL_ROWS=rows is None,
            **blocks,
            num_warps=NUM_WARPS,
        )


def aot_variants() -> list[Variant]:
    """Return the kernel for several widths, gradients in fp32 and bf16, some rows and all."""
    scalars = ("step_size", "keep", "beta1", "rest1", "beta2", "rest2", "inverse_root", "eps")
    found = []
    for width in AOT_WIDTHS:
        for dtype in ("fp32", "bf16"):
            for all_rows in (False, True):
                constexprs = {"ALL_ROWS": all_rows, **_blocks(width)}
                signature = dict.fromkeys(("weight_ptr", "exp_avg_ptr", "exp_avg_sq_ptr"), "*fp32")
                signature |= {"rows_ptr": "*i64", "grad_ptr": f"*{dtype}"}
                signature |= {"num_touched": "i32", "num_rows": "i32", "width": "i32"}
                signature |= dict.fromkeys(scalars, "fp32") | dict.fromkeys(constexprs, "constexpr")
                found.append(
                    Variant(
                        kernel="step",
                        label=f"d {width}, {dtype} gradients, {'all' if all_rows else 'some'} rows",
                        fn=_rowwise_adamw_kernel,
                        signature=signature,
                        constexprs=constexprs,
                        num_warps=NUM_WARPS,
                        num_stages=3,
                        # What the launch sees as a multiple of 16 is compiled as one.
                        aligned=("width",) if width % 16 == 0 else (),
                    )
                )
    return found

"""The one entry to rowwise AdamW: validation, then `gr::rowwise_adamw_`, which changes its first three arguments.

Invariant: rows that are not named keep every bit of weight and state: no decay, no moments that fade.

Legend: V rows of the table, R touched rows, d width.
"""

import torch
from torch import Tensor

from kernels.dispatch import Backend, choose, outside_autocast, require, require_tensor
from kernels.rowwise_adamw import cpu, reference

MAX_TRITON_WIDTH = 4096
GRAD_DTYPES = (torch.bfloat16, torch.float16)


@torch.no_grad()
def rowwise_adamw_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor | None,
    grad: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    backend: Backend | None = None,
) -> None:
    """Take one AdamW step in place for the touched rows; the second moment is the mean of a row's squared gradients.

    weight, exp_avg [V, d] and exp_avg_sq [V] in fp32 (fp64 on the CPU), contiguous; rows int64 [R], ascending, each
    once, or None: all V; grad [R, d] in the dtype of weight or a 16 bit one; step: number of this step, from 1.
    Weight decay is decoupled and taken from touched rows only. Bias correction uses `step` for every row, however
    often it was touched: a row first touched late starts from zero moments that are hardly corrected, so its first step
    is about (1 - beta1) / sqrt(1 - beta2) of lr (0.7 at .9, .98; 3.2 at .9, .999) where a row touched at step 1 moves
    by lr. Raises ValueError naming the argument; rows are read on the CPU only: on a GPU an id outside the table is
    left out, and one named twice is the caller's error. Source: PAPER section 2.
    """
    backend = choose(backend, weight)
    check_hyperparameters(lr, betas, eps, weight_decay)
    require(step >= 1, "step", step, "at least 1")
    _require_inputs(weight, exp_avg, exp_avg_sq, rows, grad, backend)
    numbers = (step, lr, *betas, eps, weight_decay)
    if backend == "reference":
        _check_rows(rows, len(weight))
        reference.rowwise_adamw_(weight, exp_avg, exp_avg_sq, rows, grad, *numbers)
    else:
        _op(weight, exp_avg, exp_avg_sq, rows, grad, *numbers, backend)


def check_hyperparameters(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise ValueError naming the first that is out of range. Without eps a row of zero gradients would be 0 / 0."""
    require(lr >= 0.0, "lr", lr, "at least 0")
    require(len(betas) == 2 and all(0.0 <= beta < 1.0 for beta in betas), "betas", betas, "two, at least 0, below 1")
    require(eps > 0.0, "eps", eps, "positive")
    require(weight_decay >= 0.0, "weight_decay", weight_decay, "at least 0")


def _require_inputs(
    weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rows: Tensor | None, grad: Tensor, backend: Backend
) -> None:
    dtypes = (torch.float32,) if backend == "triton" else (torch.float32, torch.float64)
    require_tensor("weight", weight, shape=(None, None), dtype=dtypes)
    num_rows, width = weight.shape
    require(width > 0, "width of weight", width, "positive")
    require(backend != "triton" or width <= MAX_TRITON_WIDTH, "width of weight", width, f"at most {MAX_TRITON_WIDTH}")
    require_tensor("exp_avg", exp_avg, shape=(num_rows, width), dtype=weight.dtype, like=weight)
    require_tensor("exp_avg_sq", exp_avg_sq, shape=(num_rows,), dtype=weight.dtype, like=weight)
    for argument, x in (("weight", weight), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        require(x.is_contiguous(), f"stride of {argument}", x.stride(), "contiguous: it is changed in place")
    num_touched = num_rows
    if rows is not None:
        require_tensor("rows", rows, shape=(None,), dtype=torch.int64, like=weight)
        num_touched = len(rows)
    require_tensor("grad", grad, shape=(num_touched, width), dtype=(weight.dtype, *GRAD_DTYPES), like=weight)


def _check_rows(rows: Tensor | None, num_rows: int) -> None:
    """Raise ValueError unless ids on the CPU ascend within the table; a row named twice would lose an update."""
    if rows is None or rows.device.type != "cpu" or not len(rows):
        return
    first, last = int(rows[0]), int(rows[-1])
    require(bool((rows[1:] > rows[:-1]).all()), "rows", f"{rows[:4].tolist()}..", "ascending, each row once")
    require(first >= 0 and last < num_rows, "rows", f"from {first} to {last}", f"in 0..{num_rows - 1}")


@torch.library.custom_op("gr::rowwise_adamw_", mutates_args=("weight", "exp_avg", "exp_avg_sq"))
@outside_autocast
def _op(
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
    backend: str,
) -> None:
    numbers = (step, lr, beta1, beta2, eps, weight_decay)
    if backend == "triton":
        from kernels.rowwise_adamw import triton

        rows = None if rows is None else rows.contiguous()
        triton.rowwise_adamw_(weight, exp_avg, exp_avg_sq, rows, grad.contiguous(), *numbers)
        return
    _check_rows(rows, len(weight))
    cpu.rowwise_adamw_(weight, exp_avg, exp_avg_sq, rows, grad, *numbers)


@_op.register_fake
def _(*_: object) -> None:
    return None

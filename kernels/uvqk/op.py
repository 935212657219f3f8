"""The uvqk projection as a registered op: SiLU(LayerNorm(x) @ weight), pre-activation formed again in the backward.

Invariant: x and weight alone are saved for the backward, so a layer keeps x and the output, not the two between.

Legend: L tokens, d width of the layer, W width of u, v, q and k together.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import KERNEL_DTYPES, Backend, choose, outside_autocast, require, require_tensor, traced_or_cast
from kernels.uvqk import cpu, reference

# A GPU program of the norm holds whole rows in registers.
MAX_ROW = 16384
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)


def _implementation(backend: str) -> ModuleType:
    if backend == "cpu":
        return cpu
    from kernels.uvqk import triton

    return triton


def uvqk(x: Tensor, weight: Tensor, *, eps: float = 1e-6, backend: Backend | None = None) -> Tensor:
    """Return SiLU(LayerNorm(x) @ weight) [L, W], the norm without parameters; the caller splits it into u, v, q, k.

    x [L, d], weight [d, W] of one dtype, rows at any stride. Raises ValueError naming the argument.
    Source: PAPER section 2.
    """
    chosen = choose(backend, x)
    require_tensor("x", x, shape=(None, None), dtype=KERNEL_DTYPES if chosen == "triton" else FLOAT_DTYPES)
    width = x.shape[1]
    require(width > 0, "width of x", width, "at least 1")
    require(chosen != "triton" or width <= MAX_ROW, "width of x", width, f"at most {MAX_ROW} on a GPU")
    require_tensor("weight", weight, shape=(width, None), dtype=x.dtype, like=x)
    if chosen == "reference":
        return reference.uvqk(x, weight, eps)
    if not torch.is_grad_enabled() and not traced_or_cast(x):
        # The registered op would add nothing but its 10 us a call, which matter when serving one token.
        projected: Tensor = _implementation(chosen).uvqk(x, weight, eps)
        return projected
    out: Tensor = torch.ops.gr.uvqk(x, weight, eps, chosen)
    return out


@torch.library.custom_op("gr::uvqk", mutates_args=())
@outside_autocast
def _uvqk(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    out: Tensor = _implementation(backend).uvqk(x, weight, eps)
    return out


@_uvqk.register_fake
def _(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


@torch.library.custom_op("gr::uvqk_backward", mutates_args=())
@outside_autocast
def _uvqk_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = _implementation(backend).uvqk_backward(grad, x, weight, eps)
    return grad_x, grad_weight


@_uvqk_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.gr.uvqk_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.backend)
    return (*grads, None, None)


_uvqk.register_autograd(_differentiate, setup_context=_save)

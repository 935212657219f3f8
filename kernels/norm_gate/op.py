"""The gated norm as registered ops: dropout(LayerNorm(attention) * u), alone or with the layer's output projection.

Invariant: nothing but inputs is saved for the backward: not the norm, not the mask, not the gated rows.

Legend: L tokens, W width of the attention output (heads * v_dim), d width of the layer.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels import dropout as mask
from kernels.dispatch import KERNEL_DTYPES, Backend, choose, outside_autocast, require, require_tensor, traced_or_cast
from kernels.norm_gate import cpu, reference

# A GPU program holds whole rows in registers.
MAX_ROW = 16384
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)


def _implementation(backend: str) -> ModuleType:
    if backend == "cpu":
        return cpu
    from kernels.norm_gate import triton

    return triton


def _without_autograd(x: Tensor) -> bool:
    """Return whether the registered op would add nothing but its 15 us a call: it matters when serving one token."""
    return not torch.is_grad_enabled() and not traced_or_cast(x)


def _check(attention: Tensor, u: Tensor, dropout: float, seed: Tensor | None, backend: str) -> None:
    dtypes = KERNEL_DTYPES if backend == "triton" else FLOAT_DTYPES
    require_tensor("attention", attention, shape=(None, None), dtype=dtypes)
    require_tensor("u", u, shape=tuple(attention.shape), dtype=attention.dtype, like=attention)
    mask.check(dropout, seed, attention)
    width = attention.shape[1]
    require(backend != "triton" or width <= MAX_ROW, "width of attention", width, f"at most {MAX_ROW} on a GPU")


def norm_gate(
    attention: Tensor,
    u: Tensor,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend | None = None,
) -> Tensor:
    """Return dropout(LayerNorm(attention) * u) [L, W], the norm without parameters.

    attention, u [L, W] of one dtype, rows at any stride; dropout in [0, 1); seed int64 [1] on their device, needed when
    dropout > 0: the mask is a pure function of (seed, row, column), equal on every backend.
    Raises ValueError naming the argument. Source: PAPER section 2.
    """
    chosen = choose(backend, attention)
    _check(attention, u, dropout, seed, chosen)
    if chosen == "reference":
        return reference.norm_gate(attention, u, dropout, seed, eps)
    if _without_autograd(attention):
        gated: Tensor = _implementation(chosen).norm_gate(attention, u, dropout, seed, eps)
        return gated
    out: Tensor = torch.ops.gr.norm_gate(attention, u, dropout, seed, eps, chosen)
    return out


def norm_gate_linear(
    attention: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend | None = None,
) -> Tensor:
    """Return residual + norm_gate(attention, u) @ weight^T + bias [L, d], without saving the gated rows.

    weight [d, W], bias [d], residual [L, d], one dtype with attention; the rest and Raises as `norm_gate`.
    """
    chosen = choose(backend, attention)
    _check(attention, u, dropout, seed, chosen)
    num_rows, width = attention.shape
    require_tensor("weight", weight, shape=(None, width), dtype=attention.dtype, like=attention)
    require_tensor("bias", bias, shape=(weight.shape[0],), dtype=attention.dtype, like=attention)
    require_tensor("residual", residual, shape=(num_rows, weight.shape[0]), dtype=attention.dtype, like=attention)
    if chosen == "reference":
        return reference.norm_gate_linear(attention, u, weight, bias, residual, dropout, seed, eps)
    arguments = (attention, u, weight, bias, residual, dropout, seed, eps)
    if _without_autograd(attention):
        rows: Tensor = _implementation(chosen).norm_gate_linear(*arguments)
        return rows
    out: Tensor = torch.ops.gr.norm_gate_linear(*arguments, chosen)
    return out


def hash_dropout(x: Tensor, dropout: float, seed: Tensor | None, *, backend: Backend | None = None) -> Tensor:
    """Return x [L, d] with a share of its elements zeroed and the rest divided by 1 - dropout; saves the seed alone.

    dropout in [0, 1), 0 returns x itself; seed and the mask as in `norm_gate`. Raises ValueError naming the argument.
    """
    chosen = choose(backend, x)
    require_tensor("x", x, shape=(None, None), dtype=KERNEL_DTYPES if chosen == "triton" else FLOAT_DTYPES)
    mask.check(dropout, seed, x)
    if seed is None or dropout == 0.0:
        return x
    if chosen == "reference":
        return mask.reference_dropout(x, dropout, seed)
    out: Tensor = torch.ops.gr.hash_dropout(x, dropout, seed, chosen)
    return out


@torch.library.custom_op("gr::norm_gate", mutates_args=())
@outside_autocast
def _norm_gate(attention: Tensor, u: Tensor, dropout: float, seed: Tensor | None, eps: float, backend: str) -> Tensor:
    out: Tensor = _implementation(backend).norm_gate(attention, u, dropout, seed, eps)
    return out


@_norm_gate.register_fake
def _(attention: Tensor, u: Tensor, dropout: float, seed: Tensor | None, eps: float, backend: str) -> Tensor:
    return attention.new_empty(attention.shape)


@torch.library.custom_op("gr::norm_gate_backward", mutates_args=())
@outside_autocast
def _norm_gate_backward(
    grad: Tensor, attention: Tensor, u: Tensor, dropout: float, seed: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    grad_attention, grad_u = _implementation(backend).norm_gate_backward(grad, attention, u, dropout, seed, eps)[:2]
    return grad_attention, grad_u


@_norm_gate_backward.register_fake
def _(
    grad: Tensor, attention: Tensor, u: Tensor, dropout: float, seed: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return attention.new_empty(attention.shape), attention.new_empty(attention.shape)


def _save_for_norm_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    attention, u, ctx.dropout, seed, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(attention, u, seed)


def _differentiate_norm_gate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    attention, u, seed = ctx.saved_tensors
    grads = torch.ops.gr.norm_gate_backward(grad, attention, u, ctx.dropout, seed, ctx.eps, ctx.backend)
    return (*grads, None, None, None, None)


_norm_gate.register_autograd(_differentiate_norm_gate, setup_context=_save_for_norm_gate)


@torch.library.custom_op("gr::norm_gate_linear", mutates_args=())
@outside_autocast
def _norm_gate_linear(
    attention: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    dropout: float,
    seed: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    run = _implementation(backend).norm_gate_linear
    out: Tensor = run(attention, u, weight, bias, residual, dropout, seed, eps)
    return out


@_norm_gate_linear.register_fake
def _(
    attention: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    dropout: float,
    seed: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    return residual.new_empty(residual.shape)


@torch.library.custom_op("gr::norm_gate_linear_backward", mutates_args=())
@outside_autocast
def _norm_gate_linear_backward(
    grad: Tensor,
    attention: Tensor,
    u: Tensor,
    weight: Tensor,
    dropout: float,
    seed: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = _implementation(backend).norm_gate_linear_backward
    grad_attention, grad_u, grad_weight = run(grad, attention, u, weight, dropout, seed, eps)
    return grad_attention, grad_u, grad_weight


@_norm_gate_linear_backward.register_fake
def _(
    grad: Tensor,
    attention: Tensor,
    u: Tensor,
    weight: Tensor,
    dropout: float,
    seed: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = attention.shape
    return attention.new_empty(shape), attention.new_empty(shape), weight.new_empty(weight.shape)


def _save_for_norm_gate_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    attention, u, weight, _, _, ctx.dropout, seed, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(attention, u, weight, seed)


def _differentiate_norm_gate_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    attention, u, weight, seed = ctx.saved_tensors
    run = torch.ops.gr.norm_gate_linear_backward
    grads = run(grad, attention, u, weight, ctx.dropout, seed, ctx.eps, ctx.backend)
    return (*grads, grad.sum(0), grad, None, None, None, None)


_norm_gate_linear.register_autograd(_differentiate_norm_gate_linear, setup_context=_save_for_norm_gate_linear)


@torch.library.custom_op("gr::hash_dropout", mutates_args=())
@outside_autocast
def _hash_dropout(x: Tensor, dropout: float, seed: Tensor, backend: str) -> Tensor:
    out: Tensor = _implementation(backend).hash_dropout(x, dropout, seed)
    return out


@_hash_dropout.register_fake
def _(x: Tensor, dropout: float, seed: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _save_for_hash_dropout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.dropout, seed, ctx.backend = inputs
    ctx.save_for_backward(seed)


def _differentiate_hash_dropout(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    return torch.ops.gr.hash_dropout(grad, ctx.dropout, seed, ctx.backend), None, None, None


_hash_dropout.register_autograd(_differentiate_hash_dropout, setup_context=_save_for_hash_dropout)

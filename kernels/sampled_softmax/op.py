"""The one entry to the softmax losses of retrieval: validation, then `gr::sampled_softmax`.

Invariant: shapes, dtypes and devices are refused here, before anything runs. Ids are read by the cpu and reference
backends only, inside the op: on a GPU reading them would wait for the device, so there an id outside the table makes
the loss of every token that meets it NaN instead, and reads no memory outside the table.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import KERNEL_DTYPES, Backend, choose, outside_autocast, require, require_tensor
from kernels.sampled_softmax import cpu, reference

MAX_TRITON_WIDTH = 256


def sampled_softmax(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    temperature: float,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Return the losses [T] `lse(all logits) - positive logit`; a logit is a dot product over the temperature.

    users [T, d] and items [V, d], both normalised by the caller; targets int64 [T]; negatives int64 [T, M], or [M]
    shared by all tokens. A negative that is its token's target is masked; one drawn twice counts twice. 16 bit inputs
    give fp32 losses. Differentiable in users and items; no [T, M, d] tensor is made.
    Raises ValueError naming the argument; ids outside 0..V-1 are found by the cpu and reference backends only.
    Source: PAPER section 6.
    """
    backend = choose(backend, users)
    _require_inputs(users, items, targets, temperature, backend)
    require(negatives.dim() in (1, 2), "shape of negatives", list(negatives.shape), "[M] or [T, M]")
    shape = (None,) if negatives.dim() == 1 else (len(users), None)
    require_tensor("negatives", negatives, shape=shape, like=users, dtype=torch.int64)
    return _losses(users, items, targets, negatives, temperature, 0, backend)


def full_softmax(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    temperature: float,
    *,
    first_item: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """Return the losses [T] against all rows of the table from first_item on, tile by tile: no [T, V] tensor is made.

    Arguments and errors as for `sampled_softmax`; targets must lie in first_item..V-1.
    """
    backend = choose(backend, users)
    _require_inputs(users, items, targets, temperature, backend)
    require(0 <= first_item < len(items), "first_item", first_item, f"in 0..{len(items) - 1}")
    rows = torch.arange(first_item, len(items), device=users.device)
    return _losses(users, items, targets, rows, temperature, first_item, backend)


def _require_inputs(users: Tensor, items: Tensor, targets: Tensor, temperature: float, backend: Backend) -> None:
    dtypes = KERNEL_DTYPES if backend == "triton" else (*KERNEL_DTYPES, torch.float64)
    require_tensor("users", users, shape=(None, None), dtype=dtypes)
    width = users.shape[1]
    require(width > 0, "width of users", width, "positive")
    require(backend != "triton" or width <= MAX_TRITON_WIDTH, "width of users", width, f"at most {MAX_TRITON_WIDTH}")
    require_tensor("items", items, shape=(None, width), like=users, dtype=users.dtype)
    require(len(items) > 0, "number of items", len(items), "positive")
    require_tensor("targets", targets, shape=(len(users),), like=users, dtype=torch.int64)
    require(math.isfinite(temperature) and temperature > 0, "temperature", temperature, "positive and finite")


def _losses(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    temperature: float,
    first_item: int,
    backend: Backend,
) -> Tensor:
    if backend == "reference":
        _check_ids(items, targets, negatives, first_item)
        return reference.sampled_softmax(users, items, targets, negatives, temperature)
    losses: Tensor = _op(users, items, targets, negatives, temperature, first_item, backend)[0]
    return losses


def _check_ids(items: Tensor, targets: Tensor, negatives: Tensor, first_item: int) -> None:
    if items.device.type == "cpu":
        cpu.check_ids("targets", targets, first_item, len(items))
        cpu.check_ids("negatives", negatives, 0, len(items))


def _wide(x: Tensor) -> Tensor:
    """Return x, contiguous, in the dtype that sums are made in."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


@torch.library.custom_op("gr::sampled_softmax", mutates_args=())
@outside_autocast
def _op(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    temperature: float,
    first_item: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the losses [T] and what the backward needs: log-sum-exps [T], or slopes [T, M + 1] (`keeps_slopes`)."""
    if backend == "triton":
        from kernels.sampled_softmax import triton

        return triton.forward(users.contiguous(), items.contiguous(), targets, negatives.contiguous(), temperature)
    _check_ids(items, targets, negatives, first_item)
    forward = cpu.own_forward if negatives.dim() == 2 else cpu.shared_forward
    return forward(_wide(users), _wide(items), targets, negatives, temperature)


@_op.register_fake
def _(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    temperature: float,
    first_item: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(users.dtype, torch.float32)
    losses = users.new_empty(users.shape[0], dtype=wide)
    if backend == "triton" or not cpu.keeps_slopes(negatives):
        return losses, torch.empty_like(losses)
    return losses, users.new_empty(users.shape[0], negatives.shape[-1] + 1, dtype=wide)


@torch.library.custom_op("gr::sampled_softmax_backward", mutates_args=())
@outside_autocast
def _backward_op(
    grad: Tensor,
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    kept: Tensor,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from kernels.sampled_softmax import triton

        users, items, negatives = users.contiguous(), items.contiguous(), negatives.contiguous()
        return triton.backward(grad.contiguous(), users, items, targets, negatives, kept, temperature)
    backward = cpu.own_backward if negatives.dim() == 2 else cpu.shared_backward
    d_users, d_items = backward(grad, _wide(users), _wide(items), targets, negatives, kept, temperature)
    return d_users.to(users.dtype), d_items.to(items.dtype)


@_backward_op.register_fake
def _(
    grad: Tensor,
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    negatives: Tensor,
    kept: Tensor,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return users.new_empty(users.shape), items.new_empty(items.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    users, items, targets, negatives, ctx.temperature, _, ctx.backend = inputs
    ctx.save_for_backward(users, items, targets, negatives, output[1])
    ctx.mark_non_differentiable(output[1])


def _grads(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    d_users, d_items = _backward_op(grad, *ctx.saved_tensors, ctx.temperature, ctx.backend)
    return d_users, d_items, None, None, None, None, None


_op.register_autograd(_grads, setup_context=_keep)

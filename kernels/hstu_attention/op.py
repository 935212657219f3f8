"""The one entry to jagged HSTU attention, and its registration as `gr::hstu_attention`.

Invariant: the backends agree; which one runs is never visible in a score beyond rounding.

Legend: L tokens, H heads, D / Dv head dims, N max_seq_len.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import KERNEL_DTYPES, Backend, choose, outside_autocast, require, require_tensor
from kernels.hstu_attention import cpu, reference
from kernels.hstu_attention.batch import JaggedTimes
from kernels.hstu_attention.time_buckets import NUM_TIME_BUCKETS

MAX_HEAD_DIM = 256


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    jagged: JaggedTimes,
    pos_weight: Tensor,
    time_weight: Tensor,
    max_seq_len: int,
    *,
    max_attn_len: int = 0,
    backend: Backend | None = None,
) -> Tensor:
    """Return SiLU(q k^T + rab) v / N [L, H, Dv], causal, with rab from distances and time differences.

    q, k [L, H, D], v [L, H, Dv] in fp32, bf16 or fp16 (fp64 on the CPU); pos_weight [N] and time_weight [129], shared
    by the heads; max_seq_len: the constant N that a history (and the row of targets after it) must fit and the sum is
    divided by; max_attn_len: the largest distance that is seen, 0 for all. Results do not depend on batch mates and
    repeat bit for bit: there is no other mode. Raises ValueError naming the argument. Source: PAPER sections 2 and 4.
    """
    chosen = choose(backend, q)
    check(q, k, v, pos_weight, time_weight, len(jagged.times), max_seq_len, max_attn_len, chosen)
    require(jagged.times.device == q.device, "device of jagged", jagged.times.device, f"{q.device}, as q")
    # The message only where it is needed: a graph that is traced with symbolic lengths cannot format them.
    if jagged.max_uih_len > max_seq_len:
        rule = f"at least {jagged.max_uih_len}, the longest history of the batch; cut the history to max_events"
        require(False, "max_seq_len", max_seq_len, rule)
    shared = (jagged.seq_offsets, jagged.times, jagged.query_times, jagged.num_targets)
    if chosen == "reference":
        wide = widened(q, k, v, pos_weight, time_weight)
        return reference.hstu_attention(*wide, *shared, max_seq_len, max_attn_len).to(v.dtype)
    return _attention(q, k, v, pos_weight, time_weight, *shared, jagged.plan, max_seq_len, max_attn_len, chosen)


def compute_dtype(q: Tensor) -> torch.dtype:
    """Return what the CPU computes in: its 16 bit products are slow and round every step, so fp32 for those."""
    return q.dtype if q.dtype == torch.float64 else torch.float32


def widened(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, time_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the arguments in the dtype that the CPU computes in."""
    wide = compute_dtype(q)
    return q.to(wide), k.to(wide), v.to(wide), pos_weight.to(wide), time_weight.to(wide)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    time_weight: Tensor,
    num_tokens: int,
    max_seq_len: int,
    max_attn_len: int,
    chosen: Backend,
) -> None:
    """Raise ValueError naming the first argument that does not fit the others."""
    require(q.dim() == 3, "shape of q", list(q.shape), "[tokens, heads, head dim]")
    dtypes = KERNEL_DTYPES if chosen == "triton" else (*KERNEL_DTYPES, torch.float64)
    heads, dim = q.shape[1:]
    require_tensor("q", q, shape=(num_tokens, None, None), dtype=dtypes)
    require_tensor("k", k, shape=(num_tokens, heads, dim), dtype=q.dtype, like=q)
    require_tensor("v", v, shape=(num_tokens, heads, None), dtype=q.dtype, like=q)
    for argument, x in (("q", q), ("v", v)):
        size = x.shape[-1]
        require(1 <= size <= MAX_HEAD_DIM, f"head dim of {argument}", size, f"between 1 and {MAX_HEAD_DIM}")
    for argument, number in (("max_seq_len", max_seq_len), ("max_attn_len", max_attn_len)):
        require(number is not None and not isinstance(number, float), argument, number, "an integer")
    require(max_seq_len > 0, "max_seq_len", max_seq_len, "positive")
    require(max_attn_len >= 0, "max_attn_len", max_attn_len, "0 (no bound) or positive")
    weights = (torch.float32,) if q.dtype == torch.float32 else (torch.float32, q.dtype)
    require_tensor("pos_weight", pos_weight, shape=(max_seq_len,), dtype=weights, like=q)
    require_tensor("time_weight", time_weight, shape=(NUM_TIME_BUCKETS,), dtype=pos_weight.dtype, like=q)


@torch.library.custom_op("gr::hstu_attention", mutates_args=())
@outside_autocast
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    time_weight: Tensor,
    seq_offsets: Tensor,
    times: Tensor,
    query_times: Tensor,
    num_targets: Tensor | None,
    plan: Tensor,
    max_seq_len: int,
    max_attn_len: int,
    backend: str,
) -> Tensor:
    shared = (seq_offsets, times, query_times, num_targets, plan, max_seq_len, max_attn_len)
    if backend == "triton":
        from kernels.hstu_attention import triton

        return triton.forward(q, k, v, pos_weight, time_weight, *shared)
    return cpu.forward(*widened(q, k, v, pos_weight, time_weight), cpu.Batch.of(*shared)).to(v.dtype)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("gr::hstu_attention_backward", mutates_args=())
@outside_autocast
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos_weight: Tensor,
    time_weight: Tensor,
    seq_offsets: Tensor,
    times: Tensor,
    query_times: Tensor,
    num_targets: Tensor | None,
    plan: Tensor,
    max_seq_len: int,
    max_attn_len: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shared = (seq_offsets, times, query_times, num_targets, plan, max_seq_len, max_attn_len)
    if backend == "triton":
        from kernels.hstu_attention import triton_backward

        return triton_backward.backward(grad, q, k, v, pos_weight, time_weight, *shared)
    inputs = (q, k, v, pos_weight, time_weight)
    grads = cpu.backward(grad.to(compute_dtype(q)), *widened(*inputs), cpu.Batch.of(*shared))
    dq, dk, dv, d_pos, d_time = (d.to(x.dtype) for d, x in zip(grads, inputs, strict=True))
    return dq, dk, dv, d_pos, d_time


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, time_weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, torch.empty_like(pos_weight), torch.empty_like(time_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, max_seq_len, max_attn_len, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.constants = (max_seq_len, max_attn_len, backend)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.constants)
    return (*grads, *[None] * 8)


_attention.register_autograd(_backward, setup_context=_setup_context)

"""The backward of HSTU attention on a GPU: three kernels that compute the scores again, each summing what it owns.

Invariant: no atomics. dk and dv are owned by blocks of keys, dq by blocks of queries, the bias gradients by diagonals
of blocks (triton_bias_backward.py). Memory beside the results: O(B * N) and 256 floats a block of queries.

Legend: L tokens, B users, H heads, D / DV head dims, h history tokens of a user; rows i are queries, j keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hstu_attention.batch import SCHEDULE_ROWS
from kernels.hstu_attention.time_buckets import NUM_TIME_BUCKETS
from kernels.hstu_attention.triton import scheduled, shape_constants, thresholds_on
from kernels.hstu_attention.triton_bias_backward import BUCKET_SLOTS, hstu_attention_bwd_bias_kernel
from kernels.hstu_attention.triton_tile import (
    load_rows,
    rab,
    silu_and_slope,
    silu_slope,
    span,
    store_rows,
    time_bucket,
    visible,
)


@triton.jit
def _hstu_attention_bwd_kv_kernel(
    grad, q, k, v, dk, dv, pos_weight, time_weight, thresholds, seq_offsets, times, query_times, num_targets, plan,
    stride_q, stride_k, stride_v, head_q, head_k, head_v, num_heads, inverse_n,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SCHEDULE: tl.constexpr, HAS_TARGETS: tl.constexpr, MAX_ATTN_LEN: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One program computes dk and dv of BLOCK_M keys of one head, from all queries that see them."""
    program, head = tl.program_id(0), tl.program_id(1)
    _, first, start, length, history = span(
        plan, seq_offsets, num_targets, program // (SCHEDULE // BLOCK_M), HAS_TARGETS
    )
    # The blocks with most keys come first in the plan; mirrored, those are the keys with most queries.
    first = (length - 1) // SCHEDULE * SCHEDULE - first + program % (SCHEDULE // BLOCK_M) * BLOCK_M
    if first >= length:
        return

    key = first + tl.arange(0, BLOCK_M)
    key_valid = key < length
    k_rows = load_rows(k + head * head_k, start + key, key_valid, stride_k, D, BLOCK_D, INTERPRET)
    v_rows = load_rows(v + head * head_v, start + key, key_valid, stride_v, DV, BLOCK_DV, INTERPRET)
    k_times = tl.load(times + start + key, mask=key_valid, other=0)
    grad_stride = num_heads * DV
    d_k = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    d_v = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    high = tl.where(first < history, length, 0)
    if MAX_ATTN_LEN > 0:
        last_seen = tl.minimum(first + BLOCK_M, history) - 1 + MAX_ATTN_LEN
        high = tl.where((first < history) & (history > last_seen), last_seen + 1, high)
    for begin in range(first // BLOCK_N * BLOCK_N, high, BLOCK_N):
        row = begin + tl.arange(0, BLOCK_N)
        row_valid = row < length
        q_rows = load_rows(q + head * head_q, start + row, row_valid, stride_q, D, BLOCK_D, INTERPRET)
        g_rows = load_rows(grad + head * DV, start + row, row_valid, grad_stride, DV, BLOCK_DV, INTERPRET)
        q_times = tl.load(query_times + start + row, mask=row_valid, other=0)
        position = tl.minimum(row, history)
        sees, distance = visible(position[None, :], key[:, None], row_valid[None, :], history, MAX_ATTN_LEN)
        bucket = time_bucket(q_times[None, :] - k_times[:, None], thresholds)
        scores = tl.dot(k_rows, tl.trans(q_rows), input_precision=PRECISION)
        silu, slope = silu_and_slope(scores + rab(distance, bucket, sees, pos_weight, time_weight))
        weights = tl.where(sees, silu, 0.0).to(g_rows.dtype)
        d_v += tl.dot(weights, g_rows, input_precision=PRECISION)
        d_scores = tl.dot(v_rows, tl.trans(g_rows), input_precision=PRECISION) * tl.where(sees, slope, 0.0)
        d_k += tl.dot(d_scores.to(q_rows.dtype), q_rows, input_precision=PRECISION)
    if HAS_TARGETS:
        if first + BLOCK_M > history:
            target = key_valid & (key >= history)
            own_q = load_rows(q + head * head_q, start + key, target, stride_q, D, BLOCK_D, INTERPRET).to(tl.float32)
            own_g = load_rows(grad + head * DV, start + key, target, grad_stride, DV, BLOCK_DV, INTERPRET).to(
                tl.float32
            )
            own_times = tl.load(query_times + start + key, mask=target, other=0)
            alone = tl.sum(own_q * k_rows.to(tl.float32), 1)
            alone += rab(key - key, time_bucket(own_times - k_times, thresholds), target, pos_weight, time_weight)
            silu, slope = silu_and_slope(alone)
            d_v += tl.where(target, silu, 0.0)[:, None] * own_g
            d_alone = tl.sum(own_g * v_rows.to(tl.float32), 1) * tl.where(target, slope, 0.0)
            d_k += d_alone[:, None] * own_q
    dk_stride = num_heads * D
    store_rows(dk + head * D, start + key, key_valid, dk_stride, d_k * inverse_n, D, BLOCK_D)
    store_rows(dv + head * DV, start + key, key_valid, grad_stride, d_v * inverse_n, DV, BLOCK_DV)


@triton.jit
def _hstu_attention_bwd_q_kernel(
    grad, q, k, v, dq, pos_weight, time_weight, thresholds, seq_offsets, times, query_times, num_targets, plan,
    stride_q, stride_k, stride_v, head_q, head_k, head_v, num_heads, inverse_n,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SCHEDULE: tl.constexpr, HAS_TARGETS: tl.constexpr, MAX_ATTN_LEN: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One program computes dq of BLOCK_M queries of one head."""
    program, head = tl.program_id(0), tl.program_id(1)
    _, first, start, length, history = span(
        plan, seq_offsets, num_targets, program // (SCHEDULE // BLOCK_M), HAS_TARGETS
    )
    first += program % (SCHEDULE // BLOCK_M) * BLOCK_M
    if first >= length:
        return

    row = first + tl.arange(0, BLOCK_M)
    row_valid = row < length
    position = tl.minimum(row, history)
    grad_stride = num_heads * DV
    q_rows = load_rows(q + head * head_q, start + row, row_valid, stride_q, D, BLOCK_D, INTERPRET)
    g_rows = load_rows(grad + head * DV, start + row, row_valid, grad_stride, DV, BLOCK_DV, INTERPRET)
    q_times = tl.load(query_times + start + row, mask=row_valid, other=0)
    d_q = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    low = 0
    if MAX_ATTN_LEN > 0:
        low = tl.maximum(tl.minimum(first, history) - MAX_ATTN_LEN, 0) // BLOCK_N * BLOCK_N
    for begin in range(low, tl.minimum(first + BLOCK_M, history), BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        key_valid = key < history
        k_rows = load_rows(k + head * head_k, start + key, key_valid, stride_k, D, BLOCK_D, INTERPRET)
        v_rows = load_rows(v + head * head_v, start + key, key_valid, stride_v, DV, BLOCK_DV, INTERPRET)
        k_times = tl.load(times + start + key, mask=key_valid, other=0)
        sees, distance = visible(position[:, None], key[None, :], row_valid[:, None], history, MAX_ATTN_LEN)
        bucket = time_bucket(q_times[:, None] - k_times[None, :], thresholds)
        scores = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)
        slope = silu_slope(scores + rab(distance, bucket, sees, pos_weight, time_weight))
        d_scores = tl.dot(g_rows, tl.trans(v_rows), input_precision=PRECISION) * tl.where(sees, slope, 0.0)
        d_q += tl.dot(d_scores.to(k_rows.dtype), k_rows, input_precision=PRECISION)
    if HAS_TARGETS:
        if first + BLOCK_M > history:
            target = row_valid & (row >= history)
            own_k = load_rows(k + head * head_k, start + row, target, stride_k, D, BLOCK_D, INTERPRET).to(tl.float32)
            own_v = load_rows(v + head * head_v, start + row, target, stride_v, DV, BLOCK_DV, INTERPRET).to(tl.float32)
            own_times = tl.load(times + start + row, mask=target, other=0)
            alone = tl.sum(q_rows.to(tl.float32) * own_k, 1)
            alone += rab(row - row, time_bucket(q_times - own_times, thresholds), target, pos_weight, time_weight)
            slope = silu_slope(alone)
            d_q += (tl.sum(g_rows.to(tl.float32) * own_v, 1) * tl.where(target, slope, 0.0))[:, None] * own_k
    dq_stride = num_heads * D
    store_rows(dq + head * D, start + row, row_valid, dq_stride, d_q * inverse_n, D, BLOCK_D)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, time_weight: Tensor, seq_offsets: Tensor,
    times: Tensor, query_times: Tensor, num_targets: Tensor | None, plan: Tensor, max_seq_len: int, max_attn_len: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, pos_weight and time_weight; grad [L, H, DV] contiguous."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    plan = scheduled(seq_offsets, num_targets, plan)
    if not len(plan):
        return dq, dk, dv, torch.zeros_like(pos_weight), torch.zeros_like(time_weight)
    num_heads, num_users = q.shape[1], len(seq_offsets) - 1
    targets = seq_offsets if num_targets is None else num_targets
    weights = (pos_weight, time_weight, thresholds_on(q.device))
    batch = (seq_offsets, times, query_times, targets, plan)
    strides = (
        q.stride(0),
        k.stride(0),
        v.stride(0),
        q.stride(1),
        k.stride(1),
        v.stride(1),
        num_heads,
        1.0 / max_seq_len,
    )

    constants = shape_constants(q, v, num_targets, max_attn_len, "kv")
    grid = (len(plan) * (SCHEDULE_ROWS // constants["BLOCK_M"]), num_heads)
    with torch.cuda.device_of(q):
        _hstu_attention_bwd_kv_kernel[grid](grad, q, k, v, dk, dv, *weights, *batch, *strides, **constants)
    constants = shape_constants(q, v, num_targets, max_attn_len, "q")
    grid = (len(plan) * (SCHEDULE_ROWS // constants["BLOCK_M"]), num_heads)
    with torch.cuda.device_of(q):
        _hstu_attention_bwd_q_kernel[grid](grad, q, k, v, dq, *weights, *batch, *strides, **constants)

    constants = shape_constants(q, v, num_targets, max_attn_len, "bias")
    constants["CHUNK"] = constants.pop("BLOCK_N")
    programs = len(plan) * (SCHEDULE_ROWS // constants["BLOCK_M"])
    d_pos = torch.zeros(3, num_users, max_seq_len, dtype=torch.float32, device=q.device)
    d_time = torch.zeros(programs, BUCKET_SLOTS.value, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        hstu_attention_bwd_bias_kernel[(programs,)](
            grad, q, k, v, d_pos, d_time, *weights, *batch, *strides, num_users, max_seq_len, **constants
        )
    d_pos_weight = d_pos.sum((0, 1)).to(pos_weight.dtype)
    return dq, dk, dv, d_pos_weight, d_time.sum(0)[:NUM_TIME_BUCKETS].to(time_weight.dtype)

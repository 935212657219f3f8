"""Device functions that every HSTU attention kernel shares: rows of a head, time buckets, bias and mask of a tile.

Invariant: distances are differences of positions, where a target stands right after its history; buckets come from
integer comparison with the thresholds, the estimate only says with which.
"""

import triton
import triton.language as tl

# Bits of a float32 grow like a logarithm, piecewise linear and at most 0.0861 octaves (0.2 buckets) below it. Here they
# count from 1,000 ms: 2^23 * (127 + log2(1000)) rounded up, which only lowers the estimate.
FLOAT_BITS_OF_A_SECOND = tl.constexpr(1148952276)
# 2^32 / (0.301 * log2(e) * 2^23), rounded down.
BUCKETS_PER_BIT = tl.constexpr(1179)
# Thresholds from this index on are int64's maximum, so a difference that reaches one reaches all.
FIRST_SATURATED = tl.constexpr(122)


@triton.jit
def load_rows(base, rows, valid, stride, dim: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr):
    """Return the rows [R, BLOCK_D] of one head, 0 where not valid or beyond dim; rows int64, base at the head."""
    columns = tl.arange(0, BLOCK_D)
    x = tl.load(
        base + rows[:, None] * stride + columns[None, :], mask=valid[:, None] & (columns[None, :] < dim), other=0.0
    )
    # The interpreter's 16 bit arithmetic is wrong; its error is then that of rounding the input.
    return x.to(tl.float32) if INTERPRET else x


@triton.jit
def product(
    a, b, a_rows, b_rows, a_valid, b_valid, a_stride, b_stride, dim: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return a b^T of rows of one head [R, S], taking CHUNK of the head dim at a time to save registers."""
    column = tl.arange(0, CHUNK)
    total = tl.zeros([a_rows.shape[0], b_rows.shape[0]], dtype=tl.float32)
    for offset in range(0, dim, CHUNK):
        a_mask, b_mask = a_valid[:, None], b_valid[:, None]
        if dim % CHUNK != 0:
            a_mask = a_mask & (offset + column < dim)[None, :]
            b_mask = b_mask & (offset + column < dim)[None, :]
        a_part = tl.load(a + a_rows[:, None] * a_stride + (offset + column)[None, :], mask=a_mask, other=0.0)
        b_part = tl.load(b + b_rows[:, None] * b_stride + (offset + column)[None, :], mask=b_mask, other=0.0)
        if INTERPRET:
            a_part, b_part = a_part.to(tl.float32), b_part.to(tl.float32)
        total += tl.dot(a_part, tl.trans(b_part), input_precision=PRECISION)
    return total


@triton.jit
def store_rows(base, rows, valid, stride, x, dim: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store rows [R, BLOCK_D] of one head."""
    columns = tl.arange(0, BLOCK_D)
    tl.store(
        base + rows[:, None] * stride + columns[None, :],
        x.to(base.dtype.element_ty),
        mask=valid[:, None] & (columns[None, :] < dim),
    )


@triton.jit
def time_bucket(difference, thresholds):
    """Return the buckets int32 of int64 differences in ms, of any shape.

    The estimate is low by less than one bucket, so one exact comparison settles it.
    """
    difference = tl.abs(difference)
    bits = tl.maximum(difference.to(tl.float32), 1000.0).to(tl.int32, bitcast=True)
    low = tl.umulhi(tl.maximum(bits - FLOAT_BITS_OF_A_SECOND, 0).to(tl.uint32), BUCKETS_PER_BIT).to(tl.int32)
    low = tl.minimum(low, FIRST_SATURATED)
    reached = difference >= tl.load(thresholds + low)
    return tl.where(reached, tl.where(low == FIRST_SATURATED, 128, low + 1), low)


@triton.jit
def rab(distance, bucket, sees, pos_weight, time_weight):
    """Return position plus time bias of a tile in fp32; pairs that are not seen read nothing."""
    position = tl.load(pos_weight + distance, mask=sees, other=0.0).to(tl.float32)
    return position + tl.load(time_weight + bucket, mask=sees, other=0.0).to(tl.float32)


@triton.jit
def visible(position, key, row_valid, history, MAX_ATTN_LEN: tl.constexpr):
    """Return which pairs attend and their distances; arguments broadcast to the tile."""
    distance = position - key
    sees = row_valid & (key < history) & (distance >= 0)
    if MAX_ATTN_LEN > 0:
        sees = sees & (distance <= MAX_ATTN_LEN)
    return sees, distance


@triton.jit
def silu_and_slope(scores):
    """Return silu(s) and its derivative."""
    sigmoid = tl.sigmoid(scores)
    silu = scores * sigmoid
    return silu, sigmoid + silu * (1.0 - sigmoid)


@triton.jit
def silu_slope(scores):
    """Return the derivative of silu at s."""
    sigmoid = tl.sigmoid(scores)
    return sigmoid + scores * sigmoid * (1.0 - sigmoid)


@triton.jit
def span(plan, seq_offsets, num_targets, tile, HAS_TARGETS: tl.constexpr):
    """Return user, first row of the scheduled block, first token, length and history length of the user."""
    user = tl.load(plan + 2 * tile).to(tl.int64)
    first = tl.load(plan + 2 * tile + 1)
    start = tl.load(seq_offsets + user)
    length = (tl.load(seq_offsets + user + 1) - start).to(tl.int32)
    history = length
    if HAS_TARGETS:
        history = length - tl.load(num_targets + user).to(tl.int32)
    return user, first, start, length, history


@triton.jit
def attend(
    acc, q_rows, q_times, position, row_valid, k, v, times, at, key, history, pos_weight, time_weight, thresholds,
    stride_k, stride_v, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MAX_ATTN_LEN: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return acc [M, BLOCK_DV] plus what a block of keys adds; `at` says where in memory the keys' rows are."""
    key_valid = key < history
    k_rows = load_rows(k, at, key_valid, stride_k, D, BLOCK_D, INTERPRET)
    k_times = tl.load(times + at, mask=key_valid, other=0)
    sees, distance = visible(position[:, None], key[None, :], row_valid[:, None], history, MAX_ATTN_LEN)
    bucket = time_bucket(q_times[:, None] - k_times[None, :], thresholds)
    scores = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)
    scores += rab(distance, bucket, sees, pos_weight, time_weight)
    weights = tl.where(sees, scores * tl.sigmoid(scores), 0.0)
    v_rows = load_rows(v, at, key_valid, stride_v, DV, BLOCK_DV, INTERPRET)
    return acc + tl.dot(weights.to(v_rows.dtype), v_rows, input_precision=PRECISION)


@triton.jit
def attend_themselves(
    acc, q_rows, q_times, target, k, v, times, at, pos_weight, time_weight, thresholds, stride_k, stride_v,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return acc [M, BLOCK_DV] plus what targets add to their own rows."""
    own_k = load_rows(k, at, target, stride_k, D, BLOCK_D, INTERPRET)
    own_v = load_rows(v, at, target, stride_v, DV, BLOCK_DV, INTERPRET)
    own_times = tl.load(times + at, mask=target, other=0)
    alone = tl.sum(q_rows.to(tl.float32) * own_k.to(tl.float32), 1)
    bucket = time_bucket(q_times - own_times, thresholds)
    alone += rab(bucket - bucket, bucket, target, pos_weight, time_weight)
    return acc + tl.where(target, alone * tl.sigmoid(alone), 0.0)[:, None] * own_v.to(tl.float32)

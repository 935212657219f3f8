"""Gradients of the position and time weights on a GPU, summed along diagonals of blocks in a fixed order.

Invariant: no atomics. On a diagonal of blocks an element of the tile is one distance throughout, so the tiles of all
queries and heads add up in registers and are sorted by distance once, at the end; buckets of a tile are few, because
times of neighbours are near, so each bucket's sum is taken in turn.

Legend: B users, H heads, D / DV head dims, h history tokens of a user; rows i are queries, j keys.
"""

import triton
import triton.language as tl

from kernels.hstu_attention.triton_tile import load_rows, product, rab, silu_slope, span, time_bucket, visible

BUCKET_SLOTS = tl.constexpr(256)


@triton.jit
def _by_bucket(sums, bucket, values, counts):
    """Return sums float [BUCKET_SLOTS] with each value added to its bucket's; values are 0 where not counted."""
    slots = tl.arange(0, BUCKET_SLOTS)
    low = tl.min(tl.where(counts, bucket, BUCKET_SLOTS))
    high = tl.max(tl.where(counts, bucket, -1))
    for number in range(low, high + 1):
        total = tl.sum(tl.where(bucket == number, values, 0.0))
        sums += tl.where(slots == number, total, 0.0)
    return sums


@triton.jit
def _d_scores(
    grad, q, k, v, start, row, key, row_valid, key_valid, bias, sees, stride_q, stride_k, stride_v, head_q, head_k,
    head_v, num_heads, D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return the gradient of a tile's scores, summed over heads, times N."""
    total = bias * 0.0
    grad_stride = num_heads * DV
    for head in range(num_heads):
        scores = product(
            q + head * head_q, k + head * head_k, start + row, start + key, row_valid, key_valid, stride_q, stride_k, D,
            CHUNK, PRECISION, INTERPRET,
        )  # fmt: skip
        d_weights = product(
            grad + head * DV, v + head * head_v, start + row, start + key, row_valid, key_valid, grad_stride, stride_v,
            DV, CHUNK, PRECISION, INTERPRET,
        )  # fmt: skip
        total += d_weights * silu_slope(scores + bias)
    return tl.where(sees, total, 0.0)


@triton.jit
def hstu_attention_bwd_bias_kernel(
    grad, q, k, v, d_pos, d_time, pos_weight, time_weight, thresholds, seq_offsets, times, query_times, num_targets,
    plan, stride_q, stride_k, stride_v, head_q, head_k, head_v, num_heads, inverse_n, num_users, num_positions,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr, SCHEDULE: tl.constexpr, HAS_TARGETS: tl.constexpr, MAX_ATTN_LEN: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One program sums a diagonal of blocks, and the targets' block of keys of the same number.

    d_pos float [3, B, N], zero at first: distances at or above the block's own, below it, and the targets'.
    d_time float [programs, BUCKET_SLOTS], zero at first.
    """
    program = tl.program_id(0)
    user, first, start, length, history = span(
        plan, seq_offsets, num_targets, program // (SCHEDULE // BLOCK_M), HAS_TARGETS
    )
    # Mirrored: the plan's first blocks see most keys, the main diagonal is the longest.
    behind = (length - 1) // SCHEDULE * SCHEDULE - first + program % (SCHEDULE // BLOCK_M) * BLOCK_M
    local = tl.arange(0, BLOCK_M)
    if (behind >= history) & (behind > 0):
        return
    by_distance = tl.zeros([BLOCK_M, BLOCK_M], dtype=tl.float32)
    by_bucket = tl.zeros([BUCKET_SLOTS], dtype=tl.float32)
    high = history
    if MAX_ATTN_LEN > 0:
        # The nearest pair of the diagonal is behind - BLOCK_M + 1 apart.
        high = tl.where(behind - BLOCK_M + 1 > MAX_ATTN_LEN, 0, history)
    for begin in range(behind, high, BLOCK_M):
        row, key = begin + local, begin - behind + local
        row_valid, key_valid = row < history, key < history
        sees, distance = visible(row[:, None], key[None, :], row_valid[:, None], history, MAX_ATTN_LEN)
        q_times = tl.load(query_times + start + row, mask=row_valid, other=0)
        k_times = tl.load(times + start + key, mask=key_valid, other=0)
        bucket = time_bucket(q_times[:, None] - k_times[None, :], thresholds)
        bias = rab(distance, bucket, sees, pos_weight, time_weight)
        tile = _d_scores(
            grad, q, k, v, start, row, key, row_valid, key_valid, bias, sees, stride_q, stride_k, stride_v, head_q,
            head_k, head_v, num_heads, D, DV, CHUNK, PRECISION, INTERPRET,
        )  # fmt: skip
        by_distance += tile
        by_bucket = _by_bucket(by_bucket, bucket, tile, sees)

    # Column c of the sheared tile holds local distances c and c - BLOCK_M.
    sheared = tl.gather(by_distance, (local[:, None] - local[None, :]) & (BLOCK_M - 1), 1) * inverse_n
    wrapped = local[:, None] < local[None, :]
    above, below = tl.sum(tl.where(wrapped, 0.0, sheared), 0), tl.sum(tl.where(wrapped, sheared, 0.0), 0)
    at = behind + local
    of_user = user * num_positions
    plane = tl.full([], 1, tl.int64) * num_users * num_positions
    tl.store(d_pos + of_user + at, above, mask=(at < num_positions) & (at < history))
    tl.store(d_pos + plane + of_user + at - BLOCK_M, below, mask=(at >= BLOCK_M) & (at - BLOCK_M < num_positions))

    if HAS_TARGETS:
        key = behind + local
        key_valid = key < history
        k_times = tl.load(times + start + key, mask=key_valid, other=0)
        by_key = tl.zeros([BLOCK_M], dtype=tl.float32)
        to_themselves = 0.0
        for begin in range(history, length, BLOCK_M):
            row = begin + local
            row_valid = row < length
            position = tl.minimum(row, history)
            sees, distance = visible(position[:, None], key[None, :], row_valid[:, None], history, MAX_ATTN_LEN)
            q_times = tl.load(query_times + start + row, mask=row_valid, other=0)
            bucket = time_bucket(q_times[:, None] - k_times[None, :], thresholds)
            bias = rab(distance, bucket, sees, pos_weight, time_weight)
            tile = _d_scores(
                grad, q, k, v, start, row, key, row_valid, key_valid, bias, sees, stride_q, stride_k, stride_v, head_q,
                head_k, head_v, num_heads, D, DV, CHUNK, PRECISION, INTERPRET,
            )  # fmt: skip
            by_key += tl.sum(tile, 0)
            by_bucket = _by_bucket(by_bucket, bucket, tile, sees)
            if behind == 0:
                own_times = tl.load(times + start + row, mask=row_valid, other=0)
                own_bucket = time_bucket(q_times - own_times, thresholds)
                own_bias = rab(row - row, own_bucket, row_valid, pos_weight, time_weight)
                alone = _d_alone(
                    grad, q, k, v, start, row, row_valid, own_bias, stride_q, stride_k, stride_v, head_q, head_k,
                    head_v, num_heads, D, DV, BLOCK_D, BLOCK_DV, INTERPRET,
                )  # fmt: skip
                to_themselves += tl.sum(alone)
                by_bucket = _by_bucket(by_bucket, own_bucket, alone, row_valid)
        third = d_pos + 2 * plane + of_user
        tl.store(third + history - key, by_key * inverse_n, mask=key_valid)
        if behind == 0:
            tl.store(third, to_themselves * inverse_n)
    slots = tl.arange(0, BUCKET_SLOTS)
    tl.store(d_time + program.to(tl.int64) * BUCKET_SLOTS + slots, by_bucket * inverse_n)


@triton.jit
def _d_alone(
    grad, q, k, v, start, row, row_valid, bias, stride_q, stride_k, stride_v, head_q, head_k, head_v, num_heads,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the scores between targets and themselves [R], summed over heads, times N."""
    total = bias * 0.0
    grad_stride = num_heads * DV
    for head in range(num_heads):
        q_rows = load_rows(q + head * head_q, start + row, row_valid, stride_q, D, BLOCK_D, INTERPRET).to(tl.float32)
        k_rows = load_rows(k + head * head_k, start + row, row_valid, stride_k, D, BLOCK_D, INTERPRET).to(tl.float32)
        slope = silu_slope(tl.sum(q_rows * k_rows, 1) + bias)
        g_rows = load_rows(grad + head * DV, start + row, row_valid, grad_stride, DV, BLOCK_DV, INTERPRET).to(
            tl.float32
        )
        v_rows = load_rows(v + head * head_v, start + row, row_valid, stride_v, DV, BLOCK_DV, INTERPRET).to(tl.float32)
        total += tl.sum(g_rows * v_rows, 1) * slope
    return tl.where(row_valid, total, 0.0)

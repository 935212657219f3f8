"""Cached HSTU attention on a GPU: a program takes a block of queries over past keys, paged or not, then the new.

Invariant: the same tile arithmetic as `hstu_attention`, so a cached row equals the row of a full forward to rounding.

Legend: L new tokens, B users, P past tokens of a user, H heads, D / DV head dims; rows are queries.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import Variant
from kernels.hstu_attention.batch import SCHEDULE_ROWS, schedule
from kernels.hstu_attention.triton import kernel_variant, shape_constants, thresholds_on
from kernels.hstu_attention.triton_tile import attend, attend_themselves, load_rows, span, store_rows


@triton.jit
def _hstu_attention_cached_fwd_kernel(
    q, k, v, out, past_k, past_v, past_times, past_offsets, page_table, pos_weight, time_weight, thresholds,
    seq_offsets, times, query_times, num_targets, plan, stride_q, stride_k, stride_v, head_q, head_k, head_v,
    stride_past_k, stride_past_v, num_heads, most_pages, inverse_n,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SCHEDULE: tl.constexpr, HAS_TARGETS: tl.constexpr, MAX_ATTN_LEN: tl.constexpr,
    PAGE: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M new rows of one head. PAGE is the tokens a page, 0 for contiguous keys."""
    program, head = tl.program_id(0), tl.program_id(1)
    user, first, start, length, new_history = span(
        plan, seq_offsets, num_targets, program // (SCHEDULE // BLOCK_M), HAS_TARGETS
    )
    first += program % (SCHEDULE // BLOCK_M) * BLOCK_M
    if first >= length:
        return
    past_start = tl.load(past_offsets + user)
    num_past = (tl.load(past_offsets + user + 1) - past_start).to(tl.int32)
    history = num_past + new_history

    row = first + tl.arange(0, BLOCK_M)
    row_valid = row < length
    position = num_past + tl.minimum(row, new_history)
    q_rows = load_rows(q + head * head_q, start + row, row_valid, stride_q, D, BLOCK_D, INTERPRET)
    q_times = tl.load(query_times + start + row, mask=row_valid, other=0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    low = 0
    if MAX_ATTN_LEN > 0:
        low = tl.maximum(num_past + tl.minimum(first, new_history) - MAX_ATTN_LEN, 0)
    for begin in range(low // BLOCK_N * BLOCK_N, num_past, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        if PAGE > 0:
            page = tl.load(page_table + user * most_pages + key // PAGE, mask=key < num_past, other=0)
            at = page.to(tl.int64) * PAGE + key % PAGE
        else:
            at = past_start + key
        acc = attend(
            acc, q_rows, q_times, position, row_valid, past_k + head * D, past_v + head * DV, past_times, at, key,
            num_past, pos_weight, time_weight, thresholds, stride_past_k, stride_past_v, D, DV, BLOCK_D, BLOCK_DV,
            MAX_ATTN_LEN, PRECISION, INTERPRET,
        )  # fmt: skip
    low = tl.maximum(low - num_past, 0) // BLOCK_N * BLOCK_N
    for begin in range(low, tl.minimum(first + BLOCK_M, new_history), BLOCK_N):
        new = begin + tl.arange(0, BLOCK_N)
        acc = attend(
            acc, q_rows, q_times, position, row_valid, k + head * head_k, v + head * head_v, times, start + new,
            num_past + new, history, pos_weight, time_weight, thresholds, stride_k, stride_v, D, DV, BLOCK_D,
            BLOCK_DV, MAX_ATTN_LEN, PRECISION, INTERPRET,
        )  # fmt: skip
    if HAS_TARGETS:
        if first + BLOCK_M > new_history:
            acc = attend_themselves(
                acc, q_rows, q_times, row_valid & (row >= new_history), k + head * head_k, v + head * head_v, times,
                start + row, pos_weight, time_weight, thresholds, stride_k, stride_v, D, DV, BLOCK_D, BLOCK_DV,
                INTERPRET,
            )  # fmt: skip
    store_rows(out + head * DV, start + row, row_valid, num_heads * DV, acc * inverse_n, DV, BLOCK_DV)


def forward(
    new: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], bounds: list[int], targets: list[int], seq_offsets: Tensor,
    num_targets: Tensor | None, past: tuple[Tensor, Tensor, Tensor], past_offsets: Tensor, past_bounds: list[int],
    page_table: Tensor | None, pos_weight: Tensor, time_weight: Tensor, max_seq_len: int, max_attn_len: int,
) -> Tensor:  # fmt: skip
    """Return the attention [L, H, DV] of the new tokens; see `op.hstu_attention_cached`."""
    q, k, v, times, query_times = new
    past_k, past_v, past_times = past
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    num_past = [stop - begin for begin, stop in itertools.pairwise(past_bounds)]
    plan = schedule(bounds, targets, num_past).to(q.device)
    if not len(plan):
        return out
    constants = shape_constants(q, v, num_targets, max_attn_len, "cached")
    grid = (len(plan) * (SCHEDULE_ROWS // constants["BLOCK_M"]), q.shape[1])
    with torch.cuda.device_of(q):
        _hstu_attention_cached_fwd_kernel[grid](
            q, k, v, out, past_k, past_v, past_times, past_offsets, plan if page_table is None else page_table,
            pos_weight, time_weight, thresholds_on(q.device), seq_offsets, times, query_times,
            seq_offsets if num_targets is None else num_targets, plan, q.stride(0), k.stride(0), v.stride(0),
            q.stride(1), k.stride(1), v.stride(1), past_k.stride(-3), past_v.stride(-3), q.shape[1],
            0 if page_table is None else page_table.shape[1], 1.0 / max_seq_len,
            PAGE=0 if page_table is None else past_k.shape[1], **constants,
        )  # fmt: skip
    return out


def aot_variants() -> list[Variant]:
    """Return the specialisations that are compiled for GPUs that are not here: paged and not, with candidates."""
    found = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for dim in (32, 64, 128, 256):
            for page in (0, 64):
                q = torch.empty(0, 4, dim, dtype=dtype, device="meta")
                constants = shape_constants(q, q, q, 0, "cached") | {"PAGE": page}
                kernel = "forward, paged" if page else "forward, contiguous"
                found.append(
                    kernel_variant(
                        _hstu_attention_cached_fwd_kernel, kernel, f"{name} d {dim}", constants, name, dim == 256
                    )
                )
    return found

"""HSTU attention on a GPU: rab computed in the kernel from int64 times, nothing of n x n in memory.

Invariant: no atomics. Every output element is summed by one program in a fixed order, so results repeat bit for bit.

Legend: L tokens, B users, H heads, D / DV head dims, h history tokens of a user; rows i are queries, j keys.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import Variant
from kernels.dispatch import interpreted, warps
from kernels.hstu_attention.batch import SCHEDULE_ROWS, schedule
from kernels.hstu_attention.time_buckets import TIME_THRESHOLDS_MS
from kernels.hstu_attention.triton_tile import attend, attend_themselves, load_rows, span, store_rows


@triton.jit
def _hstu_attention_fwd_kernel(
    q, k, v, out, pos_weight, time_weight, thresholds, seq_offsets, times, query_times, num_targets, plan,
    stride_q, stride_k, stride_v, head_q, head_k, head_v, num_heads, inverse_n,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SCHEDULE: tl.constexpr, HAS_TARGETS: tl.constexpr, MAX_ATTN_LEN: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M rows of one head."""
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
    q_rows = load_rows(q + head * head_q, start + row, row_valid, stride_q, D, BLOCK_D, INTERPRET)
    q_times = tl.load(query_times + start + row, mask=row_valid, other=0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    low = 0
    if MAX_ATTN_LEN > 0:
        low = tl.maximum(tl.minimum(first, history) - MAX_ATTN_LEN, 0) // BLOCK_N * BLOCK_N
    for begin in range(low, tl.minimum(first + BLOCK_M, history), BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        acc = attend(
            acc, q_rows, q_times, position, row_valid, k + head * head_k, v + head * head_v, times, start + key, key,
            history, pos_weight, time_weight, thresholds, stride_k, stride_v, D, DV, BLOCK_D, BLOCK_DV, MAX_ATTN_LEN,
            PRECISION, INTERPRET,
        )  # fmt: skip
    if HAS_TARGETS:
        if first + BLOCK_M > history:
            acc = attend_themselves(
                acc, q_rows, q_times, row_valid & (row >= history), k + head * head_k, v + head * head_v, times,
                start + row, pos_weight, time_weight, thresholds, stride_k, stride_v, D, DV, BLOCK_D, BLOCK_DV,
                INTERPRET,
            )  # fmt: skip
    out_stride = num_heads * DV
    store_rows(out + head * DV, start + row, row_valid, out_stride, acc * inverse_n, DV, BLOCK_DV)


Choices = list[tuple[int, tuple[int, int, int, int]]]
# More than 4 warps on 64 rows would form a tile twice on sm_90, where a warp group takes 64 rows.
# direction -> is it fp32? -> (widest padded head dim, (BLOCK_M, BLOCK_N, warps, stages)); bias: BLOCK_N is the chunk.
TILINGS: dict[str, dict[bool, Choices]] = {
    "forward": {
        False: [(32, (64, 32, 4, 2)), (128, (64, 16, 4, 2)), (256, (32, 32, 4, 2))],
        True: [(64, (32, 16, 4, 1)), (128, (16, 32, 4, 1)), (256, (16, 16, 8, 1))],
    },
    "cached": {
        False: [(32, (64, 32, 4, 2)), (64, (64, 16, 4, 2)), (256, (32, 32, 4, 2))],
        True: [(32, (16, 16, 4, 1)), (128, (16, 32, 4, 1)), (256, (16, 16, 8, 1))],
    },
    "kv": {
        False: [(32, (64, 32, 4, 2)), (64, (64, 16, 4, 1)), (256, (32, 32, 4, 1))],
        True: [(64, (32, 16, 4, 1)), (256, (16, 16, 4, 1))],
    },
    "q": {
        False: [(32, (64, 32, 4, 2)), (64, (64, 16, 4, 2)), (256, (32, 32, 4, 1))],
        True: [(32, (32, 16, 4, 1)), (64, (32, 32, 8, 1)), (256, (16, 16, 4, 1))],
    },
    "bias": {False: [(64, (32, 16, 8, 1)), (256, (32, 16, 4, 1))], True: [(256, (32, 16, 8, 1))]},
}


def tiling(dtype: torch.dtype, block_d: int, direction: str) -> tuple[int, int, int, int]:
    """Return BLOCK_M, BLOCK_N, warps and stages, chosen so that nothing spills (docs/kernels.md has the resources)."""
    if interpreted():
        return SCHEDULE_ROWS, SCHEDULE_ROWS, 4, 1
    table = TILINGS[direction][dtype.itemsize >= 4]
    return next(choice for widest, choice in table if block_d <= widest)


def precision() -> str:
    """Return how fp32 products are formed: three TF32 products keep fp32's accuracy on tensor cores; AMD has IEEE."""
    return "ieee" if interpreted() or torch.version.hip else "tf32x3"


_tables: dict[torch.device, Tensor] = {}


def thresholds_on(device: torch.device) -> Tensor:
    """Return the time thresholds int64 [128] on a device, copied there once."""
    if device not in _tables:
        _tables[device] = torch.tensor(TIME_THRESHOLDS_MS, dtype=torch.int64, device=device)
    return _tables[device]


def block_dim(dim: int) -> int:
    """Return the width that a head of `dim` is padded to inside a kernel; products need 16 at least."""
    return max(16, int(triton.next_power_of_2(dim)))


def scheduled(seq_offsets: Tensor, num_targets: Tensor | None, plan: Tensor) -> Tensor:
    """Return the order of tiles, int32 [T, 2], of a plan made for another device too (tests in the interpreter)."""
    if plan.dtype == torch.int32:
        return plan
    bounds = seq_offsets.tolist()
    targets = [0] * (len(bounds) - 1) if num_targets is None else num_targets.tolist()
    return schedule(bounds, targets).to(seq_offsets.device)


def shape_constants(
    q: Tensor, v: Tensor, num_targets: Tensor | None, max_attn_len: int, direction: str
) -> dict[str, Any]:
    """Return the constants of a launch that depend on shapes and dtype."""
    dim, v_dim = q.shape[2], v.shape[2]
    block_m, block_n, num_warps, num_stages = tiling(q.dtype, block_dim(max(dim, v_dim)), direction)
    return {
        "D": dim, "DV": v_dim, "BLOCK_D": block_dim(dim), "BLOCK_DV": block_dim(v_dim), "BLOCK_M": block_m,
        "BLOCK_N": block_n, "SCHEDULE": SCHEDULE_ROWS, "HAS_TARGETS": num_targets is not None,
        "MAX_ATTN_LEN": max_attn_len, "PRECISION": precision(), "INTERPRET": interpreted(),
        "num_warps": warps(num_warps, amd=bool(torch.version.hip)), "num_stages": num_stages,
    }  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, pos_weight: Tensor, time_weight: Tensor, seq_offsets: Tensor, times: Tensor,
    query_times: Tensor, num_targets: Tensor | None, plan: Tensor, max_seq_len: int, max_attn_len: int,
) -> Tensor:  # fmt: skip
    """Return attention [L, H, DV], see `reference.hstu_attention`."""
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    plan = scheduled(seq_offsets, num_targets, plan)
    if not len(plan):
        return out
    constants = shape_constants(q, v, num_targets, max_attn_len, "forward")
    grid = (len(plan) * (SCHEDULE_ROWS // constants["BLOCK_M"]), q.shape[1])
    targets = seq_offsets if num_targets is None else num_targets
    with torch.cuda.device_of(q):
        _hstu_attention_fwd_kernel[grid](
            q, k, v, out, pos_weight, time_weight, thresholds_on(q.device), seq_offsets, times, query_times, targets,
            plan, q.stride(0), k.stride(0), v.stride(0), q.stride(1), k.stride(1), v.stride(1), q.shape[1],
            1.0 / max_seq_len, **constants,
        )  # fmt: skip
    return out


POINTERS = {
    "q": None, "k": None, "v": None, "out": None, "grad": None, "dq": None, "dk": None, "dv": None,
    "pos_weight": "*fp32", "time_weight": "*fp32", "thresholds": "*i64", "seq_offsets": "*i64", "times": "*i64",
    "query_times": "*i64", "num_targets": "*i64", "plan": "*i32",
    "d_pos": "*fp32", "d_time": "*fp32", "past_k": None, "past_v": None, "past_times": "*i64", "past_offsets": "*i64",
    "page_table": "*i32",
}  # fmt: skip


def aot_variants() -> list[Variant]:
    """Return the specialisations that are compiled for GPUs that are not here: dtypes and head dims, with targets."""
    from kernels.hstu_attention import triton_backward as bwd

    kernels = (
        ("forward", "forward", _hstu_attention_fwd_kernel),
        ("backward of k, v", "kv", bwd._hstu_attention_bwd_kv_kernel),
        ("backward of q", "q", bwd._hstu_attention_bwd_q_kernel),
        ("backward of rab", "bias", bwd.hstu_attention_bwd_bias_kernel),
    )
    found = []
    for kernel, direction, fn in kernels:
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            for dim in (32, 64, 128, 256):
                q = torch.empty(0, 4, dim, dtype=dtype, device="meta")
                constants = shape_constants(q, q, q, 0, direction)
                if direction == "bias":
                    constants["CHUNK"] = constants["BLOCK_N"]
                may_spill = dim == 256 or (dim == 128 and name == "fp32" and direction != "forward")
                found.append(kernel_variant(fn, kernel, f"{name} d {dim}", constants, name, may_spill))
    return found


def kernel_variant(fn: Any, kernel: str, label: str, constants: dict[str, Any], dtype: str, may_spill: bool) -> Variant:
    """Return what compiles `fn` ahead of time with the constants of a launch for tensors of `dtype`."""
    launch = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    signature = {}
    for name in fn.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = POINTERS[name] or f"*{dtype}"
        else:
            signature[name] = "fp32" if name == "inverse_n" else "i32"
    aligned = tuple(name for name in fn.arg_names if name.startswith(("stride_", "head_")))
    return Variant(
        kernel=kernel,
        label=label,
        fn=fn,
        signature=signature,
        constexprs={k: v for k, v in constants.items() if k in fn.arg_names},
        aligned=aligned,
        may_spill=may_spill,
        **launch,
    )

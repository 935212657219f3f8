"""Joining each user's history with its targets, taking them apart again, and one row of each user.

Invariant: rows move and are never computed on, so results and gradients are bit-exact. Each operation is one gather
whose index costs an integer a row; that is as fast as the memory, so there is no Triton kernel, and being plain
PyTorch it differentiates, exports and compiles by itself.

Legend: B users, La and Lb rows of two jagged tensors, L = La + Lb. Rows are counted by `shape[0]`: `len` would make the
count a constant of an exported graph.
"""

import torch
from torch import Tensor

from kernels.dispatch import require, require_tensor


def jagged_concat(a: Tensor, a_offsets: Tensor, b: Tensor, b_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each user's rows of `a`, then of `b`: values [L, ...] and offsets int64 [B + 1].

    a [La, ...] and b [Lb, ...] of one dtype; offsets int64 [B + 1], from 0 to the number of rows. Differentiable.
    Raises ValueError naming the argument; values of offsets are checked on the CPU only, nothing while compiling.
    """
    if not torch.compiler.is_compiling():
        _require_offsets("a_offsets", a_offsets, a.shape[0], a)
        _require_offsets("b_offsets", b_offsets, b.shape[0], a, len(a_offsets))
        require(a.shape[1:] == b.shape[1:], "shape of b", list(b.shape), f"{['any', *a.shape[1:]]}, as a")
        require(a.dtype == b.dtype, "dtype of b", b.dtype, f"{a.dtype}, as a")
    offsets = a_offsets + b_offsets
    user = _user_of_row(offsets, a.shape[0] + b.shape[0])
    row = torch.arange(a.shape[0] + b.shape[0], device=a.device)
    # A row of `a` moved up by its predecessors' rows of b, a row of `b` by its own and its predecessors' rows of a.
    ends = a_offsets[1:].index_select(0, user)
    befores = b_offsets.index_select(0, user)
    source = torch.where(row < ends + befores, row - befores, a.shape[0] + row - ends)
    return torch.cat([a, b]).index_select(0, source), offsets


def jagged_split(
    values: Tensor, a_offsets: Tensor, b_offsets: Tensor, *, num_a: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the inverse of `jagged_concat`: a [La, ...] and b [Lb, ...] of values [La + Lb, ...]. Differentiable.

    num_a: La, where the caller knows it; else it is read from a_offsets, which waits for a GPU and breaks a compiled
    graph. Raises ValueError as `jagged_concat` does.
    """
    if not torch.compiler.is_compiling():
        num_a = int(a_offsets[-1:].sum()) if num_a is None else num_a
        require(0 <= num_a <= values.shape[0], "rows of a", num_a, f"in 0..{values.shape[0]}, the rows of values")
        _require_offsets("a_offsets", a_offsets, num_a, values)
        _require_offsets("b_offsets", b_offsets, values.shape[0] - num_a, values, len(a_offsets))
    num_a = int(a_offsets[-1]) if num_a is None else num_a
    num_b = values.shape[0] - num_a
    into_a = torch.arange(num_a, device=values.device)
    into_a = into_a + b_offsets.index_select(0, _user_of_row(a_offsets, num_a))
    into_b = torch.arange(num_b, device=values.device)
    into_b = into_b + a_offsets[1:].index_select(0, _user_of_row(b_offsets, num_b))
    return values.index_select(0, into_a), values.index_select(0, into_b)


def jagged_gather(values: Tensor, offsets: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return one row of each user [B, ...], by default the last. Differentiable in values.

    positions int64 [B]: from the user's first row, or, negative, from its end (-1: the last).
    Raises ValueError as `jagged_concat` does, also if a user has no such row.
    """
    if positions is None:
        positions = torch.full_like(offsets[1:], -1)
    if not torch.compiler.is_compiling():
        _require_offsets("offsets", offsets, values.shape[0], values)
        _require_positions(positions, offsets.diff(), values)
    return values.index_select(0, torch.where(positions < 0, offsets[1:], offsets[:-1]) + positions)


def _user_of_row(offsets: Tensor, num_rows: int) -> Tensor:
    users = torch.arange(len(offsets) - 1, device=offsets.device)
    return users.repeat_interleave(offsets.diff(), output_size=num_rows)


def _require_offsets(argument: str, offsets: Tensor, total: int, values: Tensor, length: int | None = None) -> None:
    require_tensor(argument, offsets, shape=(length,), dtype=torch.int64, like=values)
    if not offsets.is_cuda:
        bounds = offsets[:1].tolist() + offsets[-1:].tolist()
        shown = f"{offsets[:3].tolist()}..{bounds[-1:]}"
        require(bounds == [0, total], argument, shown, f"from 0 to the number of rows, {total}")
        require(bool((offsets.diff() >= 0).all()), argument, shown, "nowhere decreasing")


def _require_positions(positions: Tensor, lengths: Tensor, values: Tensor) -> None:
    require_tensor("positions", positions, shape=(len(lengths),), dtype=torch.int64, like=values)
    if not positions.is_cuda:
        inside = (positions < lengths) & (positions >= -lengths)
        shown = f"{positions[~inside][:3].tolist()} of users with {lengths[~inside][:3].tolist()} rows"
        require(bool(inside.all()), "positions", shown, "a row that the user has")

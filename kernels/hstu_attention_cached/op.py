"""The one entry to cached HSTU attention, and its registration as `gr::hstu_attention_cached`: forward only.

Invariant: the rows equal those of the whole sequence computed at once, for every split into past and new tokens.

Legend: L new tokens, B users, P past tokens of a user, H heads, D / Dv head dims, N max_seq_len.
"""

import itertools
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from kernels.dispatch import Backend, choose, outside_autocast, require, require_tensor, traced_or_cast
from kernels.hstu_attention.batch import checked_offsets
from kernels.hstu_attention.op import check, compute_dtype
from kernels.hstu_attention_cached import cpu, reference


@dataclass(frozen=True, slots=True)
class PastKV:
    """Keys and values of B users' past tokens in one layer; offsets int64 [B + 1] give each user's number of tokens.

    Contiguous: k [sum P, H, D], v [sum P, H, Dv], times int64 [sum P] ms, one user after the other.
    Paged: k [pages, page, H, D], v [pages, page, H, Dv], times [pages, page]; page_table int32 [B, most pages a user
    has] names a user's pages in order.
    """

    k: Tensor
    v: Tensor
    times: Tensor
    offsets: Tensor
    page_table: Tensor | None = None


def hstu_attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    times: Tensor,
    query_times: Tensor,
    past: PastKV,
    pos_weight: Tensor,
    time_weight: Tensor,
    max_seq_len: int,
    *,
    num_targets: Tensor | None = None,
    max_attn_len: int = 0,
    tiles: list[Tensor] | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Return the attention [L, H, Dv] of new tokens over past and new ones, without a gradient.

    q, k [L, H, D], v [L, H, Dv], seq_offsets int64 [B + 1], times and query_times int64 [L] ms: the new tokens; the
    last num_targets (int64 [B]) of each user's are candidates, which see all history and themselves. tiles: the work
    that the layers of a step share, of `shared_tiles`, or None. The rest as in `hstu_attention`. Raises ValueError
    naming the argument. Source: PAPER section 4.
    """
    chosen = choose(backend, q)
    check(q, k, v, pos_weight, time_weight, len(times), max_seq_len, max_attn_len, chosen)
    require_tensor("times", times, shape=(len(q),), dtype=torch.int64, like=q)
    require_tensor("query_times", query_times, shape=(len(q),), dtype=torch.int64, like=q)
    require_tensor("seq_offsets", seq_offsets, shape=(None,), dtype=torch.int64, like=q)
    if num_targets is not None:
        require_tensor("num_targets", num_targets, shape=(len(seq_offsets) - 1,), dtype=torch.int64, like=q)
    _check_past(past, q, v, len(seq_offsets) - 1)
    arguments = (
        q, k, v, seq_offsets, times, query_times, num_targets, past.k, past.v, past.times, past.offsets,
        past.page_table, pos_weight, time_weight, max_seq_len, max_attn_len,
    )  # fmt: skip
    if chosen == "reference":
        check_lengths(seq_offsets, num_targets, past.offsets, len(q), max_seq_len)
        check_places(past.offsets.tolist(), past.k, past.page_table)
        wide: list[Any] = [x.to(compute_dtype(q)) if _is_float(x) else x for x in arguments]
        return reference.hstu_attention_cached(*wide).to(v.dtype)
    if not torch.is_grad_enabled() and not traced_or_cast(q):
        # The registered op would add nothing but its 20 us a call, which matter when serving one token.
        return _on_backend(*arguments, list(tiles or ()), chosen)
    return _cached(*arguments, list(tiles or ()), chosen)


def _is_float(x: Any) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and x.is_floating_point()


def _check_past(past: PastKV, q: Tensor, v: Tensor, num_users: int) -> None:
    heads, dim, v_dim = q.shape[1], q.shape[2], v.shape[2]
    require_tensor("past.offsets", past.offsets, shape=(num_users + 1,), dtype=torch.int64, like=q)
    rows: tuple[int | None, ...] = (None,)
    if past.page_table is not None:
        require_tensor("past.page_table", past.page_table, shape=(num_users, None), dtype=torch.int32, like=q)
        rows = (None, None)
    require_tensor("past.k", past.k, shape=(*rows, heads, dim), dtype=q.dtype, like=q)
    rows = tuple(past.k.shape[: len(rows)])
    require_tensor("past.v", past.v, shape=(*rows, heads, v_dim), dtype=q.dtype, like=q)
    require_tensor("past.times", past.times, shape=rows, dtype=torch.int64, like=q)
    for name, x in (("past.k", past.k), ("past.v", past.v), ("past.times", past.times)):
        require(x.is_contiguous(), f"stride of {name}", x.stride(), "contiguous")


def check_lengths(
    seq_offsets: Tensor, num_targets: Tensor | None, past_offsets: Tensor, num_tokens: int, max_seq_len: int
) -> tuple[list[int], list[int], list[int]]:
    """Return new-token bounds, targets and past bounds. Raises ValueError if they do not fit each other or N."""
    bounds = checked_offsets("seq_offsets", seq_offsets, num_tokens, like=seq_offsets)
    past_bounds = checked_offsets("past.offsets", past_offsets, int(past_offsets[-1]), like=past_offsets)
    targets = [0] * (len(bounds) - 1) if num_targets is None else num_targets.tolist()
    pairs = zip(itertools.pairwise(bounds), itertools.pairwise(past_bounds), targets, strict=True)
    for user, ((start, stop), (past_start, past_stop), m) in enumerate(pairs):
        new = stop - start
        require(0 <= m <= new, f"num_targets[{user}]", m, f"between 0 and the user's {new} new tokens")
        history = past_stop - past_start + new - m
        require(
            history + (m > 0) <= max_seq_len,
            "max_seq_len",
            max_seq_len,
            f"at least {history + (m > 0)}, the history of user {user}; cut it to max_events",
        )
    return bounds, targets, past_bounds


def check_places(past_bounds: list[int], past_k: Tensor, page_table: Tensor | None) -> None:
    """Raise ValueError unless every past token has a place in `past_k`."""
    if page_table is None:
        require(past_bounds[-1] == len(past_k), "past.offsets", f"..{past_bounds[-1:]}", f"ending at {len(past_k)}")
        return
    num_pages, page = past_k.shape[:2]
    for user, (start, stop) in enumerate(itertools.pairwise(past_bounds)):
        used = -(-(stop - start) // max(page, 1))
        room = page_table.shape[1] * page
        rule = f"at most {room}, what page_table has room for"
        require(stop - start <= room, "past.offsets", f"a user with {stop - start} tokens", rule)
        named = page_table[user, :used].tolist()
        good = all(0 <= place < num_pages for place in named)
        require(good, f"past.page_table[{user}]", named, f"page numbers in 0..{num_pages - 1}")


def shared_tiles(
    seq_offsets: Tensor, times: Tensor, query_times: Tensor, past: PastKV, num_targets: Tensor | None = None
) -> list[Tensor] | None:
    """Return the time buckets that the layers of a step share, arguments as in `hstu_attention_cached`; None on a GPU,
    whose kernel forms them itself."""
    if times.is_cuda:
        return None
    users = cpu.Users(
        seq_offsets.tolist(),
        [0] * (len(seq_offsets) - 1) if num_targets is None else num_targets.tolist(),
        past.offsets.tolist(),
        past.page_table,
    )
    return list(cpu.buckets(users, times, query_times, past.times))


def _on_backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    times: Tensor,
    query_times: Tensor,
    num_targets: Tensor | None,
    past_k: Tensor,
    past_v: Tensor,
    past_times: Tensor,
    past_offsets: Tensor,
    page_table: Tensor | None,
    pos_weight: Tensor,
    time_weight: Tensor,
    max_seq_len: int,
    max_attn_len: int,
    tiles: list[Tensor],
    backend: str,
) -> Tensor:
    # Lengths are values, so they are looked at here, where tracing does not come.
    bounds, targets, past_bounds = check_lengths(seq_offsets, num_targets, past_offsets, len(q), max_seq_len)
    check_places(past_bounds, past_k, page_table)
    constants = (max_seq_len, max_attn_len)
    if backend == "triton":
        from kernels.hstu_attention_cached import triton

        return triton.forward(
            (q, k, v, times, query_times), bounds, targets, seq_offsets, num_targets, (past_k, past_v, past_times),
            past_offsets, past_bounds, page_table, pos_weight, time_weight, *constants,
        )  # fmt: skip
    wide = compute_dtype(q)
    new = (q.to(wide), k.to(wide), v.to(wide), times, query_times)
    past = (past_k.to(wide), past_v.to(wide), past_times)
    users = cpu.Users(bounds, targets, past_bounds, page_table)
    weights = (pos_weight.to(wide), time_weight.to(wide))
    return cpu.forward(new, users, past, *weights, tiles or None, *constants).to(v.dtype)


@torch.library.custom_op("gr::hstu_attention_cached", mutates_args=())
@outside_autocast
def _cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    times: Tensor,
    query_times: Tensor,
    num_targets: Tensor | None,
    past_k: Tensor,
    past_v: Tensor,
    past_times: Tensor,
    past_offsets: Tensor,
    page_table: Tensor | None,
    pos_weight: Tensor,
    time_weight: Tensor,
    max_seq_len: int,
    max_attn_len: int,
    tiles: list[Tensor],
    backend: str,
) -> Tensor:
    return _on_backend(
        q, k, v, seq_offsets, times, query_times, num_targets, past_k, past_v, past_times, past_offsets, page_table,
        pos_weight, time_weight, max_seq_len, max_attn_len, tiles, backend,
    )  # fmt: skip


@_cached.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape)

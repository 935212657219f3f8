"""Softmax losses on a GPU: gathered rows and logits live in registers and shared memory alone.

Invariant: results are deterministic (no atomics): gradients of items are sums in the order of the tokens, partials are
added by `torch.sum`. Every row number is checked before it becomes an address: outside the table it reads nothing and
gives NaN.

Three ways over the logits: a token's own negatives are gathered, tile by tile; shared negatives are a product with
tiles of rows; the items' gradient sums weighted rows item by item, over pairs sorted by item.

Legend: as in reference.py; pairs are (token, item) of the [T, M + 1] logits, the target's first. All arithmetic is in
fp32; 16 bit values are exact in TF32, so their products run on tensor cores in it, fp32 ones in full precision.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot import Variant
from kernels.dispatch import interpreted

# Programs that fill a large GPU, and the most partial gradients [M, d] of shared negatives that are held to get there.
WANTED_PROGRAMS, MAX_SPLITS = 264, 32
OPTIONS = {"num_warps": 4, "num_stages": 2}


@triton.jit
def _rows(table, ids, num_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return rows [..., BLOCK_D] of the table by ids [...], zero where an id is outside it."""
    columns = tl.arange(0, BLOCK_D)
    inside = (ids >= 0) & (ids < num_rows)
    address = tl.expand_dims(ids.to(tl.int64) * D, -1) + columns
    return tl.load(table + address, mask=tl.expand_dims(inside, -1) & (columns < D), other=0.0).to(tl.float32)


@triton.jit
def _targets_of(targets, tokens, live, num_items):
    """Return the targets of tokens, and NaN where one is outside the table, else 0."""
    target = tl.load(targets + tokens, mask=live, other=0)
    return target, tl.where((target >= 0) & (target < num_items), 0.0, float("nan"))


@triton.jit
def _mask_logits(logits, ids, target, present, num_items):
    """Return logits that are -inf where absent or a hit, and NaN where the id is outside the table."""
    logits = tl.where((ids >= 0) & (ids < num_items), logits, float("nan"))
    return tl.where(present & (ids != target), logits, float("-inf"))


@triton.jit
def _own_fwd_kernel(
    users, items, targets, negatives, losses, lse,
    num_tokens, num_items, num_negatives, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = tokens < num_tokens
    user = _rows(users, tokens, num_tokens, D, BLOCK_D) * scale
    target, bad = _targets_of(targets, tokens, live, num_items)
    positive = tl.sum(user * _rows(items, target, num_items, D, BLOCK_D), 1) + bad
    high, total = positive, tl.full([BLOCK_T], 1.0, tl.float32)
    for start in range(0, num_negatives, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        present = live[:, None] & (column < num_negatives)[None, :]
        ids = tl.load(negatives + tokens[:, None] * num_negatives + column[None, :], mask=present, other=0)
        logits = tl.sum(user[:, None, :] * _rows(items, ids, num_items, D, BLOCK_D), 2)
        logits = _mask_logits(logits, ids, target[:, None], present, num_items)
        higher = tl.maximum(high, tl.max(logits, 1))
        total = total * tl.exp(high - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        high = higher
    log_total = high + tl.log(total)
    tl.store(lse + tokens, log_total, mask=live)
    tl.store(losses + tokens, log_total - positive, mask=live)


@triton.jit
def _own_bwd_kernel(
    grad, users, items, targets, negatives, lse, d_users, weights,
    num_tokens, num_items, num_negatives, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = tokens < num_tokens
    user = _rows(users, tokens, num_tokens, D, BLOCK_D) * scale
    target, bad = _targets_of(targets, tokens, live, num_items)
    log_total = tl.load(lse + tokens, mask=live, other=0.0)
    slope = tl.load(grad + tokens, mask=live, other=0.0).to(tl.float32) * scale
    wanted = _rows(items, target, num_items, D, BLOCK_D)
    weight = (tl.exp(tl.sum(user * wanted, 1) + bad - log_total) - 1.0) * slope
    first = tokens * (num_negatives + 1)
    tl.store(weights + first, weight, mask=live)
    d_user = weight[:, None] * wanted
    for start in range(0, num_negatives, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        present = live[:, None] & (column < num_negatives)[None, :]
        ids = tl.load(negatives + tokens[:, None] * num_negatives + column[None, :], mask=present, other=0)
        drawn = _rows(items, ids, num_items, D, BLOCK_D)
        logits = _mask_logits(tl.sum(user[:, None, :] * drawn, 2), ids, target[:, None], present, num_items)
        weight_TM = tl.exp(logits - log_total[:, None]) * slope[:, None]
        tl.store(weights + first[:, None] + 1 + column[None, :], weight_TM, mask=present)
        d_user += tl.sum(weight_TM[:, :, None] * drawn, 1)
    columns = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (columns < D)[None, :]
    tl.store(d_users + tokens[:, None] * D + columns[None, :], d_user, mask=mask)


@triton.jit
def _item_sums_kernel(
    source, weights, order, bounds, out, num_sources, group,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out[v] = sum over the pairs p of item v, order[bounds[v]:bounds[v + 1]], of weights[p] * source[p // group]."""
    item = tl.program_id(0).to(tl.int64)
    first, last = tl.load(bounds + item), tl.load(bounds + item + 1)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_P):
        at = start + tl.arange(0, BLOCK_P)
        pair = tl.load(order + at, mask=at < last, other=0)
        weight = tl.load(weights + pair, mask=at < last, other=0.0)
        total += weight[:, None] * _rows(source, pair // group, num_sources, D, BLOCK_D)
    columns = tl.arange(0, BLOCK_D)
    tl.store(out + item * D + columns, tl.sum(total, 0), mask=columns < D)


@triton.jit
def _shared_fwd_kernel(
    users, items, targets, negatives, losses, lse,
    num_tokens, num_items, num_negatives, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = tokens < num_tokens
    user = _rows(users, tokens, num_tokens, D, BLOCK_D)
    target, bad = _targets_of(targets, tokens, live, num_items)
    positive = tl.sum(user * _rows(items, target, num_items, D, BLOCK_D), 1) * scale + bad
    high, total = positive, tl.full([BLOCK_T], 1.0, tl.float32)
    for start in range(0, num_negatives, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        present = column < num_negatives
        ids = tl.load(negatives + column, mask=present, other=0)
        drawn = _rows(items, ids, num_items, D, BLOCK_D)
        logits = tl.dot(user, tl.trans(drawn), input_precision=PRECISION) * scale
        logits = _mask_logits(logits, ids[None, :], target[:, None], present[None, :], num_items)
        higher = tl.maximum(high, tl.max(logits, 1))
        total = total * tl.exp(high - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        high = higher
    log_total = high + tl.log(total)
    tl.store(lse + tokens, log_total, mask=live)
    tl.store(losses + tokens, log_total - positive, mask=live)


@triton.jit
def _shared_bwd_users_kernel(
    grad, users, items, targets, negatives, lse, d_users, weights,
    num_tokens, num_items, num_negatives, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Also stores what the target's own row is weighted by, [T]."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = tokens < num_tokens
    user = _rows(users, tokens, num_tokens, D, BLOCK_D)
    target, bad = _targets_of(targets, tokens, live, num_items)
    log_total = tl.load(lse + tokens, mask=live, other=0.0)
    slope = tl.load(grad + tokens, mask=live, other=0.0).to(tl.float32) * scale
    wanted = _rows(items, target, num_items, D, BLOCK_D)
    excess = tl.exp(tl.sum(user * wanted, 1) * scale + bad - log_total) - 1.0
    tl.store(weights + tokens, excess * slope, mask=live)
    d_user = excess[:, None] * wanted
    for start in range(0, num_negatives, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        present = column < num_negatives
        ids = tl.load(negatives + column, mask=present, other=0)
        drawn = _rows(items, ids, num_items, D, BLOCK_D)
        logits = tl.dot(user, tl.trans(drawn), input_precision=PRECISION) * scale
        logits = _mask_logits(logits, ids[None, :], target[:, None], present[None, :], num_items)
        d_user += tl.dot(tl.exp(logits - log_total[:, None]), drawn, input_precision=PRECISION)
    columns = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (columns < D)[None, :]
    tl.store(d_users + tokens[:, None] * D + columns[None, :], d_user * slope[:, None], mask=mask)


@triton.jit
def _shared_bwd_items_kernel(
    grad, users, items, targets, negatives, lse, partials,
    num_tokens, num_items, num_negatives, scale, tokens_each,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partials[s, m] = gradient of the m-th drawn row from the s-th `tokens_each` tokens."""
    split = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = column < num_negatives
    ids = tl.load(negatives + column, mask=present, other=0)
    drawn = _rows(items, ids, num_items, D, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.minimum((split + 1) * tokens_each, num_tokens)
    for start in range(split * tokens_each, last, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        live = tokens < last
        user = _rows(users, tokens, last, D, BLOCK_D)
        target, _ = _targets_of(targets, tokens, live, num_items)
        log_total = tl.load(lse + tokens, mask=live, other=0.0)
        slope = tl.load(grad + tokens, mask=live, other=0.0).to(tl.float32) * scale
        logits = tl.dot(drawn, tl.trans(user), input_precision=PRECISION) * scale
        logits = _mask_logits(logits, ids[:, None], target[None, :], present[:, None] & live[None, :], num_items)
        total += tl.dot(tl.exp(logits - log_total[None, :]) * slope[None, :], user, input_precision=PRECISION)
    columns = tl.arange(0, BLOCK_D)
    address = (split * num_negatives + column)[:, None] * D + columns[None, :]
    tl.store(partials + address, total, mask=present[:, None] & (columns < D)[None, :])


def _padded(width: int) -> int:
    """Return the width inside kernels: products need 16 at least."""
    return max(16, triton.next_power_of_2(width))


def _own_constants(width: int) -> dict[str, int]:
    """Tokens and negatives a tile: 2,048 gathered values at most, so that they stay in registers."""
    tokens, negatives = (64, 64) if interpreted() else (2, max(4, 1024 // _padded(width)))
    return {"D": width, "BLOCK_D": _padded(width), "BLOCK_T": tokens, "BLOCK_M": negatives}


def _sums_constants(width: int) -> dict[str, int]:
    pairs = 1024 if interpreted() else 2048 // _padded(width)
    return {"D": width, "BLOCK_D": _padded(width), "BLOCK_P": pairs}


def _shared_constants(width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tokens and rows a tile: the largest that spill on no NVIDIA GPU they are compiled for.

    A full precision product holds both of its operands in registers.
    """
    exact = dtype == torch.float32
    tokens, rows = (16, 32) if exact else (64, 64) if width <= 64 else (32, 32)
    if interpreted():
        tokens, rows = 64, 64
    precision = "ieee" if exact else "tf32"
    return {"D": width, "BLOCK_D": _padded(width), "BLOCK_T": tokens, "BLOCK_M": rows, "PRECISION": precision}


def forward(
    users: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the losses [T] and the log-sum-exp [T] of all logits, fp32; contiguous arguments."""
    losses, lse = (torch.empty(len(users), dtype=torch.float32, device=users.device) for _ in range(2))
    if not len(users):
        return losses, lse
    own, width = negatives.dim() == 2, users.shape[1]
    constants = _own_constants(width) if own else _shared_constants(width, users.dtype)
    (_own_fwd_kernel if own else _shared_fwd_kernel)[(triton.cdiv(len(users), constants["BLOCK_T"]),)](
        users, items, targets, negatives, losses, lse,
        len(users), len(items), negatives.shape[-1], 1.0 / temperature,
        **constants, **OPTIONS,
    )  # fmt: skip
    return losses, lse


def backward(
    grad: Tensor, users: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, lse: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of users and items in their dtypes; contiguous arguments."""
    if not len(users):
        return torch.empty_like(users), torch.zeros_like(items)
    if negatives.dim() == 1:
        return _shared_backward(grad, users, items, targets, negatives, lse, temperature)
    d_users, num_negatives = torch.empty_like(users), negatives.shape[1]
    weights = torch.empty(len(users), num_negatives + 1, dtype=torch.float32, device=users.device)
    constants = _own_constants(users.shape[1])
    _own_bwd_kernel[(triton.cdiv(len(users), constants["BLOCK_T"]),)](
        grad, users, items, targets, negatives, lse, d_users, weights,
        len(users), len(items), num_negatives, 1.0 / temperature,
        **constants, **OPTIONS,
    )  # fmt: skip
    ids = torch.cat([targets[:, None], negatives], dim=1)
    return d_users, _item_sums(users, weights, ids.view(-1), num_negatives + 1, items)


def _shared_backward(
    grad: Tensor, users: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, lse: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    d_users, num_negatives = torch.empty_like(users), len(negatives)
    constants = _shared_constants(users.shape[1], users.dtype)
    options: dict[str, Any] = constants | OPTIONS
    inputs = grad, users, items, targets, negatives, lse
    sizes = len(users), len(items), num_negatives, 1.0 / temperature
    weights = torch.empty(len(users), dtype=torch.float32, device=users.device)
    tiles, columns = (triton.cdiv(n, constants[b]) for n, b in ((len(users), "BLOCK_T"), (num_negatives, "BLOCK_M")))
    _shared_bwd_users_kernel[(tiles,)](*inputs, d_users, weights, *sizes, **options)
    splits = min(MAX_SPLITS, tiles, triton.cdiv(WANTED_PROGRAMS, max(1, columns)))
    partials = torch.empty(splits, num_negatives, users.shape[1], dtype=torch.float32, device=users.device)
    if num_negatives:
        tokens_each = triton.cdiv(len(users), splits)
        _shared_bwd_items_kernel[(columns, splits)](*inputs, partials, *sizes, tokens_each, **options)
    # The drawn rows' gradients and the users, which pull on their targets, are summed by item in one go.
    source = torch.cat([partials.sum(0), users.float()])
    weights = torch.cat([torch.ones(num_negatives, device=users.device), weights])
    return d_users, _item_sums(source, weights, torch.cat([negatives, targets]), 1, items)


def _item_sums(source: Tensor, weights: Tensor, ids: Tensor, group: int, items: Tensor) -> Tensor:
    """Return the gradient of items: pair p adds weights[p] * source[p // group] to row ids[p]."""
    by_item, order = torch.sort(ids, stable=True)
    bounds = torch.searchsorted(by_item, torch.arange(len(items) + 1, device=ids.device))
    d_items = torch.empty_like(items)
    _item_sums_kernel[(len(items),)](
        source, weights, order, bounds, d_items, len(source), group,
        **_sums_constants(source.shape[1]), **OPTIONS,
    )  # fmt: skip
    return d_items


def aot_variants() -> list[Variant]:
    """Return the kernels as launched for widths 50, 64, 128 and 256 in fp32 and bf16."""
    return [
        Variant(
            kernel=kernel,
            label=f"{name} d {width}",
            fn=fn,
            signature={arg: _argument_type(arg, name, constants) for arg in fn.arg_names},
            constexprs=constants,
            num_warps=OPTIONS["num_warps"],
            num_stages=OPTIONS["num_stages"],
        )
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        for width in (50, 64, 128, 256)
        for kernel, fn, constants in _launched(width, dtype)
    ]


def _launched(width: int, dtype: torch.dtype) -> list[tuple[str, Any, dict[str, Any]]]:
    """Return every kernel, named by what it does, with the constants that the launchers above give it."""
    own, shared = _own_constants(width), _shared_constants(width, dtype)
    return [
        ("own negatives, forward", _own_fwd_kernel, own),
        ("own negatives, backward of users", _own_bwd_kernel, own),
        ("sums by item", _item_sums_kernel, _sums_constants(width)),
        ("shared negatives, forward", _shared_fwd_kernel, shared),
        ("shared negatives, backward of users", _shared_bwd_users_kernel, shared),
        ("shared negatives, backward of items", _shared_bwd_items_kernel, shared),
    ]


def _argument_type(argument: str, dtype: str, constants: dict[str, Any]) -> str:
    if argument in constants:
        return "constexpr"
    if argument in ("targets", "negatives", "order", "bounds"):
        return "*i64"
    if argument in ("losses", "lse", "grad", "weights", "partials"):
        return "*fp32"
    if argument in ("users", "items", "d_users", "source", "out"):
        return f"*{dtype}"
    return "fp32" if argument == "scale" else "i32"

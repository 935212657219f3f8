"""The jagged operations as loops over users: obviously right.

Legend: B users, La and Lb rows of two jagged tensors, L = La + Lb.
"""

import itertools

import torch
from torch import Tensor


def _users(values: Tensor, offsets: Tensor) -> list[Tensor]:
    return [values[start:stop] for start, stop in itertools.pairwise(offsets.tolist())]


def jagged_concat(a: Tensor, a_offsets: Tensor, b: Tensor, b_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each user's rows of `a`, then of `b`: values [L, ...] and offsets [B + 1]."""
    pairs = zip(_users(a, a_offsets), _users(b, b_offsets), strict=True)
    return torch.cat([a[:0], b[:0], *itertools.chain.from_iterable(pairs)]), a_offsets + b_offsets


def jagged_split(values: Tensor, a_offsets: Tensor, b_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse of `jagged_concat`: a [La, ...] and b [Lb, ...]."""
    users = _users(values, a_offsets + b_offsets)
    cuts = a_offsets.diff().tolist()
    a = [user[:cut] for user, cut in zip(users, cuts, strict=True)]
    b = [user[cut:] for user, cut in zip(users, cuts, strict=True)]
    return torch.cat([values[:0], *a]), torch.cat([values[:0], *b])


def jagged_gather(values: Tensor, offsets: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return one row of each user [B, ...]; a negative position counts from the user's end, None takes the last."""
    users = _users(values, offsets)
    places = [-1] * len(users) if positions is None else positions.tolist()
    return torch.cat([values[:0], *(user[place][None] for user, place in zip(users, places, strict=True))])

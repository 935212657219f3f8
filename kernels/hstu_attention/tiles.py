"""How the CPU path cuts a jagged batch into tiles that stay in cache, and the time buckets of every tile.

Invariant: the tiles of a user depend on its own length alone, never on its batch mates: users share a padded product
only if their lengths round up to the same multiple, so every product has the same shape whoever else is there.

Legend: G users of a group, n their padded history length, h a user's history length, m its targets.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hstu_attention.time_buckets import TIME_THRESHOLDS_MS

ROWS = 128
LENGTH_STEP = 16
# Elements of one tile and head: its scores stay in the caches, and users of a batch make few groups.
TILE_ELEMENTS = 1 << 18
# Buckets that take no more are kept while their batch lives; beyond, every walk forms them again, a tile at a time.
PLAN_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """One user: its history is rows start..start+h-1 of the batch, its m targets follow."""

    start: int
    h: int
    m: int

    def history(self) -> slice:
        """Return the rows of the history."""
        return slice(self.start, self.start + self.h)

    def target_rows(self) -> Iterator[slice]:
        """Yield the rows of blocks of targets whose tile against the history fits the cache."""
        size, stop = max(1, TILE_ELEMENTS // max(1, self.h)), self.start + self.h + self.m
        for first in range(self.start + self.h, stop, size):
            yield slice(first, min(first + size, stop))


@dataclass(frozen=True, slots=True)
class Group:
    """Users whose history is computed in one padded product of n rows each."""

    users: list[Span]
    n: int

    def row_blocks(self) -> Iterator[tuple[int, int]]:
        """Yield (first, last + 1) of blocks of queries; a block's keys are 0..last."""
        for first in range(0, self.n, ROWS):
            yield first, min(first + ROWS, self.n)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return rows of the batch int64 [G, n] and which are real; padding repeats the user's own last row."""
        steps = torch.arange(self.n)
        starts = torch.tensor([user.start for user in self.users])[:, None]
        lengths = torch.tensor([user.h for user in self.users])[:, None]
        return starts + torch.minimum(steps[None, :], lengths - 1), steps[None, :] < lengths


def spans(seq_offsets: list[int], num_targets: list[int] | None) -> list[Span]:
    """Return the users of a batch, in order."""
    targets = num_targets or [0] * (len(seq_offsets) - 1)
    return [Span(a, b - a - m, m) for (a, b), m in zip(itertools.pairwise(seq_offsets), targets, strict=True)]


def groups(users: list[Span]) -> Iterator[Group]:
    """Yield the users with a history in groups of one padded length whose largest tile fits the cache."""

    def padded(user: Span) -> int:
        return -(-user.h // LENGTH_STEP) * LENGTH_STEP

    by_length = sorted((user for user in users if user.h), key=padded)
    for n, same in itertools.groupby(by_length, key=padded):
        members = list(same)
        size = max(1, TILE_ELEMENTS // (n * min(n, ROWS)))
        for first in range(0, len(members), size):
            yield Group(members[first : first + size], n)


def bucket_of(difference: Tensor) -> Tensor:
    """Return the buckets uint8 of non-negative differences in ms, whatever their shape."""
    thresholds = torch.tensor(TIME_THRESHOLDS_MS, dtype=torch.int64)
    return torch.searchsorted(thresholds, difference, right=True, out_int32=True).to(torch.uint8)


def bucket_of_ordered(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the buckets uint8 [G, r, c] of queries int64 [G, r] against earlier keys int64 [G, c] that ascend.

    Of a query's keys each bucket is a run, so its borders are looked up (r * 128 searches at most, not r * c) and
    counted from the left: up to four times faster. Keys later than the query get some bucket.
    """
    num_users, num_queries, num_keys = *queries.shape, keys.shape[1]
    thresholds = torch.tensor(TIME_THRESHOLDS_MS, dtype=torch.int64)
    # No difference reaches the thresholds beyond these.
    reached = thresholds[: int(bucket_of(queries.max() - keys.min()))]
    borders = torch.searchsorted(keys, (queries[:, :, None] - reached).flatten(1), right=True)
    rows = num_users * num_queries
    passed = torch.zeros(rows, num_keys + 1, dtype=torch.uint8)
    passed.scatter_add_(1, borders.view(rows, -1), torch.ones(1, 1, dtype=torch.uint8).expand(rows, len(reached)))
    buckets = len(reached) - passed[:, :num_keys].cumsum(1, dtype=torch.uint8)
    return buckets.view(num_users, num_queries, num_keys)


def _in_order(users: list[Span], times: Tensor, query_times: Tensor) -> bool:
    """Return whether every history ascends, no token looks from before its own time, and no difference is absurd."""
    lowest, highest = (int(times.min()), int(query_times.max())) if len(times) else (0, 0)
    if lowest < -(1 << 62) or highest - lowest >= 1 << 62:
        return False  # a time less a threshold could overflow
    counts = torch.tensor([count for user in users for count in (user.h, user.m)], dtype=torch.int64)
    part = torch.arange(len(counts)).repeat_interleave(counts)
    # Between histories, and among targets, any order will do.
    free = (part[1:] != part[:-1]) | (part[1:] % 2 == 1)
    return bool(((times[1:] >= times[:-1]) | free).all() and (query_times >= times).all())


def tile_buckets(users: list[Span], times: Tensor, query_times: Tensor) -> Iterator[Tensor]:
    """Yield the buckets uint8 of every tile in the order that the CPU path walks them."""
    in_order = _in_order(users, times, query_times)
    for group in groups(users):
        rows, _ = group.rows()
        keys, queries = times[rows], query_times[rows]
        for first, last in group.row_blocks():
            if in_order:
                yield bucket_of_ordered(queries[:, first:last].contiguous(), keys[:, :last].contiguous())
            else:
                yield bucket_of((queries[:, first:last, None] - keys[:, None, :last]).abs_())
    for user in users:
        for own in user.target_rows():
            yield bucket_of((query_times[own, None] - times[None, user.history()]).abs_())
            yield bucket_of((query_times[own] - times[own]).abs_())


def bucket_plan(users: list[Span], times: Tensor, query_times: Tensor) -> Tensor:
    """Return the buckets of all tiles, flat uint8, for layers and directions to share; nothing if they are too many."""
    num_pairs = sum(user.h * (user.h + ROWS) // 2 + user.m * (user.h + 1) for user in users)
    if not num_pairs or num_pairs > PLAN_BYTES:
        return torch.zeros(0, dtype=torch.uint8)
    return torch.cat([tile.reshape(-1) for tile in tile_buckets(users, times, query_times)])

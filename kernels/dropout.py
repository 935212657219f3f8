"""The dropout mask as a pure function of (seed, row, column): regenerated in the backward, never saved.

Invariant: reference, CPU and Triton agree on every bit. Row and column are hashed to 32 bit keys apart (nothing wraps
at 2^32 elements), and one multiply-xorshift-multiply round of the two keys gives the element's 32 bits.

Legend: L rows, W columns. Integers of the reference are int64 that hold 32 bits; every multiplier is below 2^31, so
that no product passes 2^63.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import require

WORD = 0xFFFFFFFF
# Multipliers of a 32 bit finaliser with little bias; the last one also serves the element's round.
FIRST_MULTIPLIER, SECOND_MULTIPLIER = 0x21F0AAAD, 0x735A2D97
HIGH_SALT, LOW_SALT = 0x1E3779B9, 0x05EBCA6B
# 30 bits decide, so that on the CPU they read as a float32 below 2: never NaN, and ordered as the integer is (with
# torch.set_flush_denormal on, a p below 2^-7 would drop a share of 2^-7 there).
DECIDING_BITS = 30


def drop_below(p: float) -> int:
    """Return the integer that a kept element's deciding bits reach: `p` in steps of 2^-30."""
    return round(p * (1 << DECIDING_BITS))


def check(dropout: float, seed: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless `dropout` is in [0, 1) and, above 0, `seed` is int64 [1] on the device of `x`."""
    require(0.0 <= dropout < 1.0, "dropout", dropout, "at least 0 and below 1")
    if dropout > 0.0:
        require(seed is not None, "seed", None, "an int64 tensor [1] when dropout is above 0")
    if seed is not None:
        require(seed.dtype == torch.int64, "dtype of seed", seed.dtype, "torch.int64")
        require(seed.shape == (1,), "shape of seed", list(seed.shape), "[1]")
        require(seed.device == x.device, "device of seed", seed.device, f"{x.device}, as the other arguments")


def _mix(x: Tensor) -> Tensor:
    x = x & WORD
    x = ((x ^ (x >> 16)) * FIRST_MULTIPLIER) & WORD
    x = ((x ^ (x >> 15)) * SECOND_MULTIPLIER) & WORD
    return x ^ (x >> 15)


def _keys(seed: Tensor, num_rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return row keys [L], column multipliers [W] (odd, below 2^31) and column offsets [W]."""
    low, high = seed & WORD, (seed >> 32) & WORD
    a = _mix(low + _mix(high ^ HIGH_SALT))
    b = _mix(high + _mix(low ^ LOW_SALT))
    row = torch.arange(num_rows, device=seed.device)
    column = torch.arange(width, device=seed.device)
    row_keys = _mix(_mix(row ^ a) + b)
    multipliers = (_mix(_mix(column ^ b) + a) >> 1) | 1
    return row_keys, multipliers, _mix(_mix(column + b) ^ a)


def keep_mask(seed: Tensor, num_rows: int, width: int, p: float) -> Tensor:
    """Return the mask bool [L, W]: True, with probability 1 - p, where an element is kept."""
    row_keys, multipliers, offsets = _keys(seed, num_rows, width)
    bits = (row_keys[:, None] * multipliers + offsets) & WORD
    bits = ((bits ^ (bits >> 15)) * SECOND_MULTIPLIER) & WORD
    return (bits >> (32 - DECIDING_BITS)) >= drop_below(p)


def reference_dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Return x [L, W] with a share p of its elements zeroed and the rest divided by 1 - p."""
    if p == 0.0 or seed is None:
        return x
    return torch.where(keep_mask(seed, len(x), x.shape[1], p), x / (1.0 - p), 0.0)


def _as_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@dataclass(frozen=True, slots=True)
class TileMask:
    """The keys of a mask on the CPU, and scratch for one tile of rows, as int32 that wraps around."""

    row_keys: Tensor
    multipliers: Tensor
    offsets: Tensor
    threshold: float
    bits: Tensor
    shifted: Tensor

    @staticmethod
    def of(seed: Tensor, num_rows: int, width: int, p: float, tile_rows: int) -> "TileMask | None":
        """Return the mask's keys, or None if p is too small to drop anything."""
        if drop_below(p) == 0:
            return None
        rows, multipliers, offsets = (_as_int32(keys) for keys in _keys(seed, num_rows, width))
        largest_dropped = torch.tensor(drop_below(p) - 1, dtype=torch.int32).view(torch.float32).item()
        scratch = torch.empty((2, min(tile_rows, num_rows), width), dtype=torch.int32)
        return TileMask(rows[:, None], multipliers, offsets, largest_dropped, scratch[0], scratch[1])

    def drop(self, start: int, *tiles: Tensor) -> list[Tensor]:
        """Return each of the tiles (rows from `start`, one shape and dtype) with its dropped elements zeroed."""
        num_rows = len(tiles[0])
        keys = self.row_keys[start : start + num_rows]
        bits, shifted = self.bits[:num_rows], self.shifted[:num_rows]
        torch.addcmul(self.offsets, keys, self.multipliers, out=bits)
        # Shifts of int32 are arithmetic: the mask takes the copies of the sign away again.
        torch.bitwise_right_shift(bits, 15, out=shifted).bitwise_and_(WORD >> 15)
        bits.bitwise_xor_(shifted).mul_(SECOND_MULTIPLIER)
        bits.bitwise_right_shift_(32 - DECIDING_BITS).bitwise_and_((1 << DECIDING_BITS) - 1)
        # The one vectorised select of PyTorch on the CPU; `where` and `masked_fill_` take five times as long.
        deciding = bits.view(torch.float32).to(tiles[0].dtype)
        return [torch.ops.aten.threshold_backward(tile, deciding, self.threshold) for tile in tiles]

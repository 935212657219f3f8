"""Randomness as a function of what it is for: no generator's state has to be stored to resume a run.

Invariant: two streams with different names or indices are independent; the same ones are equal in every process.
"""

import zlib

import numpy as np


def generator(seed: int, stream: str, *indices: int) -> np.random.Generator:
    """Return a fresh generator for `stream` (what is drawn) at `indices` (epoch or step)."""
    return np.random.default_rng(_entropy(seed, stream, indices))


def counted(seed: int, stream: str, *indices: int, first: int) -> np.random.Philox:
    """Return a generator for `stream` at `indices` that stands before its block number `first` of 256 bits.

    Whoever starts at a later block draws what another, who starts at 0, draws there: a stream shared by processes.
    """
    key = np.random.SeedSequence(_entropy(seed, stream, indices)).generate_state(2, np.uint64)
    return np.random.Philox(key=key, counter=first)


def torch_seed(seed: int, stream: str, *indices: int) -> int:
    """Return a seed in [0, 2**63) for torch's own generator, which draws dropout masks and initial weights."""
    return int(generator(seed, stream, *indices).integers(2**63))


def _entropy(seed: int, stream: str, indices: tuple[int, ...]) -> list[int]:
    return [seed, zlib.crc32(stream.encode()), *indices]

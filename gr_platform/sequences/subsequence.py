"""Stochastic Length: which exposures of a long sequence an epoch trains on. Training alone: nothing served is thinned.

Invariant: what is kept of a user is a function of (seed, epoch, user row) and the user's own sequence, never of who
else is in the batch or where a run was resumed. The most recent exposure is always kept, and order stays.

Legend: B users, n exposures of one, N_c the longest sequence, T exposures, K kept ones.
Source: PAPER section 3.
"""

from functools import lru_cache

import numpy as np

from gr_platform.models.config import Choice
from gr_platform.sequences.dataset import ramps
from gr_platform.training.seeds import generator

# The step and the two multipliers of SplitMix64: a random function of a counter, so no draw depends on another.
STEP, FIRST_FACTOR, SECOND_FACTOR = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
FLOAT32_BITS = 31  # of a positive float, which as an integer orders as it does


def thinned_length(max_length: int, alpha: float) -> int:
    """Return floor(N_c^(alpha / 2)): sequences up to it stay whole, a thinned one has this length."""
    # A power that is a whole number in exact arithmetic must not fall below it by rounding.
    return int(np.floor(float(max_length) ** (alpha / 2) * (1 + 1e-12)))


def kept_lengths(
    lengths: np.ndarray, users: np.ndarray, *, max_length: int, alpha: float, seed: int, epoch: int
) -> np.ndarray:
    """Return how many exposures of each sequence of `lengths` are kept, int64 [B].

    users: int64 [B], user rows; max_length: N_c; alpha in (1, 2], where 2 keeps all sequences of at most N_c whole.
    A sequence longer than `thinned_length` is cut to it with probability 1 - N_c^alpha / n^2.
    """
    lengths = np.asarray(lengths, np.int64)
    short = thinned_length(max_length, alpha)
    cut = lengths > short
    if not cut.any():
        return lengths
    whole = float(max_length) ** alpha / np.square(np.maximum(lengths, 1), dtype=np.float64)
    cut &= _uniform(_user_keys(users, "thinned", seed, epoch)) >= whole
    return np.where(cut, short, lengths)


def kept_exposures(
    offsets: np.ndarray,
    times: np.ndarray,
    kept: np.ndarray,
    users: np.ndarray,
    *,
    choice: Choice,
    seed: int,
    epoch: int,
) -> np.ndarray:
    """Return the places in a jagged batch of the `kept` exposures of each sequence, ascending, int64 [K].

    offsets int64 [B + 1]; times int64 [T] ms, not decreasing within a user; kept, users int64 [B]. choice: the last
    exposures, or as many drawn without replacement besides the last one, with equal weights or with `recency_weights`.
    """
    lengths = np.diff(offsets)
    places = ramps(offsets[1:] - kept, kept)
    drawn = np.flatnonzero(kept < lengths)
    if choice != "recent" and len(drawn):
        begins = np.cumsum(kept) - kept
        keys = _user_keys(users[drawn], "subsequence", seed, epoch)
        found = _drawn(offsets[drawn], lengths[drawn], times, kept[drawn], keys, choice)
        places[ramps(begins[drawn], kept[drawn])] = found
    return places


def recency_weights(lengths: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return the weight of each exposure, float32 [T]: linear in its age, 1 for the newest and 1 / n for the oldest.

    lengths int64 [B]; times int64 [T], the sequences one after the other. Equal where all times of a user are.
    The paper weighs by the time since an exposure ("feature-weighted"); never zero, so every exposure may be drawn.
    """
    ends = np.cumsum(lengths)
    newest, oldest = times[ends - 1], times[ends - lengths]
    slope = (1 - 1 / lengths) / np.maximum(newest - oldest, 1)
    age = np.repeat(newest, lengths) - times
    return (1 - age * np.repeat(slope, lengths)).astype(np.float32)


def earlier_by(starts: np.ndarray, users: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Return how many exposures earlier a window that begins at `starts` lies in an epoch: int64 [B], even over
    0..starts. users: int64 [B], user rows."""
    drawn = _uniform(_user_keys(users, "window", seed, epoch))
    return np.floor(drawn * (np.asarray(starts, np.int64) + 1)).astype(np.int64)


def _drawn(
    begins: np.ndarray, lengths: np.ndarray, times: np.ndarray, kept: np.ndarray, keys: np.ndarray, choice: Choice
) -> np.ndarray:
    """Return the places of `kept` exposures of each of the sequences begins..begins + lengths - 1, ascending.

    The smallest of exponential draws over weights are a weighted sample without replacement. All users are sorted at
    once, as integers of (user, draw, position): no two are equal, and integers sort fast.
    """
    at = ramps(begins, lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    position = at - begins[owner]
    draws = _exponential(keys[owner] + position.astype(np.uint64) * STEP)
    if choice == "recency":
        draws /= recency_weights(lengths, times[at])
    ends = np.cumsum(lengths)
    draws[ends - 1] = 0.0
    position_bits = int(lengths.max()).bit_length()
    if len(lengths).bit_length() + FLOAT32_BITS + position_bits > 64:
        raise ValueError(f"{len(lengths)} sequences of up to {lengths.max()} exposures are too many to thin at once")
    order = owner.astype(np.uint64) << np.uint64(FLOAT32_BITS + position_bits)
    order |= draws.view(np.uint32).astype(np.uint64) << np.uint64(position_bits)
    order |= position.astype(np.uint64)
    order.sort()
    chosen = order[ramps(ends - lengths, kept)] & np.uint64((1 << position_bits) - 1)
    places = chosen.astype(np.int64) + np.repeat(begins, kept)
    places.sort()  # users come in the order of their places already
    return places


def _user_keys(users: np.ndarray, stream: str, seed: int, epoch: int) -> np.ndarray:
    """Return a random uint64 for each user row: where its own counter starts."""
    return _mixed(np.asarray(users, np.int64).astype(np.uint64) * STEP + _base(stream, seed, epoch))


@lru_cache(maxsize=16)  # a generator costs as much as a small batch's draws
def _base(stream: str, seed: int, epoch: int) -> np.uint64:
    return generator(seed, stream, epoch).integers(2**64, dtype=np.uint64)


def _mixed(counter: np.ndarray) -> np.ndarray:
    mixed = (counter ^ (counter >> np.uint64(30))) * FIRST_FACTOR
    mixed = (mixed ^ (mixed >> np.uint64(27))) * SECOND_FACTOR
    return mixed ^ (mixed >> np.uint64(31))


def _uniform(mixed: np.ndarray) -> np.ndarray:
    """Return float64 in [0, 1) from random bits."""
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _exponential(counter: np.ndarray) -> np.ndarray:
    """Return positive float32 draws of the exponential distribution with mean 1."""
    # 23 bits and a half: no draw rounds to 0 or 1.
    bits = (_mixed(counter) >> np.uint64(41)).astype(np.float32)
    return -np.log((bits + np.float32(0.5)) * np.float32(2.0**-23))

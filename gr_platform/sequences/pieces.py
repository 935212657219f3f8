"""Where the sequences of a data set's users lie in its segments.

Invariant: a user's sequence is the concatenation of its pieces in the order of the segments, from the last one that
replaces all before it.

Legend: U users, P pieces.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True, slots=True)
class Pieces:
    """Where sequences lie, by user: offsets int64 [U + 1] into the P others, all int64 [P].

    chunk: which record batch; start: first exposure in it; begin: its place in the user's sequence; length: exposures.
    """

    offsets: np.ndarray
    chunk: np.ndarray
    start: np.ndarray
    begin: np.ndarray
    length: np.ndarray


def index_of(segments: list[pa.Table], batches: list[pa.RecordBatch]) -> tuple[pa.Array, Pieces]:
    """Return the ids of all users, ascending, and where their pieces lie."""
    offsets = [batch.column("items").offsets.to_numpy() for batch in batches]
    chunk = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    none = [np.zeros(0, np.int64)]
    start = np.concatenate([*(each[:-1] for each in offsets), *none])
    length = np.concatenate([*(np.diff(each) for each in offsets), *none])
    users = pa.concat_arrays(
        [batch.column("user_id") for batch in batches] or [segments[0]["user_id"].combine_chunks()]
    )
    if len(segments) == 1:
        rows = np.arange(len(users) + 1)
        return users, Pieces(rows, chunk, start, np.zeros(len(users), np.int64), length)
    order = pc.sort_indices(users).to_numpy()  # stable: a user's pieces stay in the order of their segments
    users, chunk, start, length = users.take(pa.array(order)), chunk[order], start[order], length[order]
    replaces = np.concatenate([_replaces(batch) for batch in batches])[order]
    first = np.ones(len(users), bool)
    first[1:] = pc.not_equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False)
    owner = np.cumsum(first) - 1
    # A piece counts unless a later one of its user replaces it.
    place = np.arange(len(users))
    from_ = np.maximum.reduceat(np.where(replaces | first, place, 0), np.flatnonzero(first))
    kept = place >= from_[owner]
    owner, chunk, start, length = owner[kept], chunk[kept], start[kept], length[kept]
    rows = np.searchsorted(owner, np.arange(len(from_) + 1))
    ends = np.cumsum(length) - length
    begin = ends - ends[rows[:-1]][owner]
    return users.take(pa.array(np.flatnonzero(first))), Pieces(rows, chunk, start, begin, length)


def _replaces(batch: pa.RecordBatch) -> np.ndarray:
    if "replaces" not in batch.schema.names:
        return np.zeros(len(batch), bool)
    return batch.column("replaces").to_numpy(zero_copy_only=False)

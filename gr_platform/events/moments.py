"""Moments: the rows of one user and time, which stand together in a stream sorted by user and time.

Invariant: where a stream is cut never parts a moment, so what is decided about one is decided about all its rows.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def same_moment(rows: pa.Table, time: str = "event_ts") -> np.ndarray:
    """Return for each row but the first whether it has the user_id and `time` of the row before, bool [len - 1]."""
    users, times = rows["user_id"].combine_chunks(), rows[time].to_numpy()
    same = times[1:] == times[:-1]
    if same.any():
        same &= pc.equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False)
    return same


def tied(same: np.ndarray) -> np.ndarray:
    """Return which rows share their moment with another, bool [len], from `same_moment`."""
    return np.concatenate([[False], same]) | np.concatenate([same, [False]])


def whole_moments(stream: Iterable[pa.Table], time: str = "event_ts") -> Iterator[pa.Table]:
    """Yield the sorted rows of a stream in tables that hold whole moments."""
    pending: list[pa.Table] = []
    for part in stream:
        rows = pa.concat_tables([*pending, part]).combine_chunks()
        ends = np.flatnonzero(~same_moment(rows, time))
        last = int(ends[-1]) + 1 if len(ends) else 0
        if last:
            yield rows.slice(0, last)
        pending = [rows.slice(last)]
    if pending and len(pending[0]):
        yield pending[0]

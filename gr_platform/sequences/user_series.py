"""Slow series of users, such as a city or a plan, merged into the main series by time.

Invariant: of each run of one value only the first entry is kept (paper section 2.1), and an entry is part of a span
only if it is not later than the last exposure of the span. The order is total: (time, auxiliary entries by kind, then
exposures in their own order). What always held is a user's first entry, one a series.

Legend: U users of the data set, B spans, S entries of all users, T entries and exposures answered.
"""
# ruff: noqa: S608 - identifiers are quoted by `quoted`

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from gr_platform import storage
from gr_platform.events.database import quoted
from gr_platform.events.features import ALWAYS_MS, feature_files
from gr_platform.sequences.codes import MISSING, Codes
from gr_platform.sequences.dataset import Jagged, SequenceDataset, ramps
from gr_platform.sequences.features import build, read_rows, write_rows

MAIN = 0


@dataclass(frozen=True, slots=True)
class Merged:
    """Spans of B users with their slow series: offsets int64 [B + 1], the others int64 [T].

    kinds: 0 for an exposure, k for an entry of the k-th series. values: the item of an exposure, the code of an entry.
    times: ms UTC. places: which exposure of the block it is, -1 for an entry.
    """

    offsets: np.ndarray
    kinds: np.ndarray
    values: np.ndarray
    times: np.ndarray
    places: np.ndarray

    def histories(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return kinds, values and times of each span (views)."""
        spans = [slice(begin, end) for begin, end in pairwise(self.offsets.tolist())]
        return [(self.kinds[span], self.values[span], self.times[span]) for span in spans]


class UserSeries:
    """The slow series of a data set's users. names: of the series, kind k is names[k - 1]; codes: what values mean.

    offsets int64 [U + 1] into kinds, values, times int64 [S]: those of a user ascending by (time, kind).
    """

    def __init__(
        self, offsets: np.ndarray, kinds: np.ndarray, values: np.ndarray, times: np.ndarray, codes: dict[str, Codes]
    ) -> None:
        self.offsets, self.kinds, self.values, self.times, self.codes = offsets, kinds, values, times, codes

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the series in the order of their kinds."""
        return tuple(self.codes)

    @staticmethod
    def current(home: Path, ds: str, dataset: SequenceDataset) -> "UserSeries":
        """Return the series of all landed user-features files for the users of `dataset`, made where they are not there
        yet. Raises UserError if none was imported."""
        table, codes = read_rows(build_user_series(home, ds).folder)
        users, times = dataset.rows_of(table["id"].combine_chunks()), table["event_ts"].to_numpy()
        parts = []
        for kind, name in enumerate(codes, 1):
            values = table[f"p_{name}"].to_numpy()
            said = np.flatnonzero((values != MISSING) & (users >= 0))
            parts.append((users[said], np.full(len(said), kind), values[said], times[said]))
        owner, kinds, values, times = (np.concatenate(each) for each in zip(*parts, strict=True))
        order = np.lexsort((kinds, times, owner))
        offsets = np.searchsorted(owner[order], np.arange(dataset.num_users + 1))
        return UserSeries(offsets, kinds[order], values[order], times[order], codes)

    def merged(self, rows: np.ndarray, block: Jagged) -> Merged:
        """Return the spans `block` of user rows, int64 [B], with the entries of each user up to its last exposure.

        An empty span stays empty: nothing of it is known to have happened.
        """
        rows, lengths = np.asarray(rows, np.int64), block.lengths
        last = np.full(len(rows), np.iinfo(np.int64).min)
        last[lengths > 0] = block.times[block.offsets[1:][lengths > 0] - 1]
        first, num = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        at, owner = ramps(first, num), np.repeat(np.arange(len(rows)), num)
        seen = self.times[at] <= last[owner]
        at, owner = at[seen], owner[seen]
        owners = np.concatenate([owner, block.owner])
        kinds = np.concatenate([self.kinds[at], np.full(len(block.items), MAIN)])
        values = np.concatenate([self.values[at], block.items])
        times = np.concatenate([self.times[at], block.times])
        places = np.concatenate([np.full(len(at), -1), np.arange(len(block.items))])
        # Both parts are in their own order already, which a stable sort keeps: entries come first at equal times.
        order = np.lexsort((times, owners))
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(owners, minlength=len(rows)))])
        return Merged(offsets, kinds[order], values[order], times[order], places[order])


def build_user_series(home: Path, ds: str) -> storage.Result:
    """Return the slow series of all landed user-features files, and make them current.

    Files: rows.arrow (id, event_ts, p_<series>: the code of a value that begins a run, else 0), ascending by (id,
    event_ts, landed file, row); values-<series>.parquet (value, count). Raises UserError if no such file was imported.
    """

    files = feature_files(home, ds, "user-features")
    several = sum(file.entry.time_column is None for file in files) > 1

    def write(connection: duckdb.DuckDBPyConnection, folder: Path, codes: dict[str, Codes]) -> dict[str, Any]:
        order = "event_ts, source_file, source_row"
        rows = f"(SELECT * REPLACE ({', '.join(map(_last_of_always, codes))}) FROM rows)" if several else "rows"
        begins = ", ".join(f"{_begins(quoted(f'p_{name}'), order)} AS {quoted(f'p_{name}')}" for name in codes)
        said = " OR ".join(f"{quoted(f'p_{name}')} IS NOT NULL" for name in codes)
        sql = f"FROM (SELECT id, {order}, {begins} FROM {rows}) WHERE {said} ORDER BY id, {order}"
        return {"num_rows": write_rows(connection, "SELECT id, event_ts, {properties} " + sql, folder, codes)}

    return build(home, ds, files, "user-features", {}, write)


def _last_of_always(name: str) -> str:
    """Return SQL for a series without what files without times say of a user and a later one of them says again."""
    column = quoted(f"p_{name}")
    later = (
        f"first_value({column} IGNORE NULLS) OVER (PARTITION BY id, event_ts ORDER BY source_file, source_row "
        "ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING)"
    )
    return f"CASE WHEN event_ts > {ALWAYS_MS} OR {later} IS NULL THEN {column} END AS {column}"


def _begins(column: str, order: str) -> str:
    """Return SQL for a value where it differs from the user's last one before, whatever empty cells lie between."""
    before = (
        f"last_value({column} IGNORE NULLS) OVER (PARTITION BY id ORDER BY {order} "
        "ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)"
    )
    return f"CASE WHEN {column} IS DISTINCT FROM {before} THEN {column} END"

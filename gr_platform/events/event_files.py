"""Clean events on their way to Parquet: files of a fixed number of rows, written by two threads, and what was seen.

Invariant: where a file or row group ends depends on the number of rows before it alone.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr_platform.events.declaration import Declaration

FILE_ROWS = 1 << 21
ROW_GROUP_ROWS = 1 << 17
_WRITERS = 2


@dataclass(slots=True)
class Seen:
    """Figures of the events that pass by."""

    actions: tuple[str, ...]
    rows: int = 0
    users: int = 0
    longest: int = 0
    first_ts: int | None = None
    last_ts: int | None = None
    by_action: Counter[str] = field(default_factory=Counter)
    _last_user: Any = None
    _run: int = 0

    def watched(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Yield the tables as they are, counting."""
        for table in tables:
            if len(table):
                self._count(table.combine_chunks())
            yield table

    def _count(self, table: pa.Table) -> None:
        users, times = table["user_id"].combine_chunks(), table["event_ts"].to_numpy()
        self.rows += len(table)
        low, high = int(times.min()), int(times.max())
        self.first_ts = low if self.first_ts is None else min(low, self.first_ts)
        self.last_ts = high if self.last_ts is None else max(high, self.last_ts)
        for code, count in enumerate(np.bincount(table["action"].to_numpy()).tolist()):
            if count:
                self.by_action[self.actions[code]] += count
        changed = np.flatnonzero(pc.not_equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False)) + 1
        goes_on = users[0].as_py() == self._last_user and self.rows > len(table)
        runs = np.diff(np.concatenate([[0], changed, [len(users)]]))
        runs[0] += self._run if goes_on else 0
        self.users += len(runs) - int(goes_on)
        self.longest = max(self.longest, int(runs.max()))
        self._last_user, self._run = users[-1].as_py(), int(runs[-1])

    def facts(self) -> dict[str, Any]:
        """Return the figures under the names of a partition's facts."""
        return {
            "rows_kept": self.rows,
            "num_users": self.users,
            "max_user_events": self.longest,
            "first_ts": self.first_ts,
            "last_ts": self.last_ts,
            "actions": dict(sorted(self.by_action.items())),
        }


def write_files(folder: Path, tables: Iterable[pa.Table], declaration: Declaration, *, has_ids: bool) -> list[Path]:
    """Write the events into files of FILE_ROWS rows, at least one; return them."""
    schema = _schema(declaration)
    actions = pa.array(declaration.actions)
    files: list[Path] = []
    running: list[Any] = []

    def write(table: pa.Table) -> None:
        if len(running) >= _WRITERS:
            running.pop(0).result()
        files.append(folder / f"events-{len(files):03d}.parquet")
        running.append(pool.submit(_write_file, files[-1], table, schema, actions, has_ids))

    with ThreadPoolExecutor(_WRITERS, "write-events") as pool:
        pending: list[pa.Table] = []
        num_rows = 0
        for table in tables:
            pending.append(table)
            num_rows += len(table)
            while num_rows >= FILE_ROWS:
                whole = pa.concat_tables(pending)
                write(whole.slice(0, FILE_ROWS))
                pending, num_rows = [whole.slice(FILE_ROWS)], num_rows - FILE_ROWS
        if num_rows or not files:
            write(pa.concat_tables(pending) if pending else _no_rows(schema))
        for each in running:
            each.result()
    return files


def _no_rows(schema: pa.Schema) -> pa.Table:
    """Return no events, as the stream would have them: all of a date may repeat what came before."""
    place = schema.get_field_index("action")
    return schema.set(place, pa.field("action", pa.uint8())).empty_table()


def _write_file(path: Path, table: pa.Table, schema: pa.Schema, actions: pa.Array, has_ids: bool) -> None:
    columns = {name: table[name] for name in table.column_names}
    codes = columns["action"].combine_chunks()
    columns["action"] = pa.DictionaryArray.from_arrays(codes, actions)
    if not has_ids:
        columns["event_id"] = pa.nulls(len(table), pa.string())
    fields = [pa.field("action", columns["action"].type) if field.name == "action" else field for field in schema]
    ordered = pa.table([columns[name] for name in schema.names], schema=pa.schema(fields))
    pq.write_table(
        ordered,
        path,
        compression="zstd",
        row_group_size=ROW_GROUP_ROWS,
        use_dictionary=["action", *(field.name for field in schema if pa.types.is_string(field.type))],
        store_schema=False,
    )


def _schema(declaration: Declaration) -> pa.Schema:
    ids = {"int64": pa.int64(), "string": pa.string()}
    return pa.schema(
        [
            ("user_id", ids[declaration.user_id_type]),
            ("item_id", ids[declaration.item_id_type]),
            ("action", pa.string()),
            ("value", pa.float64()),
            ("event_ts", pa.int64()),
            ("event_id", pa.string()),
            ("source_file", pa.int32()),
            ("source_row", pa.int64()),
            *((name, pa.string()) for name in declaration.context),
        ]
    )

"""One ingest date's rows become clean events: judged, each event once, sorted by user, in a stream.

Invariant: rows in = kept + quarantined + duplicates. The bytes written are a function of the rows alone, however the
stream is cut, and memory is bounded by the database's limit and a few files' worth of rows.
"""
# ruff: noqa: S608 - identifiers and strings are quoted by `quoted` and `literal`

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from gr_platform.events.database import literal, parquet_of, quoted
from gr_platform.events.declaration import Declaration
from gr_platform.events.event_files import Seen, write_files
from gr_platform.events.quality import NO_TIME
from gr_platform.events.repeats import mark_repeats, once

QUARANTINE = "quarantine-0.parquet"
ITEMS = "items.parquet"
STREAM_ROWS = 1 << 17
_COPY = "(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 122880)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the rules say of some rows: quarantined by rule; of the valid ones their number, how many have an event id,
    and per landed file (its sequence) the first and last time (ms) and how many have an id."""

    quarantined: dict[str, int]
    num_valid: int
    num_with_id: int
    spans: dict[int, list[int]]

    @property
    def num_rows(self) -> int:
        """All rows that came in."""
        return self.num_valid + sum(self.quarantined.values())

    @property
    def span(self) -> tuple[int, int]:
        """First and last time of the valid rows, ms; the last before the first where there is none."""
        if not self.spans:
            return 0, -1
        return min(first for first, _, _ in self.spans.values()), max(last for _, last, _ in self.spans.values())


def judge(connection: duckdb.DuckDBPyConnection, rows: str) -> Judged:
    """Return the verdicts over SQL for judged rows."""
    verdicts = connection.sql(
        "SELECT rule, source_file, count(*), count(event_id), min(event_ts), max(event_ts) "
        f"FROM ({rows}) GROUP BY rule, source_file ORDER BY rule, source_file"
    ).fetchall()
    quarantined: Counter[str] = Counter()
    for rule, _, count, *_ in verdicts:
        if rule is not None:
            quarantined[rule] += count
    valid = [row[1:] for row in verdicts if row[0] is None]
    return Judged(
        quarantined=dict(sorted(quarantined.items())),
        num_valid=sum(count for _, count, *_ in valid),
        num_with_id=sum(with_id for _, _, with_id, *_ in valid),
        spans={file: [first, last, with_id] for file, _, with_id, first, last in valid},
    )


def write_clean(
    connection: duckdb.DuckDBPyConnection,
    folder: Path,
    judged: Judged,
    declaration: Declaration,
    earlier: str,
    *,
    label: str = "ingest",
) -> dict[str, Any]:
    """Write the events and the quarantine of the view `judged` into `folder`; return the facts of what was written.

    earlier: SQL for judged rows of other dates' files; what one landed before a row's own holds makes it a duplicate.
    Files: events-000.parquet, ... of FILE_ROWS events, items.parquet (each item's part in them), context-<name>.parquet
    for each declared context column (each value's part), quarantine-0.parquet.
    """
    has_ids = judged.num_with_id > 0
    mark_repeats(connection, earlier, judged.span, has_ids=has_ids)
    with tqdm(desc=label, total=judged.num_valid, unit="event", unit_scale=True, disable=None, leave=False) as bar:
        seen = Seen(declaration.actions)
        stream = connection.sql(_sorted(declaration, has_ids=has_ids)).to_arrow_reader(STREAM_ROWS)
        files = write_files(folder, seen.watched(once(_followed(stream, bar))), declaration, has_ids=has_ids)
    _write_quarantine(connection, folder / QUARANTINE, any_=bool(judged.quarantined))
    facts = seen.facts()
    facts["num_items"] = _write_items(connection, folder / ITEMS, files)
    for name in declaration.context:
        _write_context(connection, folder / context_file(name), files, name)
    facts |= {"rows_in": judged.num_rows, "quarantined": judged.quarantined}
    facts["duplicates"] = judged.num_valid - facts["rows_kept"]
    _assert_conserved(folder, files, facts)
    return facts


def context_file(name: str) -> str:
    """Return the name of the file that holds what there is of a context column's values."""
    return f"context-{name}.parquet"


def _assert_conserved(folder: Path, files: list[Path], facts: dict[str, Any]) -> None:
    kept = sum(pq.read_metadata(file).num_rows for file in files)
    quarantined = pq.read_metadata(folder / QUARANTINE).num_rows
    accounted = kept + facts["duplicates"] + quarantined
    if facts["rows_in"] != accounted or facts["duplicates"] < 0 or kept != facts["rows_kept"]:
        raise RuntimeError(f"rows are lost: {facts['rows_in']} in, {accounted} accounted for")


def _sorted(declaration: Declaration, *, has_ids: bool) -> str:
    """Return SQL for the valid rows in the total order; the action is its place among the declared ones."""
    actions = f"[{', '.join(literal(action) for action in declaration.actions)}]"
    context = "".join(f", {quoted(name)}" for name in declaration.context)
    return (
        f"SELECT user_id, item_id, (list_position({actions}, action) - 1)::UTINYINT AS action, value, event_ts, "
        f"{'event_id, ' if has_ids else ''}source_file, source_row{context} FROM judged ANTI JOIN repeats "
        "USING (source_file, source_row) WHERE rule IS NULL ORDER BY user_id, event_ts, source_file, source_row"
    )


def _followed(stream: Iterable[pa.RecordBatch], bar: "tqdm[Any]") -> Iterator[pa.RecordBatch]:
    for batch in stream:
        bar.update(len(batch))
        yield batch


def _write_quarantine(connection: duckdb.DuckDBPyConnection, path: Path, *, any_: bool) -> None:
    """Write the rows that broke a rule as they were found, with the rule, the file's name and the row."""
    connection.execute(
        "COPY (SELECT rule, source_name AS source_file, source_row, raw_user AS user_id, raw_item AS item_id, action, "
        f"raw_value AS value, raw_time AS event_ts FROM judged WHERE {'rule IS NOT NULL' if any_ else 'false'} "
        f"ORDER BY judged.source_file, source_row) TO {literal(str(path))} {_COPY}"
    )


def _write_items(connection: duckdb.DuckDBPyConnection, path: Path, files: list[Path]) -> int:
    """Write one row for each item and landed file, sorted by item and file; return the number of items.

    Columns: item_id, source_file, count, first_ts, last_ts. An item that only rows without a time name is an item all
    the same, of which nothing is learned: its count is 0 and its times are NULL.
    """
    connection.execute(
        "COPY (SELECT item_id, source_file, count(event_ts) AS count, min(event_ts) AS first_ts, "
        f"max(event_ts) AS last_ts FROM (SELECT item_id, source_file, event_ts FROM {parquet_of(files)} UNION ALL "
        f"SELECT DISTINCT item_id, source_file, NULL::BIGINT FROM judged WHERE rule = {literal(NO_TIME)}) "
        f"GROUP BY item_id, source_file ORDER BY item_id, source_file) TO {literal(str(path))} {_COPY}"
    )
    distinct = f"SELECT count(DISTINCT item_id) FROM {parquet_of([path])}"
    return int(connection.sql(distinct).fetchall()[0][0])


def _write_context(connection: duckdb.DuckDBPyConnection, path: Path, files: list[Path], name: str) -> None:
    """Write one row for each value of a context column and landed file, sorted by both.

    Columns: value, source_file, count, first_ts.
    """
    connection.execute(
        f"COPY (SELECT {quoted(name)} AS value, source_file, count(*) AS count, min(event_ts) AS first_ts "
        f"FROM {parquet_of(files)} WHERE {quoted(name)} IS NOT NULL GROUP BY 1, 2 ORDER BY 1, 2) "
        f"TO {literal(str(path))} {_COPY}"
    )

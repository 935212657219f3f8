"""What an import would do, shown before it is done: the first events, and what would be quarantined.

Invariant: the same rules over the same SQL as ingest, and nothing is written.
"""
# ruff: noqa: S608 - the query is made by `judged_query`

from dataclasses import dataclass
from typing import Any

import duckdb

from gr_platform.events.ledger import LandedFile
from gr_platform.events.quality import judged_query

SHOWN_ROWS = 5
EVENT = ("user_id", "item_id", "action", "value", "event_ts", "event_id")
FOUND = ("source_row", "raw_user", "raw_item", "action", "raw_value", "raw_time")


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """The rows that break one rule: how many, and the first of them as found."""

    num_rows: int
    examples: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """An import that was not done. source_columns: name -> DuckDB type. events: the first ones; broken: by rule."""

    file: LandedFile
    source_columns: dict[str, str]
    events: list[dict[str, Any]]
    broken: dict[str, Broken]


def preview(connection: duckdb.DuckDBPyConnection, file: LandedFile) -> Preview:
    """Return the preview of a file that is readable as if it were landed."""
    judged = judged_query(file)
    shown = (*EVENT, *file.declaration.context)
    events = _rows(connection, f"SELECT * FROM ({judged}) WHERE rule IS NULL LIMIT {SHOWN_ROWS}", shown)
    counts = connection.sql(
        f"SELECT rule, count(*), min(source_row, {SHOWN_ROWS}) FROM ({judged}) WHERE rule IS NOT NULL GROUP BY rule "
        "ORDER BY 2 DESC, 1"
    ).fetchall()
    wanted = [str(row) for _, _, rows in counts for row in rows] or ["0"]
    found = f"SELECT * FROM ({judged}) WHERE source_row IN ({', '.join(wanted)}) ORDER BY source_row"
    examples = _rows(connection, found, (*FOUND, "rule"))
    return Preview(
        file=file,
        source_columns=file.entry.types,
        events=events,
        broken={
            rule: Broken(num_rows=count, examples=[row for row in examples if row["rule"] == rule])
            for rule, count, _ in counts
        },
    )


def _rows(connection: duckdb.DuckDBPyConnection, query: str, shown: tuple[str, ...]) -> list[dict[str, Any]]:
    table = connection.sql(query).to_arrow_table().select(list(shown))
    return table.to_pylist()

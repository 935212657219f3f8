"""What is known of each ingest date without reading an event: its manifest's facts and its files' footers.

Invariant: partitions come oldest first, and only footers are read, so the cost grows with files and not with rows.
"""

from pathlib import Path
from typing import Any

from gr_platform import storage
from gr_platform.errors import UserError

Facts = dict[str, Any]
_PREFIX = "ingest_date="


def partition_facts(home: Path, ds: str) -> list[tuple[str, Facts]]:
    """Return each ingest date with its manifest's facts, oldest first; [] if nothing was ingested."""
    return [(_date(folder), storage.read_manifest(folder).facts) for folder in _folders(home, ds)]


def stored_facts(home: Path, ds: str) -> list[tuple[str, Facts]]:
    """Return each ingest date with what the footers of its files say, oldest first.

    num_rows, num_quarantined: rows of the events and quarantine files. types: column -> Arrow type, several joined by
    `/`, "missing" among them where a file has no such column. nulls: column -> NULLs, None if a footer counts none.
    Raises UserError if a file is no readable Parquet.
    """
    return [(_date(folder), _stored(folder)) for folder in _folders(home, ds)]


def _folders(home: Path, ds: str) -> list[Path]:
    return sorted((home / "events" / ds).glob(f"{_PREFIX}*"))


def _date(folder: Path) -> str:
    return folder.name.removeprefix(_PREFIX)


def _stored(folder: Path) -> Facts:
    footers = [_footer(file) for file in sorted(folder.glob("events-*.parquet"))]
    schemas = [footer.schema.to_arrow_schema() for footer in footers]
    columns = dict.fromkeys(name for schema in schemas for name in schema.names)
    found = {
        name: {str(schema.field(name).type) if name in schema.names else "missing" for schema in schemas}
        for name in columns
    }
    return {
        "num_rows": sum(footer.num_rows for footer in footers),
        "num_quarantined": sum(_footer(file).num_rows for file in folder.glob("quarantine-*.parquet")),
        "types": {name: "/".join(sorted(types)) for name, types in found.items()},
        "nulls": {name: _nulls(footers, name) for name in columns},
    }


def _footer(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(file)
    except (OSError, pa.ArrowInvalid):
        raise UserError(
            f"{file.name} of {file.parent.name} is not a readable Parquet file; run gr materialize to make it again"
        ) from None


def _nulls(footers: list[Any], name: str) -> int | None:
    total = 0
    for footer in footers:
        place = footer.schema.names.index(name) if name in footer.schema.names else None
        for group in range(footer.num_row_groups if place is not None else 0):
            statistics = footer.row_group(group).column(place).statistics
            if statistics is None or not statistics.has_null_count:
                return None
            total += statistics.null_count
    return total

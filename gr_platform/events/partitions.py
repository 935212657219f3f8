"""The partitions of a data set's events: which folder stands for each ingest date, and what is known of it cheaply.

Invariant: `events/<data set>/partitions.json` is replaced in one step after every partition is whole, so readers see
the last good set of all. Dates come oldest first, and only manifests and footers are read, so the cost grows with files
and not with rows.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from gr_platform import storage
from gr_platform.errors import UserError

Facts = dict[str, Any]
PREFIX = "ingest_date="
POINTER = "partitions.json"
POINTER_VERSION = 1


def partition_folders(home: Path, ds: str) -> dict[str, Path]:
    """Return ingest date -> folder of its partition, oldest first; {} if nothing was ingested.

    Raises UserError if the pointer is damaged.
    """
    parent = home / "events" / ds
    try:
        fields = storage.read_object(parent / POINTER)
        if fields["schema_version"] != POINTER_VERSION:
            raise ValueError(f"schema version {fields['schema_version']}, this release reads {POINTER_VERSION}")
        return {date: parent / f"{PREFIX}{date}" / str(name) for date, name in sorted(fields["partitions"].items())}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{POINTER} of {ds} is damaged ({error}); delete it and run gr materialize") from None


def publish(home: Path, ds: str, folders: dict[str, Path]) -> bool:
    """Make `folders` (ingest date -> folder) the partitions of a data set, then delete all others.

    Returns whether they were so already.
    """
    parent = home / "events" / ds
    same = partition_folders(home, ds) == folders
    if not same:
        named = {date: folder.name for date, folder in sorted(folders.items())}
        text = json.dumps({"schema_version": POINTER_VERSION, "partitions": named}, indent=1, sort_keys=True)
        storage.write_text(parent / POINTER, text + "\n")
    for date in parent.glob(f"{PREFIX}*"):
        for folder in date.iterdir():
            if folder not in folders.values():
                shutil.rmtree(folder)
        if not any(date.iterdir()):
            date.rmdir()
    return same


def event_files(folder: Path) -> list[Path]:
    """Return the files of a partition's events, in their order."""
    return sorted(folder.glob("events-*.parquet"))


def partition_facts(home: Path, ds: str) -> list[tuple[str, Facts]]:
    """Return each ingest date with its manifest's facts, oldest first; [] if nothing was ingested."""
    return [(date, storage.read_manifest(folder).facts) for date, folder in partition_folders(home, ds).items()]


def stored_facts(home: Path, ds: str) -> list[tuple[str, Facts]]:
    """Return each ingest date with what the footers of its files say, oldest first.

    num_rows, num_quarantined: rows of the events and quarantine files. types: column -> Arrow type, several joined by
    `/`, "missing" among them where a file has no such column. nulls: column -> NULLs, None if a footer counts none.
    Raises UserError if a file is no readable Parquet.
    """
    return [(date, _stored(folder)) for date, folder in partition_folders(home, ds).items()]


def _stored(folder: Path) -> Facts:
    footers = [_footer(file) for file in event_files(folder)]
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
            f"{file.name} of {file.parent.parent.name} is no readable Parquet file; run gr materialize to make it again"
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

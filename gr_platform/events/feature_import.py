"""Importing side information: an id, a time and the properties that hold from then on.

Invariant: a refused import leaves the landing folder as it was, and one that was killed can simply be done again.
"""
# ruff: noqa: S608 - identifiers and strings are quoted where they are made into SQL

import re
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb

from gr_platform import storage
from gr_platform.errors import UserError, machine_fault
from gr_platform.events.arrival import Arrival, as_parquet, receive
from gr_platform.events.columns import FLOAT_TYPES, INTEGER_TYPES, WIDE_TYPES, parquet
from gr_platform.events.database import connect, quoted
from gr_platform.events.declaration import Declaration
from gr_platform.events.features import (
    FOLDER,
    KINDS,
    FeatureEntry,
    FeatureFile,
    all_rows,
    describe,
    entries_of,
    feature_files,
    feature_query,
    is_intact,
    landed_name,
    publish,
)
from gr_platform.events.landing import IMPORT_WAIT_S, profiled
from gr_platform.events.ledger import load_declaration
from gr_platform.events.profile import Log
from gr_platform.events.readers import Source, open_source, unreadable

MAX_PROPERTIES = 64
# Rows that follow another of the same user, below which nothing is said of how often a number changes.
MIN_STEPS = 10
_PROPERTY = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_TIMES = ("event_ts", "timestamp", "time")


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedFeatures:
    """What the user named of an import of side information; what is None is declared or of a common name."""

    kind: str
    dataset: str
    format: str = "auto"
    id_column: str | None = None
    time_column: str | None = None
    time_unit: str = "auto"


def import_features(source: Path, wanted: WantedFeatures, *, home: Path, dry_run: bool = False) -> FeatureFile:
    """Return the landed copy of side information about items or users of an imported data set.

    A file imported again lands once; with another meaning it replaces what it was. With `dry_run` nothing is written.
    Raises UserError for anything the user can mend; the landing folder is unchanged then.
    """
    if wanted.kind not in KINDS:
        raise UserError(f"--as is {wanted.kind!r}, must be log, {' or '.join(KINDS)}")
    declaration = load_declaration(home, wanted.dataset)
    folder = home / "landing" / wanted.dataset / FOLDER
    with storage.exclusive(home, "landing", wait_s=IMPORT_WAIT_S), connect(home) as connection:
        opened = open_source(connection, source, wanted.format)
        with tempfile.TemporaryDirectory(dir=home, prefix=".landing-") as staging:
            arrival = receive(opened, Path(staging))
            entries = entries_of(folder, wanted.kind)
            found = _understand(connection, arrival, Path(staging), wanted, declaration, entries)
            same = next((each for each in entries if _same(each, found.entry) and is_intact(folder, each)), None)
            if same is not None:
                path = folder / landed_name(same, "parquet")
                return FeatureFile(dataset=wanted.dataset, path=path, entry=same, declaration=declaration, reused=True)
            if wanted.kind == "user-features":
                others = feature_files(home, wanted.dataset, wanted.kind, without=found.entry.sha256)
                _check_counters(connection, [*others, found])
            if not dry_run:
                publish(folder, found.path, found.entry)
            return replace(found, path=folder / landed_name(found.entry, "parquet"))


def _understand(
    connection: duckdb.DuckDBPyConnection,
    arrival: Arrival,
    staging: Path,
    wanted: WantedFeatures,
    declaration: Declaration,
    entries: list[FeatureEntry],
) -> FeatureFile:
    """Return a staged file with what its columns mean and how many of its rows break a rule."""
    source, now_ms = arrival.source, int(time.time() * 1000)
    what = KINDS[wanted.kind]
    flag = f"--{what.removesuffix('_id')}-column"
    id_column = _column(source, wanted.id_column, (*declaration.alternatives(what), what), what, flag)
    time_names = (*declaration.alternatives("event_ts"), *_TIMES)
    time_column = _column(source, wanted.time_column, time_names, "a time", "--time-column")
    properties = _properties(source, {id_column, time_column})
    used = [id_column, time_column, *properties.values()]
    built = as_parquet(connection, arrival, staging, used)
    # One column stands for both ids: a profile is of a log, and of side information only one of them is known.
    mapping = {"user_id": id_column, "item_id": id_column, "event_ts": time_column}
    log = Log(
        path=source.path,
        relation=parquet(built),
        types=source.columns,
        mapping=mapping,
        context=list(properties.values()),
    )
    found = profiled(connection, log, built, None, is_new=False, wanted_unit=wanted.time_unit, now_ms=now_ms)
    before = next((entry for entry in entries if entry.sha256 == arrival.sha256), None)
    fields: dict[str, Any] = {
        "kind": wanted.kind,
        "source_name": source.path.name,
        "sha256": arrival.sha256,
        "landed_sha256": storage.file_sha256(built),
        "num_rows": found.num_rows,
        "sequence": before.sequence if before else max((entry.sequence for entry in entries), default=-1) + 1,
        "landed_at_ms": now_ms,
        "format": source.format,
        "id_column": id_column,
        "time_column": time_column,
        "time_unit": found.time_unit,
        "properties": properties,
        "types": {name: source.columns[name] for name in used},
    }
    file = FeatureFile(
        dataset=wanted.dataset,
        path=built,
        entry=FeatureEntry(**fields, quarantined={}),
        declaration=declaration,
        reused=False,
    )
    _check_ids(file, source)
    broken = _count_broken(connection, file, source)
    _check_broken(file, broken)
    return replace(file, entry=replace(file.entry, quarantined=broken))


def _column(source: Source, named: str | None, names: Iterable[str], what: str, flag: str) -> str:
    """Return the column that was named, else the first one of these names, whatever their case."""
    folded = {column.lower(): column for column in source.columns}
    for name in [named] if named is not None else names:
        if name in source.columns or name.lower() in folded:
            return name if name in source.columns else folded[name.lower()]
    said = f"no column {named!r}" if named is not None else f"no column that is called like {what}"
    raise UserError(
        f"{source.path.name} has {said}; it has {', '.join(list(source.columns)[:20])}: name one with {flag}"
    )


def _properties(source: Source, taken: set[str]) -> dict[str, str]:
    """Return name -> column of all other columns; a name is the column's in lower case."""
    columns = [column for column in source.columns if column not in taken]
    if not 1 <= len(columns) <= MAX_PROPERTIES:
        raise UserError(
            f"{source.path.name} has {len(columns)} columns beside id and time, must be 1 to {MAX_PROPERTIES}: "
            "side information is an id, a time and properties"
        )
    for column in columns:
        kind = source.columns[column]
        if not _PROPERTY.fullmatch(column.lower()):
            raise UserError(
                f"column {column!r} of {source.path.name} cannot be the name of a property; use letters, digits, '_'"
            )
        if kind.endswith("[]") or kind == "BLOB" or kind.startswith(("STRUCT", "MAP")):
            raise UserError(
                f"column {column!r} of {source.path.name} is a {kind.split('(')[0]}, not one value a row; leave it out"
            )
    return {column.lower(): column for column in columns}


def _count_broken(connection: duckdb.DuckDBPyConnection, file: FeatureFile, source: Source) -> dict[str, int]:
    """Return rule -> rows that break it.

    Every cell is hashed: counts alone are answered from a file's statistics, and a page that cannot be decoded has to
    show when the file comes in, not when the copy is used.
    """
    cells = ", ".join(["id", "event_ts", *(quoted(f"p_{name}") for name in file.entry.properties)])
    counted = f"SELECT rule, count(*), bit_xor(hash({cells})) FROM ({feature_query(file)}) GROUP BY rule ORDER BY rule"
    try:
        rows = connection.sql(counted).fetchall()
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        if machine_fault(error):
            raise
        raise unreadable(source.path, error, copy=file.path) from None
    return {rule: count for rule, count, _ in rows if rule is not None}


def _check_ids(file: FeatureFile, source: Source) -> None:
    """Refuse numbers where ids are text: a number has lost its zeros."""
    entry = file.entry
    kind = entry.types[entry.id_column]
    is_number = kind in (*INTEGER_TYPES, *WIDE_TYPES, *FLOAT_TYPES) or kind.startswith("DECIMAL")
    if file.id_type == "string" and is_number:
        raise UserError(
            f"column {entry.id_column!r} of {source.path.name} holds numbers, but {KINDS[entry.kind]} of data set "
            f"{file.dataset} is string; store the ids as text"
        )


def _check_broken(file: FeatureFile, broken: dict[str, int]) -> None:
    entry = file.entry
    if 2 * sum(broken.values()) > entry.num_rows:
        raise UserError(
            f"most rows of {entry.source_name} break a rule ({describe(entry.kind, broken)}); name the columns of the "
            f"ids ({KINDS[entry.kind]} of data set {file.dataset} is {file.id_type}) and of the times"
        )


def _check_counters(connection: duckdb.DuckDBPyConnection, files: list[FeatureFile]) -> None:
    """Refuse a number that changes in most rows: a counter is no slow series, and every row of it would be an entry."""
    rows, names = all_rows(files)
    for name in names:
        column = quoted(f"p_{name}")
        before = f"lag({column}) OVER (PARTITION BY id ORDER BY event_ts, source_file, source_row)"
        steps, changes, numbers, all_ = connection.sql(
            f"SELECT count(before), count(*) FILTER (before <> {column}), count(TRY_CAST({column} AS DOUBLE)), "
            f"count(*) FROM (SELECT {column}, {before} AS before FROM ({rows}) WHERE {column} IS NOT NULL)"
        ).fetchall()[0]
        if all_ == numbers and steps >= MIN_STEPS and 2 * changes > steps:
            raise UserError(
                f"column {name!r} of {files[-1].entry.source_name} is a number that changes in {changes:,} of "
                f"{steps:,} rows after a user's first: a counter is no slow series; leave it out"
            )


def _same(stored: FeatureEntry, found: FeatureEntry) -> bool:
    names = ("sha256", "id_column", "time_column", "time_unit", "properties")
    return all(getattr(stored, name) == getattr(found, name) for name in names)

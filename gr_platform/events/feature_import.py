"""Importing side information: an id, a time and the properties that hold from then on; without a time they always did.

Invariant: a refused import leaves the landing folder as it was, and one that was killed can simply be done again.
"""
# ruff: noqa: S608 - identifiers and strings are quoted where they are made into SQL

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb

from gr_platform import storage
from gr_platform.errors import UserError, machine_fault
from gr_platform.events.arrival import Arrival, as_parquet, receive
from gr_platform.events.columns import FLOAT_TYPES, INTEGER_TYPES, WIDE_TYPES, parquet
from gr_platform.events.database import connect, quoted
from gr_platform.events.declaration import Declaration
from gr_platform.events.feature_columns import WantedFeatures, columns_of
from gr_platform.events.features import (
    ALWAYS_MS,
    FOLDER,
    KINDS,
    LATER_ROW,
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
from gr_platform.events.movielens import of_movies_or_users
from gr_platform.events.profile import Log
from gr_platform.events.readers import Source, open_source, unreadable

__all__ = ["WantedFeatures", "import_features"]

# Rows that follow another of the same user, below which nothing is said of how often a number changes.
MIN_STEPS = 10


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
        opened = open_source(connection, source, wanted.format, holds=wanted.kind)
        opened = of_movies_or_users(opened, wanted.kind, wanted.format)
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
    columns = columns_of(source, wanted, declaration)
    built = as_parquet(connection, arrival, staging, columns.used)
    time_unit = None
    if columns.time is not None:
        # One column stands for both ids: a profile is of a log, and of side information only one of them is known.
        mapping = {"user_id": columns.id, "item_id": columns.id, "event_ts": columns.time}
        context = list(columns.properties.values())
        log = Log(path=source.path, relation=parquet(built), types=source.columns, mapping=mapping, context=context)
        found = profiled(connection, log, built, None, is_new=False, wanted_unit=wanted.time_unit, now_ms=now_ms)
        time_unit = found.time_unit
    before = next((entry for entry in entries if entry.sha256 == arrival.sha256), None)
    entry = FeatureEntry(
        kind=wanted.kind,
        source_name=source.path.name,
        sha256=arrival.sha256,
        landed_sha256=storage.file_sha256(built),
        num_rows=0,
        sequence=before.sequence if before else max((entry.sequence for entry in entries), default=-1) + 1,
        landed_at_ms=now_ms,
        format=source.format,
        id_column=columns.id,
        time_column=columns.time,
        time_unit=time_unit,
        properties=columns.properties,
        types={name: source.columns[name] for name in columns.used},
        quarantined={},
    )
    file = FeatureFile(dataset=wanted.dataset, path=built, entry=entry, declaration=declaration, reused=False)
    _check_ids(file, source)
    return _counted(connection, file, source)


def _counted(connection: duckdb.DuckDBPyConnection, file: FeatureFile, source: Source) -> FeatureFile:
    """Return the file with what was counted of its rows. Raises UserError if they make no sense as what they are."""
    # Every cell is hashed: counts alone are answered from a file's statistics, and a page that cannot be decoded has to
    # show when the file comes in, not when the copy is used.
    said = ", ".join(quoted(f"p_{name}") for name in file.entry.properties)
    counted = f"SELECT rule, count(*), bit_xor(hash(id, event_ts, {said})) FROM ({feature_query(file)}) GROUP BY rule"
    rules = {rule: count for rule, count, _ in _answered(connection, f"{counted} ORDER BY rule", file, source)}
    if not rules:
        raise UserError(f"{source.path.name} holds no rows (only a header or an empty table); give one with rows")
    broken = {rule: count for rule, count in rules.items() if rule is not None}
    entry = replace(file.entry, num_rows=sum(rules.values()), quarantined=broken)
    if 2 * sum(broken.values()) > entry.num_rows:
        raise UserError(
            f"most rows of {entry.source_name} break a rule ({describe(entry.kind, broken)}); name the columns of the "
            f"ids ({KINDS[entry.kind]} of data set {file.dataset} is {file.id_type}) and of the times"
        )
    if entry.time_column is None:
        entry = replace(entry, num_repeated=_num_repeated(connection, replace(file, entry=entry), source))
    return replace(file, entry=entry)


def _num_repeated(connection: duckdb.DuckDBPyConnection, file: FeatureFile, source: Source) -> int:
    """Return how many rows of a file without times have a later one of their id; refuse what looks like a history."""
    entry, said = file.entry, f"row({', '.join(quoted(f'p_{name}') for name in file.entry.properties)})"
    last = f"first_value({said}) OVER (PARTITION BY id ORDER BY source_row DESC)"
    rows = (
        f"SELECT {said} AS said, {last} AS last, {LATER_ROW} AS later FROM ({feature_query(file)}) WHERE rule IS NULL"
    )
    counted = f"SELECT count(later), count(later) FILTER (said IS DISTINCT FROM last) FROM ({rows})"
    repeated, differing = _answered(connection, counted, file, source)[0]
    if 2 * differing > entry.num_rows:
        raise UserError(
            f"{differing:,} of {entry.num_rows:,} rows of {entry.source_name} say something else than the last row of "
            f"their {KINDS[entry.kind]}, but without a time an id has one row: name the column of the times with "
            "--time-column, or write the values of an id into one cell, such as Action|Comedy"
        )
    return int(repeated)


def _answered(connection: duckdb.DuckDBPyConnection, sql: str, file: FeatureFile, source: Source) -> list[Any]:
    """Return the rows of a query over a staged file. Raises UserError if the file turns out unreadable."""
    try:
        return connection.sql(sql).fetchall()
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        if machine_fault(error):
            raise
        raise unreadable(source.path, error, copy=file.path) from None


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


def _check_counters(connection: duckdb.DuckDBPyConnection, files: list[FeatureFile]) -> None:
    """Refuse a number that changes in most rows: a counter is no slow series, and every row of it would be an entry."""
    rows, names = all_rows(files)
    for name in names:
        column = quoted(f"p_{name}")
        before = f"lag({column}) OVER (PARTITION BY id ORDER BY event_ts, source_file, source_row)"
        steps, changes, numbers, all_ = connection.sql(
            f"SELECT count(before), count(*) FILTER (before <> {column}), count(TRY_CAST({column} AS DOUBLE)), "
            f"count(*) FROM (SELECT {column}, {before} AS before FROM ({rows}) WHERE {column} IS NOT NULL AND "
            f"event_ts > {ALWAYS_MS})"
        ).fetchall()[0]
        if all_ == numbers and steps >= MIN_STEPS and 2 * changes > steps:
            raise UserError(
                f"column {name!r} of {files[-1].entry.source_name} is a number that changes in {changes:,} of "
                f"{steps:,} rows after a user's first: a counter is no slow series; leave it out"
            )


def _same(stored: FeatureEntry, found: FeatureEntry) -> bool:
    names = ("sha256", "id_column", "time_column", "time_unit", "properties")
    return all(getattr(stored, name) == getattr(found, name) for name in names)

"""Landed files become clean events: validated, de-duplicated, sorted, one hive partition per ingest date.

Invariant: rows in = kept + quarantined + duplicates, and a partition's content is a function of its landed files and
the declaration alone, so doing it again changes nothing.
"""
# ruff: noqa: S608 - strings are quoted by `literal`

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events.database import connect, literal
from gr_platform.events.declaration import Declaration
from gr_platform.events.landing import LandedFile, landed_files, load_declaration
from gr_platform.events.quality import describe, judged_query

log = logging.getLogger(__name__)
EVENTS = "events-0.parquet"
QUARANTINE = "quarantine-0.parquet"
# What makes two rows one event: their id, and without one everything they say.
_SAME = "event_id, CASE WHEN event_id IS NULL THEN (user_id, item_id, action, value, event_ts) END"
_COPY = "(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 122880)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One ingest date: its folder, its manifest (facts: rows_in, rows_kept, duplicates, quarantined by rule, ...)."""

    ingest_date: str
    folder: Path
    manifest: storage.Manifest
    reused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestResult:
    """All partitions of a data set with their totals. digest covers content, not dates."""

    dataset: str
    partitions: list[Partition]
    rows_in: int
    rows_kept: int
    duplicates: int
    quarantined: dict[str, int]
    digest: str
    reused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanEvents:
    """The events that later stages read."""

    home: Path
    declaration: Declaration
    files: list[Path]
    digest: str

    def query(self, sql: str, **tables: pa.Table) -> pa.Table:
        """Return the result of SQL over `events`: the columns of an event and source_file, source_row."""
        with self.connect(**tables) as connection:
            return connection.sql(sql).to_arrow_table()

    def connect(self, **tables: pa.Table) -> Any:
        """Return a context manager: a database with the view `events` and the given tables."""
        return _events_database(self.home, self.files, tables)


@contextmanager
def _events_database(home: Path, files: list[Path], tables: dict[str, pa.Table]) -> Iterator[duckdb.DuckDBPyConnection]:
    with connect(home) as connection:
        names = ", ".join(literal(str(file)) for file in files)
        # A partition holds no row twice; the same log landed on two days does, and counts once.
        once = f"QUALIFY row_number() OVER (PARTITION BY {_SAME} ORDER BY source_file, source_row) = 1"
        connection.execute(
            f"CREATE VIEW events AS SELECT * FROM read_parquet([{names}], hive_partitioning=false) "
            f"{once if len(files) > 1 else ''}"
        )
        for name, table in tables.items():
            connection.register(name, table)
        yield connection


def ingest(home: Path, ds: str) -> IngestResult:
    """Return the clean events of all landed files, writing the partitions that are not there yet.

    Raises UserError if nothing was landed, or every row of a partition broke a rule (named with counts); partitions
    that were there stay as they were.
    """
    landed = landed_files(home, ds)
    declaration = load_declaration(home, ds)
    if not landed:
        raise UserError(f"data set {ds} has no landed files; run gr import FILE first")
    parent = home / "events" / ds
    by_date = groupby(sorted(landed, key=lambda file: (file.ingest_date, file.entry.sequence)), lambda f: f.ingest_date)
    partitions = [_partition(home, parent, date, list(files), declaration) for date, files in by_date]
    kept_folders = {partition.folder.name for partition in partitions}
    stale = [folder for folder in parent.glob("ingest_date=*") if folder.name not in kept_folders]
    for folder in stale:
        shutil.rmtree(folder)
    return _result(ds, partitions, reused=not stale and all(partition.reused for partition in partitions))


def clean_events(home: Path, ds: str) -> CleanEvents:
    """Return the ingested events of a data set. Raises UserError if there are none yet."""
    folders = sorted((home / "events" / ds).glob("ingest_date=*"))
    if not folders:
        raise UserError(f"data set {ds} has no ingested events yet; run the events stage first (gr materialize)")
    manifests = [storage.read_manifest(folder) for folder in folders]
    return CleanEvents(
        home=home,
        declaration=load_declaration(home, ds),
        files=[folder / EVENTS for folder in folders],
        digest=_digest(manifests),
    )


def _digest(manifests: Iterable[storage.Manifest]) -> str:
    return storage.digest_of(sorted(manifest.digest for manifest in manifests))


def _result(ds: str, partitions: list[Partition], *, reused: bool) -> IngestResult:
    facts = [partition.manifest.facts for partition in partitions]
    quarantined: dict[str, int] = {}
    for fact in facts:
        for rule, count in fact["quarantined"].items():
            quarantined[rule] = quarantined.get(rule, 0) + count
    return IngestResult(
        dataset=ds,
        partitions=partitions,
        rows_in=sum(fact["rows_in"] for fact in facts),
        rows_kept=sum(fact["rows_kept"] for fact in facts),
        duplicates=sum(fact["duplicates"] for fact in facts),
        quarantined=quarantined,
        digest=_digest(partition.manifest for partition in partitions),
        reused=reused,
    )


def _spec(files: list[LandedFile], declaration: Declaration) -> dict[str, Any]:
    """Return what a partition is made from: of the declaration only what bears on these files."""
    return {
        "files": [{"sha256": f.sha256, "landed": f.entry.landed_sha256, "sequence": f.entry.sequence} for f in files],
        "time_units": [f.entry.time_unit for f in files],
        "time_zone": declaration.time_zone,
        "actions": sorted({action for f in files for action in f.entry.actions} & set(declaration.actions)),
        "rules": 1,
    }


def _partition(home: Path, parent: Path, date: str, files: list[LandedFile], declaration: Declaration) -> Partition:
    folder, spec = parent / f"ingest_date={date}", _spec(files, declaration)
    if (folder / storage.MANIFEST).is_file():
        try:
            manifest = storage.read_manifest(folder, verify=True)
        except UserError as error:
            log.warning("partition is rebuilt dataset=%s date=%s reason=%s", declaration.name, date, error)
        else:
            if manifest.spec == spec:
                return Partition(ingest_date=date, folder=folder, manifest=manifest, reused=True)
    parent.mkdir(parents=True, exist_ok=True)
    storage.sweep(parent)
    building = Path(tempfile.mkdtemp(dir=parent, prefix=".building-"))
    try:
        facts = _build(home, building, files, declaration)
        manifest = storage.write_manifest(building, kind="events", spec=spec, facts=facts)
        _swap(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return Partition(ingest_date=date, folder=folder, manifest=manifest, reused=False)


def _swap(building: Path, folder: Path) -> None:
    """Put `building` in the place of `folder`; after a kill in between the partition is simply made again."""
    if folder.exists():
        retired = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".retired-"))
        os.rename(folder, retired / folder.name)
        os.rename(building, folder)
        shutil.rmtree(retired)
    else:
        os.rename(building, folder)


def _build(home: Path, folder: Path, files: list[LandedFile], declaration: Declaration) -> dict[str, Any]:
    """Write a partition's events and quarantine into `folder`; return its facts."""
    for file in files:
        if not file.path.is_file() or storage.file_sha256(file.path) != file.entry.landed_sha256:
            raise UserError(f"the landed copy of {file.entry.source_name} is missing or damaged; import the file again")
    with connect(home) as connection:
        prepared = " UNION ALL ".join(judged_query(file) for file in files)
        connection.execute(f"CREATE VIEW judged AS {prepared}")
        verdicts: dict[str | None, int] = dict(
            connection.sql("SELECT rule, count(*) FROM judged GROUP BY rule ORDER BY rule").fetchall()
        )
        valid = verdicts.pop(None, 0)
        quarantined = {str(name): count for name, count in verdicts.items()}
        if not valid:
            names = ", ".join(sorted({file.entry.source_name for file in files}))
            raise UserError(
                f"no usable event in {names}: {describe(quarantined)}; import it again with the right columns and "
                "time unit"
            )
        _write(connection, folder)
        facts = _facts(connection, folder)
    facts |= {
        "rows_in": sum(file.num_rows for file in files),
        "quarantined": quarantined,
        "duplicates": valid - facts["rows_kept"],
        "sources": [file.entry.source_name for file in files],
    }
    accounted = facts["rows_kept"] + facts["duplicates"] + sum(quarantined.values())
    if facts["rows_in"] != accounted or facts.pop("rows_quarantined") != sum(quarantined.values()):
        raise RuntimeError(f"rows are lost: {facts['rows_in']} in, {accounted} accounted for")
    return facts


def _write(connection: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """Write the valid events, each once, sorted by (user, event_ts, source order), and quarantined rows as found."""
    has_ids = connection.sql("SELECT count(event_id) > 0 FROM judged").fetchall()[0][0]
    if has_ids:
        unique = (
            "SELECT * FROM judged WHERE rule IS NULL "
            f"QUALIFY row_number() OVER (PARTITION BY {_SAME} ORDER BY source_file, source_row) = 1"
        )
    else:
        unique = (
            "SELECT user_id, item_id, action, value, event_ts, NULL::VARCHAR AS event_id, "
            "unnest(min(struct_pack(source_file := source_file, source_row := source_row))) "
            "FROM judged WHERE rule IS NULL "
            "GROUP BY user_id, item_id, action, value, event_ts"
        )
    connection.execute(
        f"COPY (SELECT user_id, item_id, action, value, event_ts, event_id, source_file, source_row FROM ({unique}) "
        f"ORDER BY user_id, event_ts, source_file, source_row) TO {literal(str(folder / EVENTS))} {_COPY}"
    )
    connection.execute(
        "COPY (SELECT rule, source_name AS source_file, source_row, raw_user AS user_id, raw_item AS "
        "item_id, action, raw_value AS value, raw_time AS event_ts FROM judged WHERE rule IS NOT NULL "
        f"ORDER BY judged.source_file, source_row) TO {literal(str(folder / QUARANTINE))} {_COPY}"
    )


def _facts(connection: duckdb.DuckDBPyConnection, folder: Path) -> dict[str, Any]:
    events = f"read_parquet({literal(str(folder / EVENTS))}, hive_partitioning=false)"
    quarantine = f"read_parquet({literal(str(folder / QUARANTINE))}, hive_partitioning=false)"
    names = ("rows_kept", "num_users", "num_items", "first_ts", "last_ts")
    figures = connection.sql(
        f"SELECT count(*), count(DISTINCT user_id), count(DISTINCT item_id), min(event_ts), max(event_ts) FROM {events}"
    ).fetchall()[0]
    actions = connection.sql(f"SELECT action, count(*) FROM {events} GROUP BY action ORDER BY action").fetchall()
    return dict(zip(names, figures, strict=True)) | {
        "actions": dict(actions),
        "rows_quarantined": connection.sql(f"SELECT count(*) FROM {quarantine}").fetchall()[0][0],
    }

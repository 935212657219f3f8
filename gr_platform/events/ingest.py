"""Landed files become clean events, one partition per ingest date, each made once and only when what it is made from
changed.

Invariant: what a partition holds is a function of its landed files, the declaration and the events of earlier dates
that it could repeat. Readers see the old set of partitions until every new one is whole, and a run that was killed
leaves finished partitions that the next one takes.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import duckdb
import pyarrow as pa

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events.database import connect, parquet_of
from gr_platform.events.declaration import Declaration
from gr_platform.events.landing import landed_files, load_declaration
from gr_platform.events.partitioning import Partition, PartitionMaker
from gr_platform.events.partitions import event_files, partition_folders, publish


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestResult:
    """All partitions of a data set, oldest first, with their totals. digest covers content, not dates."""

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
    """The events that later stages read: partitions (ingest date -> folder), oldest first, and all their files."""

    home: Path
    declaration: Declaration
    partitions: dict[str, Path]
    files: list[Path]
    digest: str

    def query(self, sql: str, **tables: pa.Table) -> pa.Table:
        """Return the result of SQL over `events`: the columns of an event and source_file, source_row."""
        with self.connect(**tables) as connection:
            return connection.sql(sql).to_arrow_table()

    @contextmanager
    def connect(self, **tables: pa.Table) -> Iterator[duckdb.DuckDBPyConnection]:
        """Yield a database with the view `events` and the given tables."""
        with connect(self.home) as connection:
            connection.execute(f"CREATE VIEW events AS FROM {parquet_of(self.files)}")
            for name, table in tables.items():
                connection.register(name, table)
            yield connection


def ingest(home: Path, ds: str) -> IngestResult:
    """Return the clean events of all landed files, making the partitions that are not there yet.

    Raises UserError if nothing was landed, the disk is too small, another program ingests, or every row of a partition
    broke a rule (named with counts); the partitions that were there stay as they were.
    """
    landed = landed_files(home, ds)
    declaration = load_declaration(home, ds)
    if not landed:
        raise UserError(f"data set {ds} has no landed files; run gr import FILE first")
    parent = home / "events" / ds
    parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(landed, key=lambda file: (file.ingest_date, file.entry.sequence))
    with storage.exclusive(home, f"events-{ds}"):
        for leftover in parent.glob(".building-*"):
            shutil.rmtree(leftover)
        by_date = {date: list(files) for date, files in groupby(ordered, lambda file: file.ingest_date)}
        partitions: list[Partition] = []
        with PartitionMaker(home, parent, declaration, by_date) as maker:
            for date in by_date:
                partitions.append(maker.partition(date, partitions))
        same = publish(home, ds, {partition.ingest_date: partition.folder for partition in partitions})
    return _result(ds, partitions, reused=same and all(partition.reused for partition in partitions))


def clean_events(home: Path, ds: str) -> CleanEvents:
    """Return the ingested events of a data set. Raises UserError if there are none yet."""
    folders = partition_folders(home, ds)
    if not folders:
        raise UserError(f"data set {ds} has no ingested events yet; run the events stage first (gr materialize)")
    return CleanEvents(
        home=home,
        declaration=load_declaration(home, ds),
        partitions=folders,
        files=[file for folder in folders.values() for file in event_files(folder)],
        digest=_digest(storage.read_manifest(folder) for folder in folders.values()),
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

"""Makes one partition of clean events per ingest date, or takes the one that was made from the same before.

Invariant: what a partition holds is a function of its landed files, the declaration and the rows of files of other
dates that its own may repeat; all of that is its spec. It becomes visible by one rename.
"""
# ruff: noqa: S608 - strings are quoted by `literal`

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events.cleaning import ITEMS, Judged, judge, write_clean
from gr_platform.events.database import connect, parquet_of
from gr_platform.events.declaration import Declaration
from gr_platform.events.landing import LandedFile
from gr_platform.events.ledger import is_intact
from gr_platform.events.partitions import PREFIX, event_files
from gr_platform.events.quality import describe, judged_query

log = logging.getLogger(__name__)
CLEANING_VERSION = 3
# Written and spilled while rows are cleaned: 38 were measured at 100 M rows; small logs sort in memory.
DISK_BYTES_PER_ROW = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One ingest date: its folder, its manifest (facts: rows_in, rows_kept, duplicates, quarantined by rule, ...)."""

    ingest_date: str
    folder: Path
    manifest: storage.Manifest
    reused: bool


def _spec(files: list[LandedFile], declaration: Declaration) -> dict[str, Any]:
    """Return what a partition is made from: of the declaration only what bears on these files."""
    declared = ("user_id_type", "item_id_type", "time_zone", "rename_actions")
    return {
        "files": [_file_spec(file) for file in files],
        "declaration": {name: getattr(declaration, name) for name in declared},
        "context": list(declaration.context),
        "actions": sorted({action for f in files for action in f.entry.actions} & set(declaration.actions)),
        "version": CLEANING_VERSION,
    }


def _file_spec(file: LandedFile) -> dict[str, Any]:
    named = ("sha256", "num_forgotten", "sequence", "columns", "ratings", "time_unit")
    return {name: getattr(file.entry, name) for name in named}


class PartitionMaker:
    """Makes the partitions of a data set; knows the users and items of those before, once something is made."""

    def __init__(
        self, home: Path, parent: Path, declaration: Declaration, by_date: dict[str, list[LandedFile]]
    ) -> None:
        self.home, self.parent, self.declaration, self.by_date = home, parent, declaration, by_date
        self.specs = {date: _spec(files, declaration) for date, files in by_date.items()}
        self.made = {date: self._made(date) for date in by_date}
        self._judged: dict[str, Judged] = {}
        self._database = connect(home)
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._num_known = 0

    def __enter__(self) -> "PartitionMaker":
        return self

    def __exit__(self, *failure: Any) -> None:
        if self._connection is not None:
            self._database.__exit__(*failure)

    def _made(self, date: str) -> list[tuple[Path, storage.Manifest]]:
        """Return the whole partitions of a date that were made of its files, whatever they repeat of other dates."""
        found = []
        for folder in sorted((self.parent / f"{PREFIX}{date}").glob("*")):
            manifest = _valid(folder)
            if manifest is not None and manifest.spec | self.specs[date] == manifest.spec:
                found.append((folder, manifest))
        return found

    def partition(self, date: str, before: list[Partition]) -> Partition:
        """Return the partition of an ingest date, as it is if it was made from the same."""
        repeatable = self._repeatable(date)
        spec = self.specs[date] | {"before": [_file_spec(file) for file in repeatable]}
        for folder, manifest in self.made[date]:
            if manifest.spec == spec:
                return Partition(ingest_date=date, folder=folder, manifest=manifest, reused=True)
        return self._make(date, spec, repeatable, before)

    def _spans(self, date: str) -> dict[int, list[int]]:
        """Return sequence -> first time, last time, number of event ids of a date's files that have a valid row."""
        if self.made[date] and date not in self._judged:
            return {int(file): span for file, span in self.made[date][0][1].facts["spans"].items()}
        return self._judge(date).spans

    def _judge(self, date: str) -> Judged:
        if date not in self._judged:
            files = self.by_date[date]
            _require_intact(files)
            self._judged[date] = judged = judge(self.connection, _judged_rows(files))
            # Nothing is left of a date whose people were all forgotten: that is no fault of its files.
            if not judged.num_valid and not any(file.entry.num_forgotten for file in files):
                raise UserError(
                    f"no usable event in {', '.join(sorted({file.entry.source_name for file in files}))}: "
                    f"{describe(judged.quarantined)}; import it again with the right columns and time unit"
                )
        return self._judged[date]

    def _repeatable(self, date: str) -> list[LandedFile]:
        """Return the files of other dates that rows of this one may repeat: landed before one of its files, with events
        of the same time or, where both have event ids, of any time."""
        if len(self.by_date) == 1:
            return []
        found = []
        for other, files in self.by_date.items():
            if other == date or files[0].entry.sequence > self.by_date[date][-1].entry.sequence:
                continue
            theirs = self._spans(other)
            found += [
                file for file in files if any(_overlap(file, theirs, *each) for each in self._spans(date).items())
            ]
        return found

    def _make(
        self, date: str, spec: dict[str, Any], repeatable: list[LandedFile], before: list[Partition]
    ) -> Partition:
        files = self.by_date[date]
        judged = self._judge(date)
        _require_intact(repeatable)
        _check_disk(self.home, judged.num_rows)
        connection = self._learned(before)
        connection.execute(f"CREATE OR REPLACE VIEW judged AS {_judged_rows(files)}")
        building = Path(tempfile.mkdtemp(dir=self.parent, prefix=".building-"))
        try:
            earlier = _judged_rows(repeatable)
            facts = write_clean(connection, building, judged, self.declaration, earlier, label=f"ingest {date}")
            facts |= self._compared(connection, building, before)
            facts |= {
                "sources": [file.entry.source_name for file in files],
                "spans": {str(file): span for file, span in judged.spans.items()},
            }
            manifest = storage.write_manifest(building, kind="events", spec=spec, facts=facts)
            folder = self.parent / f"{PREFIX}{date}" / manifest.digest[:16]
            folder.parent.mkdir(exist_ok=True)
            if folder.exists():  # a damaged one: a whole one would have been taken
                shutil.rmtree(folder)
            os.rename(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        log.info("partition made date=%s rows=%d kept=%d", date, facts["rows_in"], facts["rows_kept"])
        return Partition(ingest_date=date, folder=folder, manifest=manifest, reused=False)

    def _compared(
        self, connection: duckdb.DuckDBPyConnection, building: Path, before: list[Partition]
    ) -> dict[str, int]:
        """Return what of a partition is late or new against the partitions before it."""
        files = event_files(building)
        newest = max((last for each in before if (last := each.manifest.facts["last_ts"]) is not None), default=None)
        late = 0
        if newest is not None:
            counted = f"SELECT count(*) FROM {parquet_of(files)} WHERE event_ts < {newest}"
            late = connection.sql(counted).fetchall()[0][0]
        new_users, new_items = self._learn(files, [building / ITEMS])
        self._num_known += 1
        return {"num_late": late, "num_new_users": new_users, "num_new_items": new_items}

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """The database, opened when it is first needed."""
        if self._connection is None:
            self._connection = self._database.__enter__()
            types = {"int64": "BIGINT", "string": "VARCHAR"}
            for what, id_type in (("user", self.declaration.user_id_type), ("item", self.declaration.item_id_type)):
                self._connection.execute(f"CREATE TABLE known_{what}s ({what}_id {types[id_type]})")
        return self._connection

    def _learned(self, before: list[Partition]) -> duckdb.DuckDBPyConnection:
        """Return the database, its tables `known_users` and `known_items` holding those of all partitions before."""
        if unknown := before[self._num_known :]:
            files = [file for each in unknown for file in event_files(each.folder)]
            self._learn(files, [each.folder / ITEMS for each in unknown])
            self._num_known = len(before)
        return self.connection

    def _learn(self, files: list[Path], items: list[Path]) -> tuple[int, int]:
        """Add the users and items of a partition to those known; return how many were new."""
        counts = []
        for what, source in (("user", files), ("item", items)):
            fresh = f"SELECT DISTINCT {what}_id FROM {parquet_of(source)} ANTI JOIN known_{what}s USING ({what}_id)"
            counts.append(self.connection.execute(f"INSERT INTO known_{what}s {fresh}").fetchall()[0][0])
        return counts[0], counts[1]


def _judged_rows(files: list[LandedFile]) -> str:
    return " UNION ALL ".join(map(judged_query, files))


def _require_intact(files: list[LandedFile]) -> None:
    for file in files:
        if not is_intact(file):
            raise UserError(f"the landed copy of {file.entry.source_name} is missing or damaged; import the file again")


def _overlap(file: LandedFile, spans: dict[int, list[int]], sequence: int, span: list[int]) -> bool:
    """Return whether rows of the file `sequence` with `span` may repeat rows of another date's `file`."""
    theirs = spans.get(file.entry.sequence)
    if theirs is None or file.entry.sequence > sequence:
        return False
    return (theirs[0] <= span[1] and theirs[1] >= span[0]) or bool(theirs[2] and span[2])


def _valid(folder: Path) -> storage.Manifest | None:
    """Return the manifest of a partition that is whole, else None."""
    try:
        return storage.read_manifest(folder, verify=True)
    except UserError as error:
        log.warning("partition is made again folder=%s reason=%s", folder.name, error)
        return None


def _check_disk(home: Path, num_rows: int) -> None:
    needed, free = num_rows * DISK_BYTES_PER_ROW, shutil.disk_usage(home).free
    log.info("disk needed_gb=%.2f free_gb=%.2f rows=%d", needed / 1e9, free / 1e9, num_rows)
    if needed > free:
        raise UserError(
            f"{num_rows:,} rows need about {needed / 1e9:.1f} GB of disk to be cleaned, {free / 1e9:.1f} GB are free; "
            "make room or set GR_HOME to a larger disk"
        )

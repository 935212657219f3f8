"""Importing a log: its bytes are copied into the landing folder, and what they mean is written into the ledger.

Invariant: nothing is dropped here, so every later verdict can name a source row; a refused import leaves the landing
folder as it was, and one that is killed can simply be done again.
"""

import logging
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb

from gr_platform import storage
from gr_platform.errors import machine_fault
from gr_platform.events import catalogue, shipped
from gr_platform.events.arrival import Arrival, as_parquet, receive
from gr_platform.events.columns import parquet
from gr_platform.events.database import connect
from gr_platform.events.declaration import Declaration
from gr_platform.events.defaults import declare
from gr_platform.events.guessing import default_name, map_columns
from gr_platform.events.ledger import (
    Entry,
    LandedFile,
    active_dataset,
    is_intact,
    landed_file,
    landed_files,
    ledger_entries,
    load_declaration,
    publish,
    titles,
)
from gr_platform.events.preview import Preview, preview
from gr_platform.events.profile import Log, Profile, profile
from gr_platform.events.readers import log_files, open_source, unreadable
from gr_platform.events.request import Job, Wanted, open_job, own_hints

__all__ = ["LandedFile", "active_dataset", "import_file", "landed_files", "load_declaration", "titles"]

log = logging.getLogger(__name__)
# Imports are short: one that finds another at work waits for it.
IMPORT_WAIT_S = 600.0
_STAGING = ".landing-"


def import_file(source: Path | str, *, home: Path, activate: bool = True, **named: Any) -> LandedFile:
    """Return the landed copy of a log; `named` are the fields of `Wanted`. activate: make its data set the active one.

    A file imported again, under any name, lands once; with another meaning it replaces what it was.
    Raises UserError for anything the user can mend; the landing folder is unchanged then.
    """
    wanted = Wanted(**named)
    with storage.exclusive(home, "landing", wait_s=IMPORT_WAIT_S), connect(home) as connection:
        job = open_job(connection, home, Path(source), wanted)
        for leftover in home.glob(f"{_STAGING}*"):  # of an import that was killed: nobody else may be at work here
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(dir=home, prefix=_STAGING) as staging:
            arrival = receive(job.source, Path(staging))
            if same := _landed_before(job, arrival):
                if activate:
                    storage.write_text(home / "landing" / "active", job.name + "\n")
                return same
            landed, texts = _understand(connection, job, arrival, Path(staging))
            publish(home, job.folder, landed.path, landed.entry, landed.declaration, texts, activate=activate)
        log.info("landed dataset=%s file=%s rows=%d", job.name, job.source.path.name, landed.num_rows)
        return landed_file(job.folder, landed.entry, landed.declaration, reused=False)


def import_folder(folder: Path, *, home: Path, **named: Any) -> list[LandedFile]:
    """Return the landed copies of all logs in a folder, in the order of their names, as files of one data set.

    Raises UserError as `import_file` does; the files before the refused one have landed then.
    """
    named |= {"dataset": folder_dataset(folder, home=home, **named)}
    return [import_file(path, home=home, **named) for path in log_files(folder)]


def folder_dataset(folder: Path, *, home: Path, **named: Any) -> str:
    """Return the data set of a folder of logs: as named or declared, as its first log calls itself, else as itself."""
    wanted = Wanted(**named)
    if wanted.dataset:
        return wanted.dataset
    if wanted.declaration:
        return shipped.read(wanted.declaration).name
    with connect(home) as connection:
        own = own_hints(open_source(connection, log_files(folder)[0], wanted.format))
    return own.get("name") or default_name(folder, "folder")


def preview_file(source: Path | str, *, home: Path, **named: Any) -> Preview:
    """Return what `import_file` would do; nothing is written. Raises UserError as it does."""
    with connect(home) as connection:
        job = open_job(connection, home, Path(source), Wanted(**named))
        with tempfile.TemporaryDirectory(dir=home, prefix=".spill-") as staging:
            arrival = receive(job.source, None)
            return preview(connection, _understand(connection, job, arrival, Path(staging))[0])


def _landed_before(job: Job, arrival: Arrival) -> LandedFile | None:
    entry = next((each for each in ledger_entries(job.folder) if each.sha256 == arrival.sha256), None)
    if entry is None:
        return None
    landed = landed_file(job.folder, entry, load_declaration(job.home, job.name), reused=True)
    return landed if is_intact(landed) and job.wanted.agrees_with(entry, landed.declaration, job.given) else None


def _understand(
    connection: duckdb.DuckDBPyConnection, job: Job, arrival: Arrival, staging: Path
) -> tuple[LandedFile, dict[str, str]]:
    """Return a staged log with what its columns mean and its data set's declaration, and its catalogue's titles."""
    now_ms, source, wanted = int(time.time() * 1000), job.source, job.wanted
    entries = ledger_entries(job.folder)
    before = next((entry for entry in entries if entry.sha256 == arrival.sha256), None)
    # A data set whose only file is being replaced starts afresh: its declaration came from that file.
    is_new = all(entry.sha256 == arrival.sha256 for entry in entries)
    declared = job.given if is_new else load_declaration(job.home, job.name)
    if job.given and declared:
        declared = shipped.agreed(job.given, declared)
    mapping = map_columns(source.path, list(source.columns), wanted.columns, declared)
    beside = catalogue.find_catalogue(source.path, source.format, declared.catalogue if declared else ())
    context = [name for name in source.columns if declared and name.lower() in declared.context]
    used = dict.fromkeys([*mapping.values(), *context])
    built = as_parquet(connection, arrival, staging, used)
    staged = Log(path=source.path, relation=parquet(built), types=source.columns, mapping=mapping, context=context)
    found = profiled(connection, staged, built, declared, is_new=is_new, wanted_unit=wanted.time_unit, now_ms=now_ms)
    declaration = declare(job.name, source, mapping, found, declared, job.hints, wanted.exclude_seen)
    entry = Entry(
        source_name=source.path.name,
        sha256=arrival.sha256,
        landed_sha256=storage.file_sha256(built) if source.is_text else arrival.sha256,
        num_bytes=arrival.before.st_size,
        num_rows=found.num_rows,
        ingest_date=wanted.ingest_date or (before.ingest_date if before else _today()),
        # One past the last, not the number of entries: a damaged one may have been deleted from the middle.
        sequence=before.sequence if before else max((entry.sequence for entry in entries), default=-1) + 1,
        landed_at_ms=now_ms,
        format=source.format,
        columns=mapping,
        types={name: kind for name, kind in source.columns.items() if name in used or not source.is_text},
        ratings=found.ratings,
        time_unit=found.time_unit,
        actions=sorted(found.actions),
        guesses=_guesses(job, mapping, found, declaration, beside),
    )
    landed = replace(landed_file(job.folder, entry, declaration, reused=False), path=built)
    return landed, catalogue.read_titles(beside) if beside else {}


def profiled(
    connection: duckdb.DuckDBPyConnection,
    staged: Log,
    built: Path,
    declared: Declaration | None,
    *,
    is_new: bool,
    wanted_unit: str,
    now_ms: int,
) -> Profile:
    """Return the profile of a staged log. Raises UserError as `profile` does, or if the log turns out unreadable."""
    unit = declared.time_unit if declared and declared.strict and wanted_unit == "auto" else wanted_unit
    try:
        return profile(connection, staged, declared, is_new=is_new, time_unit=unit, now_ms=now_ms)
    except (duckdb.OutOfMemoryException, duckdb.ParserException, duckdb.BinderException):
        raise
    except duckdb.Error as error:
        if machine_fault(error):  # spilling failed, not reading
            raise
        raise unreadable(staged.path, error, copy=built) from None


def _guesses(
    job: Job, mapping: dict[str, str], found: Profile, declaration: Declaration, beside: Path | None
) -> dict[str, str]:
    """Return what was decided for the user, in words the command line shows."""
    guesses = {"dataset": declaration.name, "format": job.source.format}
    guesses |= {name: column for name, column in mapping.items() if job.wanted.columns.get(name) is None}
    if found.ratings:
        guesses["action"] = f"rate_<{mapping['value']}>"
    guesses |= {"time_unit": found.time_unit, "actions": ", ".join(declaration.actions)}
    tasks = [f"{task} = {' or '.join(names)}" for task, names in declaration.tasks.items()]
    guesses |= {"tasks": "; ".join(tasks) or "none", "exclude_seen": declaration.exclude_seen}
    return guesses | ({"catalogue": beside.name} if beside else {})


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())

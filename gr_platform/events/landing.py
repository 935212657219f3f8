"""Importing a log: its rows are copied untouched into the landing folder and written into the ledger.

Invariant: nothing is dropped here, so every later verdict can name a source row; a refused import leaves the landing
folder as it was.
"""
# ruff: noqa: S608 - identifiers and strings are quoted by `quoted` and `literal`

import datetime
import json
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from gr_platform import storage
from gr_platform.errors import UserError, machine_fault
from gr_platform.events import catalogue
from gr_platform.events.columns import landed_columns, row_column
from gr_platform.events.database import connect, literal, quoted
from gr_platform.events.declaration import Declaration, check_name
from gr_platform.events.defaults import declare
from gr_platform.events.guessing import NO_COLUMN, default_name, map_columns
from gr_platform.events.ledger import (
    Entry,
    LandedFile,
    active_dataset,
    landed_file,
    landed_files,
    ledger_entries,
    load_declaration,
    publish,
    titles,
)
from gr_platform.events.profile import MIN_USERS, Profile, profile
from gr_platform.events.readers import Source, open_source, unreadable
from gr_platform.events.simulator import METADATA_KEY

__all__ = ["LandedFile", "active_dataset", "import_file", "landed_files", "load_declaration", "titles"]

log = logging.getLogger(__name__)
# Imports are short: one that finds another at work waits for it.
IMPORT_WAIT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What the user named: canonical name -> column (None = guess), and the rest of the import's options."""

    columns: dict[str, str | None]
    time_unit: str
    ingest_date: str | None
    exclude_seen: str | None

    def agrees_with(self, entry: Entry, declaration: Declaration) -> bool:
        """Return whether everything named is what the ledger already has."""
        columns = all(
            wanted is None or entry.columns.get(name, NO_COLUMN) == wanted for name, wanted in self.columns.items()
        )
        return (
            columns
            and self.time_unit in ("auto", entry.time_unit)
            and self.ingest_date in (None, entry.ingest_date)
            and self.exclude_seen in (None, declaration.exclude_seen)
        )


def import_file(
    source: Path | str,
    *,
    home: Path,
    dataset: str | None = None,
    format: str = "auto",
    user_column: str | None = None,
    item_column: str | None = None,
    action_column: str | None = None,
    time_column: str | None = None,
    value_column: str | None = None,
    event_id_column: str | None = None,
    time_unit: str = "auto",
    ingest_date: str | None = None,
    exclude_seen: str | None = None,
) -> LandedFile:
    """Return the landed copy of a log, made the active data set; what is not named is guessed.

    Naming one column as action and value makes ratings actions: `rate_<value>`. ingest_date: YYYY-MM-DD, default today
    (UTC). event_id_column "none": there is none. A file imported again with another meaning replaces its landed copy.
    Raises UserError for anything the user can mend; the landing folder is unchanged then.
    """
    columns = {
        "user_id": user_column,
        "item_id": item_column,
        "action": action_column,
        "value": value_column,
        "event_ts": time_column,
        "event_id": event_id_column,
    }
    request = _Request(
        columns=columns, time_unit=time_unit, ingest_date=_checked_date(ingest_date), exclude_seen=exclude_seen
    )
    with storage.exclusive(home, "landing", wait_s=IMPORT_WAIT_S), connect(home) as connection:
        opened = open_source(connection, Path(source), format)
        hints = _hints(opened)
        name = check_name(dataset or hints.get("name") or default_name(opened.path, opened.format))
        folder, sha256 = home / "landing" / name, storage.file_sha256(opened.path)
        same = next((entry for entry in ledger_entries(folder) if entry.sha256 == sha256), None)
        if same and _intact(folder, same) and request.agrees_with(same, load_declaration(home, name)):
            storage.write_text(home / "landing" / "active", name + "\n")
            return landed_file(folder, same, load_declaration(home, name), reused=True)
        return _land(connection, home, name, opened, sha256, request, hints)


def _land(
    connection: duckdb.DuckDBPyConnection,
    home: Path,
    name: str,
    source: Source,
    sha256: str,
    request: _Request,
    hints: dict[str, Any],
) -> LandedFile:
    folder, now_ms = home / "landing" / name, int(time.time() * 1000)
    entries = ledger_entries(folder)
    before = next((entry for entry in entries if entry.sha256 == sha256), None)
    # A data set whose only file is being replaced starts afresh: its declaration came from that file.
    declared = load_declaration(home, name) if any(entry.sha256 != sha256 for entry in entries) else None
    mapping = map_columns(source.path, list(source.columns), request.columns, declared.columns if declared else None)
    beside = catalogue.find_catalogue(source.path, source.format)
    texts = catalogue.read_titles(beside) if beside else {}
    with tempfile.TemporaryDirectory(dir=home, prefix=".landing-") as staging:
        built, found = _build(connection, source, mapping, declared, Path(staging), request.time_unit, now_ms)
        declaration = declare(name, source, mapping, found, declared, hints, request.exclude_seen)
        today = before.ingest_date if before else time.strftime("%Y-%m-%d", time.gmtime())
        entry = Entry(
            source_name=source.path.name,
            sha256=sha256,
            landed_sha256=storage.file_sha256(built),
            num_rows=found.num_rows,
            ingest_date=request.ingest_date or today,
            # One past the last, not the number of entries: a damaged one may have been deleted from the middle.
            sequence=before.sequence if before else max((entry.sequence for entry in entries), default=-1) + 1,
            landed_at_ms=now_ms,
            format=source.format,
            columns=mapping,
            time_unit=found.time_unit,
            actions=sorted(found.actions),
            guesses=_guesses(source, mapping, request, found, declaration, beside),
        )
        publish(home, folder, built, entry, declaration, texts)
    log.info("landed dataset=%s file=%s rows=%d", name, source.path.name, entry.num_rows)
    return landed_file(folder, entry, declaration, reused=False)


def _guesses(
    source: Source,
    mapping: dict[str, str],
    request: _Request,
    found: Profile,
    declaration: Declaration,
    beside: Path | None,
) -> dict[str, str]:
    """Return what was decided for the user, in words the command line shows."""
    guesses = {"dataset": declaration.name, "format": source.format}
    guesses |= {name: column for name, column in mapping.items() if request.columns.get(name) is None}
    if found.ratings:
        guesses["action"] = f"rate_<{mapping['value']}>"
    guesses |= {"time_unit": found.time_unit, "actions": ", ".join(declaration.actions)}
    tasks = [f"{task} = {' or '.join(names)}" for task, names in declaration.tasks.items()]
    guesses |= {"tasks": "; ".join(tasks) or "none", "exclude_seen": declaration.exclude_seen}
    return guesses | ({"catalogue": beside.name} if beside else {})


def _build(
    connection: duckdb.DuckDBPyConnection,
    source: Source,
    mapping: dict[str, str],
    declared: Declaration | None,
    staging: Path,
    time_unit: str,
    now_ms: int,
) -> tuple[Path, Profile]:
    """Write the landed Parquet into `staging`; return it and the log's profile."""
    wanted = ", ".join(quoted(column) for column in dict.fromkeys(mapping.values()))
    rows = f"SELECT {wanted}, row_number() OVER () AS {quoted(row_column(source))} FROM {source.relation}"
    relation = f"({rows})"
    try:
        if source.is_text:  # parsed once: the profile and the copy read the parsed text
            connection.execute(f"COPY ({rows}) TO {literal(str(staging / 'text.parquet'))} (FORMAT parquet)")
            relation = f"read_parquet({literal(str(staging / 'text.parquet'))})"
        found = profile(
            connection,
            source.path,
            relation,
            source.columns,
            mapping,
            time_unit=time_unit,
            now_ms=now_ms,
            min_users=0 if declared else MIN_USERS,
        )
        selected = ", ".join(
            f"{value} AS {name}" for name, value in landed_columns(source, mapping, declared, found).items()
        )
        built = staging / "landed.parquet"
        connection.execute(
            f"COPY (SELECT {selected} FROM {relation}) TO {literal(str(built))} (FORMAT parquet, COMPRESSION zstd)"
        )
    except (duckdb.OutOfMemoryException, duckdb.ParserException, duckdb.BinderException):
        raise
    except duckdb.Error as error:
        if machine_fault(error):  # writing failed, not reading
            raise
        raise unreadable(source.path, error) from None
    return built, found


def _intact(folder: Path, entry: Entry) -> bool:
    path = folder / f"{entry.sha256[:16]}.parquet"
    return path.is_file() and storage.file_sha256(path) == entry.landed_sha256


def _hints(source: Source) -> dict[str, Any]:
    """Return what the file says about its own declaration (the simulator writes name, actions, exclude_seen)."""
    if source.path.suffix != ".parquet":
        return {}
    try:
        metadata = pq.read_schema(source.path).metadata or {}
    except (OSError, pa.ArrowInvalid) as error:
        raise unreadable(source.path, error) from None
    text = metadata.get(METADATA_KEY, b"{}")
    try:
        hints = json.loads(text)
        valid = isinstance(hints, dict) and all(isinstance(name, str) for name in hints.get("actions", []))
    except (ValueError, TypeError):
        valid = False
    if not valid:
        raise UserError(
            f"the metadata {METADATA_KEY.decode()} of {source.path.name} is no declaration; write the file without it"
        )
    return hints


def _checked_date(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise UserError(f"ingest date {text!r} is not a date; write YYYY-MM-DD") from None

"""What a user asks of an import, together with the log it is about.

Invariant: what is named wins over what is declared, and that over what a file says of itself.
"""

import datetime
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from gr_platform.errors import UserError
from gr_platform.events import shipped
from gr_platform.events.declaration import Declaration, check_name
from gr_platform.events.guessing import NO_COLUMN, default_name
from gr_platform.events.ledger import Entry, ledger_entries, load_declaration
from gr_platform.events.readers import Source, open_source, unreadable
from gr_platform.events.simulator import METADATA_KEY


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the user named of an import; the rest is declared or guessed.

    declaration: the name of one that comes along, or the path of a TOML file. ingest_date: YYYY-MM-DD, default today
    (UTC). event_id_column "none": there is none. One column named as action and value makes ratings actions.
    """

    dataset: str | None = None
    declaration: str | None = None
    format: str = "auto"
    user_column: str | None = None
    item_column: str | None = None
    action_column: str | None = None
    time_column: str | None = None
    value_column: str | None = None
    event_id_column: str | None = None
    time_unit: str = "auto"
    ingest_date: str | None = None
    exclude_seen: str | None = None

    @property
    def columns(self) -> dict[str, str | None]:
        """Canonical name -> column, None where nothing was named."""
        return {
            "user_id": self.user_column,
            "item_id": self.item_column,
            "action": self.action_column,
            "value": self.value_column,
            "event_ts": self.time_column,
            "event_id": self.event_id_column,
        }

    def agrees_with(self, entry: Entry, stored: Declaration, given: Declaration | None) -> bool:
        """Return whether everything named is what the ledger already has."""
        columns = all(
            wanted is None or entry.columns.get(name, NO_COLUMN) == wanted for name, wanted in self.columns.items()
        )
        return (
            columns
            and self.time_unit in ("auto", entry.time_unit)
            and self.ingest_date in (None, entry.ingest_date)
            and self.exclude_seen in (None, stored.exclude_seen)
            and (given is None or replace(given, exclude_seen=self.exclude_seen or given.exclude_seen) == stored)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An opened log on its way into a data set. given: the declaration that the user named; hints: the file's own."""

    home: Path
    source: Source
    name: str
    wanted: Wanted
    given: Declaration | None
    hints: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The landing folder of the data set."""
        return self.home / "landing" / self.name


def open_job(connection: duckdb.DuckDBPyConnection, home: Path, path: Path, wanted: Wanted) -> Job:
    """Return the job of one import. Raises UserError for what cannot be opened or named."""
    wanted = replace(wanted, ingest_date=_iso_date(wanted.ingest_date))
    given = shipped.read(wanted.declaration) if wanted.declaration else None
    stored = load_declaration(home, wanted.dataset) if wanted.dataset and _exists(home, wanted.dataset) else None
    declared = given or stored
    source = open_source(connection, path, wanted.format, declared.header if declared else ())
    hints = own_hints(source)
    name = wanted.dataset or (given.name if given else hints.get("name")) or default_name(path, source.format)
    given = replace(given, name=check_name(name)) if given else None
    return Job(home=home, source=source, name=check_name(name), wanted=wanted, given=given, hints=hints)


def _exists(home: Path, dataset: str) -> bool:
    return bool(ledger_entries(home / "landing" / check_name(dataset)))


def own_hints(source: Source) -> dict[str, Any]:
    """Return what the file says about its own declaration (the simulator writes name, actions, exclude_seen)."""
    if source.is_text:
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


def _iso_date(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise UserError(f"ingest date {text!r} is not a date; write YYYY-MM-DD") from None

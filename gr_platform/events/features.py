"""Side information lands: what is known of an item or a user from some time on, as the log that it came as.

Invariant: as with events nothing is dropped on landing, a file counts once, and an entry
(`features/<kind>-<first 16 digits of the sha256>.json`) is written after the copy that it describes. Rows are judged by
the rules of events as far as they bear on an id and a time; "future" is counted from the moment of landing. Rows of a
file without times hold at all times, as if each had been said at `ALWAYS_MS`, and the last row of an id counts.
"""
# ruff: noqa: S608 - identifiers and strings are quoted by `quoted` and `literal`

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events.columns import (
    INTEGER_TYPES,
    ROW_NUMBER,
    id_sql,
    parquet,
    time_type,
)
from gr_platform.events.database import quoted
from gr_platform.events.declaration import Declaration, IdType
from gr_platform.events.ledger import load_declaration
from gr_platform.events.quality import RULES
from gr_platform.events.times import to_ms

# Kind of side information -> what its rows are about.
KINDS = {"item-features": "item_id", "user-features": "user_id"}
FOLDER = "features"
FEATURES_VERSION = 1
# Since when a property holds that always did: the first day of year 1, earlier than any time that is accepted and so
# far from all of them that an event of any year is about as long after it. A difference of times stays far from 2**63.
ALWAYS_MS = -62_135_596_800_000
_RULES = ("null_", "invalid_")
# The next row of an id in its file, NULL behind the last one.
LATER_ROW = "lead(source_row) OVER (PARTITION BY id ORDER BY source_row)"
_TIME_RULES = ("null_time", "invalid_time", "time_before_1990", "time_in_future")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureEntry:
    """A line of the ledger of side information. sequence counts the files of a kind in the order they first landed.

    time_column, time_unit: None for a file without times. properties: name -> column; types: every column read ->
    DuckDB type; quarantined: rule -> rows that broke it; num_repeated: rows of a file without times that another one of
    their id follows.
    """

    kind: str
    source_name: str
    sha256: str
    landed_sha256: str
    num_rows: int
    sequence: int
    landed_at_ms: int
    format: str
    id_column: str
    time_column: str | None
    time_unit: str | None
    properties: dict[str, str]
    types: dict[str, str]
    quarantined: dict[str, int]
    num_repeated: int = 0
    num_forgotten: int = 0
    schema_version: int = FEATURES_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureFile:
    """A landed file of side information. path: its Parquet, with the file's own columns; reused: it was there."""

    dataset: str
    path: Path
    entry: FeatureEntry
    declaration: Declaration
    reused: bool

    @property
    def id_type(self) -> IdType:
        """The type of the ids that its rows are about, as the events have them."""
        return id_type_of(self.declaration, self.entry.kind)


def id_type_of(declaration: Declaration, kind: str) -> IdType:
    """Return the type of the ids that side information of a kind is about."""
    return declaration.item_id_type if kind == "item-features" else declaration.user_id_type


def feature_files(home: Path, ds: str, kind: str, *, without: str = "") -> list[FeatureFile]:
    """Return the landed side information of a kind in the order it came in, [] if there is none.

    without: sha256 of a file to leave out. Raises UserError if an entry or a landed copy is damaged.
    """
    declaration = load_declaration(home, ds)
    folder = home / "landing" / ds / FOLDER
    files = []
    for entry in entries_of(folder, kind):
        if entry.sha256 == without:
            continue
        if not is_intact(folder, entry):
            raise UserError(f"the landed copy of {entry.source_name} is missing or damaged; import the file again")
        path = folder / landed_name(entry, "parquet")
        files.append(FeatureFile(dataset=ds, path=path, entry=entry, declaration=declaration, reused=True))
    return files


def feature_query(file: FeatureFile) -> str:
    """Return a SELECT over a landed file, one row a row of it.

    Columns: id (the data set's type), event_ts (BIGINT ms, ALWAYS_MS in a file without times), source_file, source_row,
    each property (VARCHAR, NULL for an empty cell) under its name after `p_`, rule (the first that the row breaks, or
    NULL).
    """
    entry = file.entry
    what, column = KINDS[entry.kind], quoted(entry.id_column)
    found, timed = _time_sql(file)
    raw = "NULL::VARCHAR" if entry.types[entry.id_column] in INTEGER_TYPES else f"{column}::VARCHAR"
    properties = "".join(
        f", nullif({quoted(column)}::VARCHAR, '') AS {quoted(f'p_{name}')}" for name, column in entry.properties.items()
    )
    inner = (
        f"SELECT {id_sql(column, entry.types[entry.id_column], file.id_type)} AS {what}, "
        f"{raw} AS raw_{what.removesuffix('_id')}, {found} AS found_time, {ROW_NUMBER} + 1 AS source_row, "
        f"{entry.landed_at_ms}::BIGINT AS landed_at_ms{properties} FROM {parquet(file.path)}"
    )
    rules = _rules(entry.kind) if entry.time_column is not None else _rules(entry.kind, times=())
    cases = " ".join(f"WHEN {RULES[rule][0]} THEN '{rule}'" for rule in rules)
    names = "".join(f", {quoted(f'p_{name}')}" for name in entry.properties)
    return (
        f"SELECT {what} AS id, event_ts, {entry.sequence}::INTEGER AS source_file, source_row{names}, "
        f"CASE {cases} END AS rule FROM (SELECT *, {timed} AS event_ts FROM ({inner}))"
    )


def _time_sql(file: FeatureFile) -> tuple[str, str]:
    """Return SQL for the time cell of a row, and for the ms that `found_time`, such a cell, stands for."""
    entry = file.entry
    if entry.time_column is None or entry.time_unit is None:
        return "NULL", f"{ALWAYS_MS}::BIGINT"
    read_as = time_type(entry.types[entry.time_column])
    cell = f"TRY_CAST({quoted(entry.time_column)} AS {read_as})"
    return cell, to_ms("found_time", read_as, entry.time_unit, file.declaration.time_zone)


def all_rows(files: list[FeatureFile]) -> tuple[str, list[str]]:
    """Return a SELECT over the rows of files that break no rule, and the properties of any of them in a fixed order.

    Columns: id, event_ts, source_file, source_row, p_<property> of all of them, NULL in files without it. Of a file
    without times an id has one row, its last.
    """
    names = list(dict.fromkeys(name for file in files for name in file.entry.properties))
    parts = []
    for file in files:
        columns = ", ".join(
            quoted(f"p_{name}") if name in file.entry.properties else f"NULL::VARCHAR AS {quoted(f'p_{name}')}"
            for name in names
        )
        selected = f"SELECT id, event_ts, source_file, source_row, {columns}"
        last = "" if file.entry.time_column is not None else f" QUALIFY {LATER_ROW} IS NULL"
        parts.append(f"({selected} FROM ({feature_query(file)}) WHERE rule IS NULL{last})")
    return " UNION ALL ".join(parts), names


def standing(files: list[FeatureFile]) -> set[str]:
    """Return the properties that a file without times has."""
    return {name for file in files if file.entry.time_column is None for name in file.entry.properties}


def _rules(kind: str, times: tuple[str, ...] = _TIME_RULES) -> list[str]:
    what = KINDS[kind].removesuffix("_id")
    return [*(f"{rule}{what}" for rule in _RULES), *times]


def describe(kind: str, broken: dict[str, int]) -> str:
    """Return rule -> rows as text for people, in the order in which the rules are asked."""
    return ", ".join(f"{rule} {broken[rule]:,} ({RULES[rule][1]})" for rule in _rules(kind) if rule in broken)


def landed_name(entry: FeatureEntry, suffix: str) -> str:
    """Return the name of the file of an entry: its copy (parquet) or itself (json)."""
    return f"{entry.kind}-{entry.sha256[:16]}.{suffix}"


def is_intact(folder: Path, entry: FeatureEntry) -> bool:
    """Return whether the landed copy is there, byte for byte."""
    path = folder / landed_name(entry, "parquet")
    return path.is_file() and storage.file_sha256(path) == entry.landed_sha256


def publish(folder: Path, built: Path, entry: FeatureEntry) -> None:
    """Move a copy into place; its ledger entry comes after it."""
    folder.mkdir(parents=True, exist_ok=True)
    built.replace(folder / landed_name(entry, "parquet"))
    text = json.dumps(asdict(entry), indent=1, sort_keys=True) + "\n"
    storage.write_text(folder / landed_name(entry, "json"), text)


def entries_of(folder: Path, kind: str) -> list[FeatureEntry]:
    """Return the entries of a kind in order. Raises UserError if one is damaged."""
    found = []
    for path in folder.glob(f"{kind}-*.json"):
        try:
            entry = FeatureEntry(**storage.read_object(path))
            if entry.schema_version != FEATURES_VERSION:
                raise ValueError
        except (ValueError, TypeError):
            raise UserError(
                f"{FOLDER}/{path.name} of data set {folder.parent.name} is damaged; delete it and import its file again"
            ) from None
        found.append(entry)
    return sorted(found, key=lambda entry: entry.sequence)

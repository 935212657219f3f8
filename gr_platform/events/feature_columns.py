"""What the columns of side information are: whose rows they are, since when they hold, and the properties.

Invariant: what may be a time is never taken for a property that always held unless the user says so: rows of later
would then be known to all that came before.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from gr_platform.errors import UserError
from gr_platform.events.declaration import Declaration
from gr_platform.events.features import KINDS
from gr_platform.events.movielens import ID_COLUMNS
from gr_platform.events.readers import Source

MAX_PROPERTIES = 64
# What the user writes for a time column that there is not.
NO_TIMES = "none"
_PROPERTY = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_TIMES = ("event_ts", "timestamp", "time")
# Names, without case and signs, of columns that may well be times; whether they are, only the user knows.
_LIKE_TIMES = re.compile(
    "ts|date|day|datetime|eventtime|eventdate|timestampms|unixtime|createdat|updatedat|changedat|validfrom|fromdate|"
    "startdate|since|asof"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedFeatures:
    """What the user named of an import of side information; what is None is declared or of a common name.

    time_column "none": the file has no times, its properties always held.
    """

    kind: str
    dataset: str
    format: str = "auto"
    id_column: str | None = None
    time_column: str | None = None
    time_unit: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureColumns:
    """time: None where the properties always held; properties: name -> column."""

    id: str
    time: str | None
    properties: dict[str, str]

    @property
    def used(self) -> list[str]:
        """All columns that are read."""
        return [self.id, *([] if self.time is None else [self.time]), *self.properties.values()]


def columns_of(source: Source, wanted: WantedFeatures, declaration: Declaration) -> FeatureColumns:
    """Return what the columns are, as they were named, declared or are commonly called.

    Raises UserError for a column that is not there, one that may be a time, and what cannot be an id or a property.
    """
    what = KINDS[wanted.kind]
    names = (*declaration.alternatives(what), what, *(ID_COLUMNS if source.format == "movielens" else ()))
    id_column = _column(source, wanted.id_column, names, what, f"--{what.removesuffix('_id')}-column")
    if _is_nested(source.columns[id_column]):
        raise UserError(
            f"column {id_column!r} of {source.path.name} is a {source.columns[id_column].split('(')[0]}, it cannot be "
            "an id; name another"
        )
    time_column = _time_column(source, wanted, declaration, id_column)
    taken = {id_column, time_column}
    return FeatureColumns(id=id_column, time=time_column, properties=_properties(source, taken))


def _column(source: Source, named: str | None, names: Iterable[str], what: str, flag: str) -> str:
    """Return the column that was named, else the first one of these names, whatever their case."""
    found = _find(source, [named] if named is not None else names)
    if found is None:
        said = f"no column {named!r}" if named is not None else f"no column that is called like {what}"
        raise UserError(
            f"{source.path.name} has {said}; it has {', '.join(list(source.columns)[:20])}: name one with {flag}"
        )
    return found


def _find(source: Source, names: Iterable[str]) -> str | None:
    folded = {column.lower(): column for column in source.columns}
    for name in names:
        if name in source.columns or name.lower() in folded:
            return name if name in source.columns else folded[name.lower()]
    return None


def _time_column(source: Source, wanted: WantedFeatures, declaration: Declaration, id_column: str) -> str | None:
    """Return the column of the times, None where there is none and nothing looks like one."""
    if wanted.time_column == NO_TIMES and NO_TIMES not in source.columns:
        return None
    names = (*declaration.alternatives("event_ts"), *_TIMES)
    # A unit was named, so there must be times.
    if wanted.time_column is not None or wanted.time_unit != "auto" or _find(source, names) is not None:
        return _column(source, wanted.time_column, names, "a time", "--time-column")
    like = (name for name, kind in source.columns.items() if name != id_column and _is_like_a_time(name, kind))
    if (found := next(like, None)) is not None:
        raise UserError(
            f"column {found!r} of {source.path.name} may be the time from which a row holds: name it with "
            f"--time-column {found}, or write --time-column {NO_TIMES} if what the file says held before any event"
        )
    return None


def _is_like_a_time(name: str, kind: str) -> bool:
    simple = re.sub(r"[^a-z0-9]", "", name.lower())
    return _LIKE_TIMES.fullmatch(simple) is not None or kind == "DATE" or kind.startswith("TIMESTAMP")


def _properties(source: Source, taken: set[str | None]) -> dict[str, str]:
    """Return name -> column of all other columns; a name is the column's in lower case."""
    columns = [column for column in source.columns if column not in taken]
    if not 1 <= len(columns) <= MAX_PROPERTIES:
        raise UserError(
            f"{source.path.name} has {len(columns)} columns beside id and time, must be 1 to {MAX_PROPERTIES}: "
            "side information is an id, properties and, where they change, a time"
        )
    for column in columns:
        kind = source.columns[column]
        if not _PROPERTY.fullmatch(column.lower()):
            raise UserError(
                f"column {column!r} of {source.path.name} cannot be the name of a property; use letters, digits, '_'"
            )
        if _is_nested(kind):
            raise UserError(
                f"column {column!r} of {source.path.name} is a {kind.split('(')[0]}, not one value a row; leave it out"
            )
    return {column.lower(): column for column in columns}


def _is_nested(kind: str) -> bool:
    return kind.endswith("[]") or kind == "BLOB" or kind.startswith(("STRUCT", "MAP"))

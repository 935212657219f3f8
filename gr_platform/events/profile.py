"""What a log holds, read before it is landed: id types, time unit, actions.

Invariant: a profile is a function of the file and the user's words alone, and takes the same memory for any number of
rows: counts are approximate where a guard needs no more.
"""
# ruff: noqa: S608 - identifiers and strings are quoted by `quoted` and `literal`

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from gr_platform.errors import UserError
from gr_platform.events.columns import (
    FLOAT_TYPES,
    INTEGER_TYPES,
    WIDE_TYPES,
    action_sql,
    event_id_sql,
    missing_sql,
    whole_sql,
)
from gr_platform.events.database import quoted
from gr_platform.events.declaration import MAX_ACTIONS, Declaration, IdType
from gr_platform.events.times import NUMERIC_UNITS, TimeFigures, carries_zone, choose_unit, plausible_sql

MIN_USERS = 10
_MAX_RATINGS = 11
# A log that was written twice over has one id for every two rows.
MIN_UNIQUE_IDS = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Figures of one log. actions: name -> rows, most frequent first. ratings: actions are made from the value."""

    num_rows: int
    user_id_type: IdType
    item_id_type: IdType
    time_unit: str
    actions: dict[str, int]
    ratings: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """A log to be profiled: a FROM clause, its columns' types, canonical name -> column, context columns it has."""

    path: Path
    relation: str
    types: dict[str, str]
    mapping: dict[str, str]
    context: Sequence[str] = ()

    def type_of(self, canonical: str) -> str:
        """Return the DuckDB type of the column taken for a canonical one."""
        return self.types[self.mapping[canonical]]


def profile(
    connection: duckdb.DuckDBPyConnection,
    log: Log,
    declared: Declaration | None,
    *,
    is_new: bool,
    time_unit: str,
    now_ms: int,
) -> Profile:
    """Return the profile of a log; ids that do not fit what is declared are left to quarantine where most do.

    is_new: it is the first file of its data set.

    Raises UserError: no rows, too few users for a new data set, unreadable times, ids of another type than declared, an
    event id that identifies nothing.
    """
    for canonical in ("user_id", "item_id", "event_ts", "value"):
        if canonical in log.mapping:
            _check_scalar(log, canonical)
    found = _scan(connection, log, now_ms)
    if found["rows"] == 0:
        raise UserError(f"{log.path.name} holds no events (only a header or an empty table); give a log with events")
    if is_new:
        _check_users(connection, log)
    _check_event_ids(log, found)
    ratings = _is_rating(connection, log, declared)
    if "action" in log.mapping and not ratings and found["actions"] > 10 * MAX_ACTIONS:
        raise _too_many_actions(log)
    times = TimeFigures(
        **{name: found[name] for name in ("present", "numbers", "dates", "low", "high")},
        fitting={unit: found[f"fit_{unit}"] for unit in (*NUMERIC_UNITS, "iso")},
    )
    return Profile(
        num_rows=found["rows"],
        user_id_type=_id_type(log, "user_id", found, declared, is_new),
        item_id_type=_id_type(log, "item_id", found, declared, is_new),
        time_unit=choose_unit(log.path, log.mapping["event_ts"], times, time_unit),
        actions=_actions(
            connection, log, action_sql(log.mapping, ratings, declared.rename_actions if declared else {})
        ),
        ratings=ratings,
    )


def _scan(connection: duckdb.DuckDBPyConnection, log: Log, now_ms: int) -> dict[str, Any]:
    """Return every figure that one pass over the log gives."""
    number, date = _time_cells(quoted(log.mapping["event_ts"]), log.type_of("event_ts"))
    cells = {"cell": quoted(log.mapping["event_ts"]), "number": number, "date_ms": date}
    cells |= {"event": event_id_sql(log.mapping)}
    cells |= {"action": f"{quoted(log.mapping['action'])}::VARCHAR" if "action" in log.mapping else "NULL::VARCHAR"}
    figures = {
        "rows": "count(*)",
        "ids": "count(event)",
        "unique_ids": "approx_count_distinct(event)",
        "actions": "approx_count_distinct(action)",
        "present": "count(cell)",
        "numbers": "count(number)",
        "dates": "count(date_ms)",
        "low": "min(number)::DOUBLE",
        "high": "max(number)::DOUBLE",
    }
    figures |= {f"fit_{unit}": f"count(*) FILTER ({plausible_sql('number', unit, now_ms)})" for unit in NUMERIC_UNITS}
    figures["fit_iso"] = f"count(*) FILTER ({plausible_sql('date_ms', 'iso', now_ms)})"
    for canonical in ("user_id", "item_id"):
        cells[canonical], kind = quoted(log.mapping[canonical]), log.type_of(canonical)
        missing = f"NOT isfinite({canonical})" if kind in FLOAT_TYPES else missing_sql(f"{canonical}::VARCHAR")
        present = "true" if kind in INTEGER_TYPES else f"NOT ({missing})"
        whole = "true" if kind in INTEGER_TYPES else whole_sql(canonical, kind)
        figures[f"{canonical}_present"] = f"count({canonical}) FILTER ({present})"
        figures[f"{canonical}_whole"] = f"count({canonical}) FILTER ({whole})"
    # A page that cannot be decoded has to show when the log comes in, not when the copy is used.
    for place, column in enumerate([*log.context, *(log.mapping[name] for name in ("value",) if name in log.mapping)]):
        cells[f"other_{place}"], figures[f"read_{place}"] = quoted(column), f"count(other_{place})"
    selected, inner = (", ".join(f"{sql} AS {name}" for name, sql in each.items()) for each in (figures, cells))
    rows = connection.sql(f"SELECT {selected} FROM (SELECT {inner} FROM {log.relation} AS source)").fetchall()
    return dict(zip(figures, rows[0], strict=True))


def _time_cells(name: str, kind: str) -> tuple[str, str]:
    """Return SQL for a time's number and for its date in ms; one of them is NULL."""
    if kind in (*INTEGER_TYPES, *WIDE_TYPES):
        return name, "NULL::BIGINT"
    if kind.startswith("TIMESTAMP") or kind == "DATE":
        # By way of the zoned type: with nanoseconds and a zone there is no cast to TIMESTAMP itself.
        return "NULL::DOUBLE", f"epoch_ms({name}::{'TIMESTAMPTZ' if carries_zone(kind) else 'TIMESTAMP'})"
    number = f"TRY_CAST({name}::VARCHAR AS DOUBLE)"
    date = f"CASE WHEN {number} IS NULL THEN epoch_ms(TRY_CAST({name}::VARCHAR AS TIMESTAMPTZ)) END"
    return f"CASE WHEN isfinite({number}) THEN {number} END", date


def _check_scalar(log: Log, canonical: str) -> None:
    kind = log.type_of(canonical)
    nested = "(" in kind and not kind.startswith(("ENUM", "DECIMAL"))
    if nested or kind.endswith("[]") or kind == "BLOB":
        role = "an id" if canonical.endswith("_id") else {"event_ts": "a time", "value": "a value"}[canonical]
        raise UserError(
            f"column {log.mapping[canonical]!r} of {log.path.name} is a {kind.split('(')[0]}, it cannot be {role}; "
            "name another"
        )


def _check_users(connection: duckdb.DuckDBPyConnection, log: Log) -> None:
    column = log.mapping["user_id"]
    present = "" if log.type_of("user_id") in INTEGER_TYPES else f"AND {quoted(column)}::VARCHAR <> ''"
    different = (
        f"SELECT DISTINCT {quoted(column)} AS u FROM {log.relation} WHERE {quoted(column)} IS NOT NULL {present} "
        f"LIMIT {MIN_USERS}"
    )
    found = connection.sql(f"SELECT count(*) FROM ({different})").fetchall()[0][0]
    if found < MIN_USERS:
        raise UserError(
            f"{log.path.name} has {found} user(s) in column {column!r}, at least {MIN_USERS} are needed; give a larger "
            "log or name another --user-column"
        )


def _check_event_ids(log: Log, found: dict[str, Any]) -> None:
    """Refuse an event id that most rows share with others: rows with equal ids count once, so most would be lost."""
    if found["unique_ids"] < MIN_UNIQUE_IDS * found["ids"]:
        raise UserError(
            f"column {log.mapping['event_id']!r} of {log.path.name} has {found['unique_ids']} different values in "
            f"{found['ids']} rows, so it does not identify events; name another --event-id-column, or none"
        )


def _id_type(log: Log, canonical: str, found: dict[str, Any], declared: Declaration | None, is_new: bool) -> IdType:
    """Return int64 if every id is an integer written the canonical way, else string: '007' must not become 7."""
    kind, column = log.type_of(canonical), log.mapping[canonical]
    present, whole = found[f"{canonical}_present"], found[f"{canonical}_whole"]
    agreed: IdType | None = getattr(declared, f"{canonical}_type") if declared else None
    number = kind in (*INTEGER_TYPES, *WIDE_TYPES, *FLOAT_TYPES) or kind.startswith("DECIMAL")
    # Text that happens to be all digits is still text where the data set's ids are; a number may have lost its zeros.
    if agreed == "string" and (not number or (is_new and kind in INTEGER_TYPES)):
        return agreed
    if agreed == "int64" and (kind in INTEGER_TYPES or 2 * whole >= present):
        return agreed
    if kind in FLOAT_TYPES and whole < present:
        raise UserError(f"column {column!r} of {log.path.name} holds fractions, not ids; store ids as integers or text")
    own: IdType = "int64" if kind in (*INTEGER_TYPES, *FLOAT_TYPES) or 0 < present == whole else "string"
    if agreed is None:
        return own
    raise UserError(
        f"column {column!r} of {log.path.name} holds {own} ids, but {canonical} of this data set is {agreed}; import "
        "it as another --dataset"
    )


def _is_rating(connection: duckdb.DuckDBPyConnection, log: Log, declared: Declaration | None) -> bool:
    """Return whether values become actions: one column is named for both, or there is a rating scale and no action."""
    mapping = log.mapping
    if "value" not in mapping:
        return False
    if "action" in mapping or (declared and declared.strict):
        return mapping.get("action") == mapping["value"]
    number = f"TRY_CAST({quoted(mapping['value'])} AS DOUBLE)"
    found = connection.sql(
        f"SELECT DISTINCT {number} FROM {log.relation} WHERE isfinite({number}) LIMIT {_MAX_RATINGS + 1}"
    ).fetchall()
    scale = [row[0] for row in found]
    return 2 <= len(scale) <= _MAX_RATINGS and all(0 <= step <= 10 and step * 2 == int(step * 2) for step in scale)


def _actions(connection: duckdb.DuckDBPyConnection, log: Log, action: str) -> dict[str, int]:
    rows = connection.sql(
        f"SELECT {action} AS a, count(*) FROM {log.relation} GROUP BY a HAVING a IS NOT NULL ORDER BY 2 DESC, 1 "
        f"LIMIT {MAX_ACTIONS + 1}"
    ).fetchall()
    if len(rows) > MAX_ACTIONS:
        raise _too_many_actions(log, f", such as {rows[0][0]!r}")
    if not rows:
        raise UserError(f"the action column of {log.path.name} has no values; name another --action-column")
    return dict(rows)


def _too_many_actions(log: Log, example: str = "") -> UserError:
    return UserError(
        f"the action column of {log.path.name} has more than {MAX_ACTIONS} different values{example}; name another "
        "--action-column"
    )

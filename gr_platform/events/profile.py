"""What a log holds, read before it is landed: id types, time unit, actions.

Invariant: a profile is a function of the file and the user's words alone; nothing is written.
"""
# ruff: noqa: S608 - identifiers and strings are quoted by `quoted` and `literal`

from dataclasses import dataclass
from pathlib import Path

import duckdb

from gr_platform.errors import UserError
from gr_platform.events.database import quoted
from gr_platform.events.declaration import MAX_ACTIONS, IdType
from gr_platform.events.times import carries_zone, choose_unit

MIN_USERS = 10
INTERACTION = "interaction"
INTEGER_TYPES = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER")
MISSING = "'nan', 'null', 'none', 'na', '\\N'"  # among integers these mean no id; among text they are text
_CANONICAL_INTEGER = "'^(0|-?[1-9][0-9]*)$'"
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


def profile(
    connection: duckdb.DuckDBPyConnection,
    path: Path,
    relation: str,
    types: dict[str, str],
    mapping: dict[str, str],
    *,
    time_unit: str,
    now_ms: int,
    min_users: int = MIN_USERS,
) -> Profile:
    """Return the profile of a log given as a FROM clause.

    Raises UserError: no rows, fewer than `min_users` users, unreadable times, an event id that identifies nothing.
    """
    rows = _one(connection, f"SELECT count(*) FROM {relation}")
    if rows == 0:
        raise UserError(f"{path.name} holds no events (only a header or an empty table); give a log with events")
    _check_users(connection, path, relation, mapping["user_id"], min_users)
    _check_event_ids(connection, path, relation, mapping)
    ratings = _is_rating(connection, relation, mapping)
    return Profile(
        num_rows=rows,
        user_id_type=_id_type(connection, path, relation, types, mapping["user_id"]),
        item_id_type=_id_type(connection, path, relation, types, mapping["item_id"]),
        time_unit=_time_unit(connection, path, relation, types, mapping["event_ts"], time_unit, now_ms),
        actions=_actions(connection, path, relation, action_sql(mapping, ratings)),
        ratings=ratings,
    )


def action_sql(mapping: dict[str, str], ratings: bool) -> str:
    """Return SQL for the action of a row: its text, `rate_<value>`, or `interaction` where a log has neither."""
    if ratings:
        number = f"TRY_CAST({quoted(mapping['value'])} AS DOUBLE)"
        whole = f"TRY_CAST({number} AS BIGINT)::VARCHAR"
        text = f"CASE WHEN {number} = floor({number}) THEN {whole} ELSE {number}::VARCHAR END"
        return f"CASE WHEN isfinite({number}) THEN 'rate_' || ({text}) END"
    if "action" in mapping:
        return f"nullif(trim({quoted(mapping['action'])}::VARCHAR), '')"
    return f"'{INTERACTION}'"


def event_id_sql(mapping: dict[str, str]) -> str:
    """Return SQL for the event id of a row: its text, NULL where it has none."""
    if "event_id" not in mapping:
        return "NULL::VARCHAR"
    text = f"{quoted(mapping['event_id'])}::VARCHAR"
    return f"CASE WHEN {text} <> '' AND lower({text}) NOT IN ({MISSING}) THEN {text} END"


def _check_users(connection: duckdb.DuckDBPyConnection, path: Path, relation: str, column: str, min_users: int) -> None:
    user = f"{quoted(column)}::VARCHAR"
    found = _one(
        connection,
        f"SELECT count(*) FROM (SELECT DISTINCT {user} AS u FROM {relation} WHERE {user} <> '' LIMIT {min_users})",
    )
    if found < min_users:
        raise UserError(
            f"{path.name} has {found} user(s) in column {column!r}, at least {min_users} are needed; give a larger log "
            "or name another --user-column"
        )


def _check_event_ids(connection: duckdb.DuckDBPyConnection, path: Path, relation: str, mapping: dict[str, str]) -> None:
    """Refuse an event id that most rows share with others: rows with equal ids count once, so most would be lost."""
    ids = event_id_sql(mapping)
    present, different = connection.sql(f"SELECT count({ids}), count(DISTINCT {ids}) FROM {relation}").fetchall()[0]
    if different < MIN_UNIQUE_IDS * present:
        raise UserError(
            f"column {mapping['event_id']!r} of {path.name} has {different} different values in {present} rows, so it "
            "does not identify events; name another --event-id-column, or none"
        )


def _id_type(
    connection: duckdb.DuckDBPyConnection, path: Path, relation: str, types: dict[str, str], column: str
) -> IdType:
    """Return int64 if every id is an integer written the canonical way, else string: '007' must not become 7."""
    kind, name = types[column], quoted(column)
    if kind in INTEGER_TYPES:
        return "int64"
    if kind in ("DOUBLE", "FLOAT"):
        # What pandas makes of integers with gaps; beyond 2^53 a double no longer tells integers apart.
        if _one(
            connection,
            f"SELECT bool_and({name} = floor({name}) AND abs({name}) < 2^53) FROM {relation} WHERE isfinite({name})",
        ):
            return "int64"
        raise UserError(f"column {column!r} of {path.name} holds fractions, not ids; store ids as integers or text")
    nested = "(" in kind and not kind.startswith(("ENUM", "DECIMAL"))
    if nested or kind.endswith("[]") or kind == "BLOB":
        raise UserError(f"column {column!r} of {path.name} is a {kind.split('(')[0]}, it cannot be an id; name another")
    text = f"{name}::VARCHAR"
    whole = f"regexp_matches({text}, {_CANONICAL_INTEGER}) AND TRY_CAST({text} AS BIGINT) IS NOT NULL"
    present = f"{text} <> '' AND lower({text}) NOT IN ({MISSING})"
    return "int64" if _one(connection, f"SELECT bool_and({whole}) FROM {relation} WHERE {present}") else "string"


def _time_unit(
    connection: duckdb.DuckDBPyConnection,
    path: Path,
    relation: str,
    types: dict[str, str],
    column: str,
    wanted: str,
    now_ms: int,
) -> str:
    name, kind = quoted(column), types[column]
    if kind in INTEGER_TYPES:
        median, iso = _one(connection, f"SELECT median({name})::DOUBLE FROM {relation}"), None
    elif kind.startswith("TIMESTAMP") or kind == "DATE":
        # By way of the zoned type: with nanoseconds and a zone there is no cast to TIMESTAMP itself.
        zoned = f"{name}::{'TIMESTAMPTZ' if carries_zone(kind) else 'TIMESTAMP'}"
        median, iso = None, _one(connection, f"SELECT median(epoch_ms({zoned}))::DOUBLE FROM {relation}")
    else:
        text = f"{name}::VARCHAR"
        number = f"TRY_CAST({text} AS DOUBLE)"
        date = f"CASE WHEN {number} IS NULL THEN epoch_ms(TRY_CAST({text} AS TIMESTAMPTZ)) END"
        median, iso, mostly_numbers = connection.sql(
            f"SELECT median({number}) FILTER (isfinite({number})), median({date})::DOUBLE, "
            f"count({number}) * 2 >= count({name}) FROM {relation}"
        ).fetchall()[0]
        median, iso = (median, None) if mostly_numbers and median is not None else (None, iso)
    return choose_unit(path, column, median, iso, wanted, now_ms)


def _is_rating(connection: duckdb.DuckDBPyConnection, relation: str, mapping: dict[str, str]) -> bool:
    """Return whether values become actions: one column is named for both, or there is a rating scale and no action."""
    if "value" not in mapping:
        return False
    if "action" in mapping:
        return mapping["action"] == mapping["value"]
    number = f"TRY_CAST({quoted(mapping['value'])} AS DOUBLE)"
    found = connection.sql(
        f"SELECT DISTINCT {number} FROM {relation} WHERE isfinite({number}) LIMIT {_MAX_RATINGS + 1}"
    ).fetchall()
    scale = [row[0] for row in found]
    return 2 <= len(scale) <= _MAX_RATINGS and all(0 <= step <= 10 and step * 2 == int(step * 2) for step in scale)


def _actions(connection: duckdb.DuckDBPyConnection, path: Path, relation: str, action: str) -> dict[str, int]:
    rows = connection.sql(
        f"SELECT {action} AS a, count(*) FROM {relation} GROUP BY a HAVING a IS NOT NULL ORDER BY 2 DESC, 1 "
        f"LIMIT {MAX_ACTIONS + 1}"
    ).fetchall()
    if len(rows) > MAX_ACTIONS:
        raise UserError(
            f"the action column of {path.name} has more than {MAX_ACTIONS} different values, such as {rows[0][0]!r}; "
            "name another --action-column"
        )
    if not rows:
        raise UserError(f"the action column of {path.name} has no values; name another --action-column")
    return dict(rows)


def _one(connection: duckdb.DuckDBPyConnection, query: str):
    return connection.sql(query).fetchall()[0][0]

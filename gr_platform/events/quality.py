"""The rules that an event must keep to be learned from, by name; the first one broken is the one recorded.

Invariant: a rule looks at its own row alone, and "future" is counted from the moment the file was landed, so ingesting
it again gives the same verdicts.
"""
# ruff: noqa: S608 - identifiers and strings are quoted by `quoted` and `literal`

from gr_platform.events.columns import landed_query, landed_time_type, missing_sql
from gr_platform.events.database import literal, quoted
from gr_platform.events.ledger import LandedFile
from gr_platform.events.times import DAY_MS, EARLIEST_MS, to_ms


def _only_where(condition: str, asked: str) -> str:
    """Return SQL that asks the second question of few rows: a text is made of a cell only where it matters."""
    return f"CASE WHEN {condition} THEN {asked} ELSE false END"


NO_TIME = "null_time"
# name -> (SQL that is true for a broken row, what it means)
RULES: dict[str, tuple[str, str]] = {
    "null_user": (_only_where("user_id IS NULL", missing_sql("raw_user")), "no user id"),
    "invalid_user": ("user_id IS NULL", "a user id that is not of the data set's type"),
    "null_item": (_only_where("item_id IS NULL", missing_sql("raw_item")), "no item id"),
    "invalid_item": ("item_id IS NULL", "an item id that is not of the data set's type"),
    NO_TIME: (_only_where("event_ts IS NULL", "coalesce(found_time::VARCHAR, '') = ''"), "no time"),
    "invalid_time": ("event_ts IS NULL", "a time that cannot be read"),
    "time_before_1990": (f"event_ts < {EARLIEST_MS}", "a time before 1990"),
    "time_in_future": (f"event_ts > landed_at_ms + {DAY_MS}", "a time more than a day after the file was landed"),
    "nan_value": ("isnan(value)", "a value that is not a number (NaN)"),
    "invalid_value": (
        _only_where("value IS NULL OR isinf(value)", "found_value::VARCHAR <> ''"),
        "a value that is no finite number",
    ),
    "null_action": ("action IS NULL", "no action"),
    "unknown_action": ("NOT list_contains($actions, action)", "an action that the data set does not declare"),
}


def judged_query(file: LandedFile) -> str:
    """Return a SELECT over a landed file: its rows as events, each with the first rule that it breaks, or NULL.

    Columns: user_id, item_id, action, value (DOUBLE), event_ts (BIGINT ms), event_id, source_file (INTEGER), source_row
    (BIGINT), the declared context columns, then rule (VARCHAR), raw_user, raw_item, raw_value, raw_time (VARCHAR as
    found) and source_name.
    """
    declared, entry = file.declaration, file.entry
    event_ts = to_ms("found.event_ts", landed_time_type(file), entry.time_unit, declared.time_zone)
    context = "".join(f"{quoted(name)}, " for name in declared.context)
    typed = (
        f"SELECT user_id, item_id, action, TRY_CAST(found.value AS DOUBLE) AS value, {event_ts} AS event_ts, event_id, "
        f"source_row, {context}raw_user, raw_item, found.value AS found_value, found.event_ts AS found_time, "
        f"{entry.landed_at_ms}::BIGINT AS landed_at_ms FROM ({landed_query(file)}) AS found"
    )
    return (
        f"SELECT user_id, item_id, action, value, event_ts, event_id, {entry.sequence}::INTEGER AS source_file, "
        f"source_row, {context}{broken_rule(list(declared.actions))} AS rule, "
        "coalesce(raw_user, user_id::VARCHAR) AS raw_user, coalesce(raw_item, item_id::VARCHAR) AS raw_item, "
        "found_value::VARCHAR AS raw_value, found_time::VARCHAR AS raw_time, "
        f"{literal(entry.source_name)} AS source_name FROM ({typed})"
    )


def broken_rule(actions: list[str]) -> str:
    """Return SQL for the name of the first rule that a row breaks, NULL where it keeps all."""
    declared = f"[{', '.join(map(literal, actions))}]::VARCHAR[]"
    cases = " ".join(
        f"WHEN {condition.replace('$actions', declared)} THEN '{name}'" for name, (condition, _) in RULES.items()
    )
    return f"CASE {cases} END"


def describe(quarantined: dict[str, int]) -> str:
    """Return quarantined counts as text for people: `null_time 279 (no time)`, most frequent first."""
    ordered = sorted(quarantined.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{rule} {count} ({RULES[rule][1]})" for rule, count in ordered)

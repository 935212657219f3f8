"""The rules that an event must keep to be learned from, by name; the first one broken is the one recorded.

Invariant: a rule looks at its own row alone, and "future" is counted from the moment the file was landed, so ingesting
it again gives the same verdicts.
"""

from gr_platform.events.database import literal
from gr_platform.events.times import DAY_MS, EARLIEST_MS

# name -> (SQL that is true for a broken row of `prepared`, what it means)
RULES: dict[str, tuple[str, str]] = {
    "null_user": ("user_id IS NULL", "no user id"),
    "null_item": ("item_id IS NULL", "no item id"),
    "null_time": ("raw_time IS NULL OR raw_time = ''", "no time"),
    "invalid_time": ("event_ts IS NULL", "a time that cannot be read"),
    "time_before_1990": (f"event_ts < {EARLIEST_MS}", "a time before 1990"),
    "time_in_future": (f"event_ts > landed_at_ms + {DAY_MS}", "a time more than a day after the file was landed"),
    "nan_value": ("isnan(value)", "a value that is not a number (NaN)"),
    "invalid_value": ("raw_value <> '' AND (value IS NULL OR isinf(value))", "a value that is no finite number"),
    "null_action": ("action IS NULL", "no action"),
    "unknown_action": ("NOT list_contains($actions, action)", "an action that the data set does not declare"),
}


def broken_rule(actions: list[str]) -> str:
    """Return SQL for the name of the first rule that a row of `prepared` breaks, NULL where it keeps all."""
    declared = f"[{', '.join(map(literal, actions))}]::VARCHAR[]"
    cases = " ".join(
        f"WHEN {condition.replace('$actions', declared)} THEN '{name}'" for name, (condition, _) in RULES.items()
    )
    return f"CASE {cases} END"


def describe(quarantined: dict[str, int]) -> str:
    """Return quarantined counts as text for people: `null_time 279 (no time)`, most frequent first."""
    ordered = sorted(quarantined.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{rule} {count} ({RULES[rule][1]})" for rule, count in ordered)

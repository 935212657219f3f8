"""The checks of clean events by name, and their outcome over all partitions of a data set.

Invariant: every partition is judged each time; errors block what comes after, warnings are shown, and a date that the
user accepted breaks no bound.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gr_platform.events import judgements
from gr_platform.events.bounds import FILE, load_bounds
from gr_platform.events.declaration import Declaration
from gr_platform.events.judgements import Log, Verdict
from gr_platform.events.partitions import partition_facts, stored_facts

SHOWN_ROWS = 8
SHOWN_FAULTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check: what it asks for, the figures it shows, how it judges partition `at`.

    exact: has no bound, so no date can be accepted. blocking: knows errors, not warnings alone.
    """

    description: str
    columns: tuple[str, ...]
    judge: Callable[[Log, int], Verdict]
    exact: bool = False
    blocking: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A check's outcome: faults (errors first, each the newest first), whether any is an error, a summary, a table."""

    faults: list[str]
    is_error: bool
    summary: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def read_log(home: Path, ds: str, declaration: Declaration, now_ms: int) -> Log:
    """Return what the checks judge. Raises UserError for a file, a manifest or a checks.toml that cannot be read."""
    partitions = partition_facts(home, ds)
    return Log(
        declaration=declaration,
        bounds=load_bounds(home, ds),
        dates=[date for date, _ in partitions],
        facts=[facts for _, facts in partitions],
        stored=[stored for _, stored in stored_facts(home, ds)],
        now_ms=now_ms,
    )


def report(name: str, log: Log) -> Report:
    """Return the outcome of the check `name` over all partitions, the newest first."""
    check = CHECKS[name]
    errors: list[str] = []
    warnings: list[str] = []
    skipped, rows = Counter[str](), []
    for at in reversed(range(len(log.dates))):
        date, verdict = log.dates[at], check.judge(log, at)
        said = verdict.error or verdict.warning
        if said and not check.exact and date in log.bounds.accepted:
            skipped[f"accepted in {FILE}"] += 1
        elif said:
            (errors if verdict.error else warnings).append(f"{date}: {said}")
        elif verdict.not_judged:
            skipped[verdict.not_judged] += 1
        rows.append((date, *verdict.cells))
    faults = errors + warnings
    if len(faults) > SHOWN_FAULTS:
        faults = [*faults[:SHOWN_FAULTS], f"and {len(faults) - SHOWN_FAULTS} more partitions"]
    if faults and not check.exact:
        faults.append(f"mend the source, or change the bound or accept the date in {FILE} beside dataset.toml")
    judged = f"{len(log.dates) - skipped.total()} of {len(log.dates)} partitions judged and in order"
    return Report(
        faults=faults,
        is_error=bool(errors),
        summary="; ".join([judged, *(f"{count} not judged: {why}" for why, count in skipped.items())]),
        columns=("ingest date", *check.columns),
        rows=rows[:SHOWN_ROWS],
    )


CHECKS: dict[str, Check] = {
    "schema": Check(
        description="Columns and types are the contract's, and every action is declared.",
        columns=("columns", "actions"),
        judge=judgements.schema,
        exact=True,
    ),
    "conservation": Check(
        description="Rows in = kept + duplicates + quarantined, and the files hold exactly those rows.",
        columns=("rows in", "kept", "duplicates", "quarantined"),
        judge=judgements.conservation,
        exact=True,
    ),
    "nulls": Check(
        description="No user, item, action or time is NULL.",
        columns=judgements.FILLED,
        judge=judgements.nulls,
        exact=True,
    ),
    "time_range": Check(
        description="Events lie between 1990 and tomorrow, or the dates that checks.toml names.",
        columns=("first", "last", "late events"),
        judge=judgements.time_range,
    ),
    "duplicates": Check(
        description="Few rows are duplicates.", columns=("duplicates", "share"), judge=judgements.duplicates
    ),
    "quarantine": Check(
        description="Few rows break a rule.",
        columns=("quarantined", "share", "rules"),
        judge=judgements.quarantine,
        blocking=False,
    ),
    "volume": Check(
        description="About as many rows came in as in the median of up to 7 partitions before.",
        columns=("rows in", "usual", "times"),
        judge=judgements.volume,
    ),
    "new_users": Check(
        description="The share of users never seen before is the usual one.",
        columns=("new users", "share", "usual"),
        judge=judgements.new_rate("users"),
        blocking=False,
    ),
    "new_items": Check(
        description="The share of items never seen before is the usual one.",
        columns=("new items", "share", "usual"),
        judge=judgements.new_rate("items"),
        blocking=False,
    ),
    "action_mix": Check(
        description="The mix of actions is that of up to 7 partitions before (population stability index).",
        columns=("mix", "PSI"),
        judge=judgements.action_mix,
        blocking=False,
    ),
    "longest_user": Check(
        description="Nobody has more events than a person can make.",
        columns=("most events of one user",),
        judge=judgements.longest_user,
        blocking=False,
    ),
}

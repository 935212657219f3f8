"""How one partition of clean events is judged: against the contract, fixed bounds and the partitions before it.

Invariant: pure functions over facts that were gathered before; a figure that was never recorded, or that has nothing to
be compared with, is reported as not judged, never as a fault.
"""

import datetime
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gr_platform.events.bounds import Bounds
from gr_platform.events.declaration import Declaration
from gr_platform.events.partitions import Facts

TRAILING = 7
NOT_RECORDED = "not recorded"
ALONE = "nothing before to compare with"
FEW_ROWS = "too few rows"
FILLED = ("user_id", "item_id", "action", "event_ts")
_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """A data set's partitions, oldest first: `facts` of the manifests, `stored` of the files' footers."""

    declaration: Declaration
    bounds: Bounds
    dates: Sequence[str]
    facts: Sequence[Facts]
    stored: Sequence[Facts]
    now_ms: int

    def before(self, at: int, *, first: int = 0) -> Sequence[Facts]:
        """Return the facts of up to 7 partitions before `at`, none of them before number `first`."""
        return self.facts[max(first, at - TRAILING) : at]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a check says of one partition: the figures it shows, and at most one of error, warning, not judged (why)."""

    cells: tuple[Any, ...]
    error: str = ""
    warning: str = ""
    not_judged: str = ""


def psi(expected: Mapping[Any, float], found: Mapping[Any, float]) -> float:
    """Return the population stability index of two counts by category: 0 for the same mix, above 0.25 another one.

    sum((p - q) ln(p / q)) over the shares. Each side gets half a count a category, laid out as the mean of both mixes,
    so that an empty category stays finite and equal mixes give 0 whatever their sizes. 0 too if one side has no counts.
    Of two samples of one mix it is about (categories - 1) (1 / events + 1 / events) by chance alone.
    Source: Siddiqi, Credit Risk Scorecards (2006); the sum is the divergence of Jeffreys (1946).
    """
    totals = [sum(counts.values()) for counts in (expected, found)]
    if not all(totals):
        return 0.0
    names = {**expected, **found}
    mixes = [
        [counts.get(name, 0) / total for name in names] for counts, total in zip((expected, found), totals, strict=True)
    ]
    prior = 0.5 * len(names)
    drift = 0.0
    for q, p in zip(*mixes, strict=True):
        smoothed = [
            (share * total + prior * (q + p) / 2) / (total + prior) for share, total in zip((q, p), totals, strict=True)
        ]
        drift += (smoothed[1] - smoothed[0]) * math.log(smoothed[1] / smoothed[0]) if q + p else 0.0
    return drift


def schema(log: Log, at: int) -> Verdict:
    """Return whether columns and types are the contract's and every action is declared."""
    declared, types = log.declaration, log.stored[at]["types"]
    id_types = {"int64": ("int64",), "string": ("string",)}
    wanted = {
        "user_id": id_types[declared.user_id_type],
        "item_id": id_types[declared.item_id_type],
        "action": ("string",),
        "value": ("double",),
        "event_ts": ("int64",),
        "event_id": ("string",),
        "source_file": ("int32", "int64"),
        "source_row": ("int64",),
    }
    faults = [
        f"{name} is {types.get(name, 'missing')}, not {kinds[0]}"
        for name, kinds in wanted.items()
        if types.get(name) not in kinds
    ]
    undeclared = sorted(set(log.facts[at].get("actions", ())) - set(declared.actions))
    faults += [f"action {action!r} is not declared" for action in undeclared]
    cells = (len(types), len(log.facts[at].get("actions", ())))
    return Verdict(cells=cells, error=", ".join(faults))


def conservation(log: Log, at: int) -> Verdict:
    """Return whether all rows in are accounted for and stored."""
    facts, stored = log.facts[at], log.stored[at]
    quarantined = sum(facts["quarantined"].values())
    accounted = facts["rows_kept"] + facts["duplicates"] + quarantined
    faults = []
    if accounted != facts["rows_in"]:
        faults.append(f"{facts['rows_in']:,} rows came in, {accounted:,} are accounted for")
    for what, found, expected in (
        ("events", stored["num_rows"], facts["rows_kept"]),
        ("quarantine", stored["num_quarantined"], quarantined),
    ):
        if found != expected:
            faults.append(f"the {what} files hold {found:,} rows, the manifest says {expected:,}")
    cells = (facts["rows_in"], facts["rows_kept"], facts["duplicates"], quarantined)
    return Verdict(cells=cells, error=", ".join(faults))


def nulls(log: Log, at: int) -> Verdict:
    """Return whether no user, item, action or time is NULL."""
    nulls = log.stored[at]["nulls"]
    counts = tuple(nulls.get(name) for name in FILLED)
    faults = [f"{name} is NULL in {count:,} rows" for name, count in zip(FILLED, counts, strict=True) if count]
    unknown = NOT_RECORDED if any(count is None for count in counts) else ""
    return Verdict(cells=counts, error=", ".join(faults), not_judged=unknown)


def time_range(log: Log, at: int) -> Verdict:
    """Return whether its events lie between the bounds' dates."""
    facts, bounds = log.facts[at], log.bounds
    first, last = facts.get("first_ts"), facts.get("last_ts")
    if first is None or last is None:
        return Verdict(cells=(None, None, facts.get("num_late")), not_judged="no events")
    earliest = _ms(bounds.earliest)
    latest = log.now_ms + _DAY_MS if bounds.latest is None else _ms(bounds.latest) + _DAY_MS
    fault = ""
    if not earliest <= first <= last < latest:
        fault = f"events from {_day(first)} to {_day(last)}, must lie from {_day(earliest)} to before {_day(latest)}"
    return Verdict(cells=(_day(first), _day(last), facts.get("num_late")), error=fault)


def duplicates(log: Log, at: int) -> Verdict:
    """Return whether few of its rows are duplicates."""
    facts, bounds = log.facts[at], log.bounds
    share = facts["duplicates"] / max(1, facts["rows_in"])
    said = f"{_percent(share)} of {facts['rows_in']:,} rows are duplicates, at most "
    cells = (facts["duplicates"], _percent(share))
    if share > bounds.max_duplicates:
        return Verdict(cells=cells, error=f"{said}{_percent(bounds.max_duplicates)} (max_duplicates)")
    if share > bounds.warn_duplicates:
        return Verdict(cells=cells, warning=f"{said}{_percent(bounds.warn_duplicates)} (warn_duplicates)")
    return Verdict(cells=cells)


def quarantine(log: Log, at: int) -> Verdict:
    """Return whether few of its rows broke a rule."""
    facts, bound = log.facts[at], log.bounds.max_quarantined
    by_rule = sorted(facts["quarantined"].items(), key=lambda entry: (-entry[1], entry[0]))
    share = sum(count for _, count in by_rule) / max(1, facts["rows_in"])
    rules = ", ".join(f"{rule} {count:,}" for rule, count in by_rule[:3])
    said = f"{_percent(share)} of {facts['rows_in']:,} rows are quarantined ({rules}), at most {_percent(bound)}"
    return Verdict(
        cells=(sum(count for _, count in by_rule), _percent(share), rules),
        warning=f"{said} (max_quarantined)" if share > bound else "",
    )


def volume(log: Log, at: int) -> Verdict:
    """Return whether about as many rows came in as usual."""
    bounds, rows, before = log.bounds, log.facts[at]["rows_in"], log.before(at)
    if len(before) < bounds.min_partitions:
        return Verdict(cells=(rows, None, None), not_judged=ALONE if not before else "too few partitions before")
    usual = statistics.median(facts["rows_in"] for facts in before)
    times = max(rows, 1) / max(usual, 1)
    said = f"{rows:,} rows came in, usual are {usual:,.0f}: {times:.2g} times as many, outside 1/%g to %g"
    cells, off = (rows, int(usual), f"{times:.2f}"), max(times, 1 / times)
    if off > bounds.max_volume:
        return Verdict(cells=cells, error=f"{said % (bounds.max_volume, bounds.max_volume)} (max_volume)")
    if off > bounds.warn_volume:
        return Verdict(cells=cells, warning=f"{said % (bounds.warn_volume, bounds.warn_volume)} (warn_volume)")
    return Verdict(cells=cells)


def new_rate(what: str) -> Callable[[Log, int], Verdict]:
    """Return the check of the share of users or items that no earlier partition holds."""

    def share_of(facts: Facts) -> float | None:
        new, all_ = facts.get(f"num_new_{what}"), facts.get(f"num_{what}")
        return new / all_ if new is not None and all_ else None

    def judge(log: Log, at: int) -> Verdict:
        facts, bound = log.facts[at], getattr(log.bounds, f"max_new_{what}_change")
        share, new = share_of(facts), facts.get(f"num_new_{what}")
        # In the first partition everything is new, which says nothing of a usual day.
        usual = [known for known in map(share_of, log.before(at, first=1)) if known is not None]
        if share is None:
            return Verdict(cells=(new, None, None), not_judged=NOT_RECORDED if new is None else "no events")
        if not usual or facts["rows_kept"] < log.bounds.min_rows:
            return Verdict(cells=(new, _percent(share), None), not_judged=FEW_ROWS if usual else ALONE)
        median = statistics.median(usual)
        said = f"{_percent(share)} of the {what} are new, usual are {_percent(median)}: more than {bound:.2g} apart"
        return Verdict(
            cells=(new, _percent(share), _percent(median)),
            warning=f"{said} (max_new_{what}_change)" if abs(share - median) > bound else "",
        )

    return judge


def action_mix(log: Log, at: int) -> Verdict:
    """Return whether its actions are mixed as before."""
    facts, bound, before = log.facts[at], log.bounds.max_psi, Counter[str]()
    for earlier in log.before(at):
        before.update(earlier.get("actions", {}))
    mix: Counter[str] = Counter(facts.get("actions", {}))
    shown = ", ".join(f"{name} {_percent(count / mix.total())}" for name, count in mix.most_common(4))
    if "actions" not in facts or not before:
        return Verdict(cells=(shown, None), not_judged=ALONE if "actions" in facts else NOT_RECORDED)
    if min(mix.total(), before.total()) < log.bounds.min_rows:
        return Verdict(cells=(shown, None), not_judged=FEW_ROWS)
    drift = psi(before, mix)
    was = {name: before[name] / before.total() for name in sorted({*before, *mix})}
    became = {name: mix[name] / mix.total() for name in was}
    moved = max(was, key=lambda name: abs(became[name] - was[name]))
    said = (
        f"the action mix drifted by a PSI of {drift:.2f}, at most {bound:g} (max_psi): most of all {moved}, from "
        f"{_percent(was[moved])} to {_percent(became[moved])}"
    )
    return Verdict(cells=(shown, f"{drift:.3f}"), warning=said if drift > bound else "")


def longest_user(log: Log, at: int) -> Verdict:
    """Return whether nobody has more events than a person can make."""
    longest, bound = log.facts[at].get("max_user_events"), log.bounds.max_user_events
    if longest is None:
        return Verdict(cells=(None,), not_judged=NOT_RECORDED)
    said = f"one user has {longest:,} events, at most {bound:,} (max_user_events): a machine, or a shared account?"
    return Verdict(cells=(longest,), warning=said if longest > bound else "")


def _ms(day: datetime.date) -> int:
    return (day - datetime.date(1970, 1, 1)).days * _DAY_MS


def _day(ms: int) -> str:
    return (datetime.date(1970, 1, 1) + datetime.timedelta(days=ms // _DAY_MS)).isoformat()


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"

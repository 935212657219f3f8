"""How the items and actions of the newest day of events differ from those of the days before it.

Invariant: both sides are counted in bins that neither chose for itself, so a day like those before it measures about 0
however long the tail of rare and new items is. A day that one item swamps is no reference for others.
"""

import datetime
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import duckdb

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events.ingest import CleanEvents
from gr_platform.events.judgements import psi
from gr_platform.events.times import DAY_MS
from gr_platform.lifecycle.options import Drift

VERSION = 1
# Items with a bin of their own, at most; each is to be expected so often on the newest day: below that, its count is
# chance more than anything.
NUM_TOP = 50
MIN_EXPECTED = 20
# Of a day that fewer people made, each would be a good part of what everybody seems to do.
MIN_PEOPLE = 5
SHOWN = 8
MAX_ACTIONS = 1000
_EPOCH = datetime.date(1970, 1, 1)

_DAYS = "SELECT event_ts // {day_ms} AS day, count(*) FROM events GROUP BY day ORDER BY day"
_COUNTS = """
CREATE TABLE counts AS
SELECT event_ts // {day_ms} AS day, item_id, action, count(*) AS num, max(event_ts) AS last FROM events
WHERE event_ts >= {begin} AND event_ts < {end} GROUP BY ALL
"""
_LARGEST = """
SELECT day, max(num), arg_max(item_id, num) FROM (
    SELECT day, item_id, sum(num)::BIGINT AS num FROM counts GROUP BY ALL
) GROUP BY day
"""
# As many people as do equally much would weigh as much as these (Kish, Survey Sampling, 1965): what a user does today
# is one taste, however many events it makes.
_PEOPLE = """
SELECT sum(num)::DOUBLE ** 2 / sum(num ** 2) FROM (
    SELECT count(*) AS num FROM events
    WHERE event_ts >= {begin} AND event_ts < {end} AND event_ts // {day_ms} IN ({days}) GROUP BY user_id
)
"""
_SHARES = """
SELECT {column}, coalesce(sum(num) FILTER (day <> {newest}), 0)::BIGINT AS was,
    coalesce(sum(num) FILTER (day = {newest}), 0)::BIGINT AS became
FROM counts GROUP BY {column} ORDER BY greatest(was * {scale}, became) DESC, {column} LIMIT {limit}
"""
# items: events of an item by day. totals: in the reference. days: each reference day's share of the reference.
_ITEMS = """
DELETE FROM counts WHERE day NOT IN ({days});
CREATE TABLE items AS SELECT day, item_id, sum(num)::BIGINT AS num FROM counts GROUP BY ALL;
CREATE TABLE totals AS SELECT item_id, sum(num)::BIGINT AS num FROM items WHERE day <> {newest} GROUP BY ALL;
CREATE TABLE days AS
SELECT day, sum(num) / sum(sum(num)) OVER () AS share FROM items WHERE day <> {newest} GROUP BY day;
CREATE TABLE tops AS SELECT item_id, num FROM totals WHERE num * {scale} >= {least}
ORDER BY num DESC, item_id LIMIT {num_top};
CREATE TABLE tail AS SELECT day, item_id, num FROM items ANTI JOIN tops USING (item_id);
"""
_TOP_BEFORE = """
SELECT coalesce(sum(num), 0) FROM totals
WHERE item_id = (SELECT arg_max(item_id, num) FROM items WHERE day = {newest})
"""
_TOP = """
SELECT 'item ' || tops.item_id, tops.num, coalesce(items.num, 0) FROM tops
LEFT JOIN items ON items.item_id = tops.item_id AND items.day = {newest}
"""
# Every other item by how often the reference has it without one of its days, 0 = new: a reference day's own without
# that day, the newest day's without each of them in turn. So both meet as much that they do not know.
_TAIL = """
WITH known AS (
    SELECT item_id, tail.num AS num, totals.num AS total, share FROM tail
    JOIN totals USING (item_id) JOIN days USING (day)
), newest AS (
    SELECT item_id, tail.num AS num, coalesce(totals.num, 0) AS total FROM tail
    LEFT JOIN totals USING (item_id) WHERE day = {newest}
), parts AS (
    SELECT total - num AS seen, num::DOUBLE AS was, 0.0 AS became FROM known
    UNION ALL
    SELECT known.total - known.num, 0.0, newest.num * share FROM newest JOIN known USING (item_id)
    UNION ALL
    SELECT total, 0.0, num * greatest(0.0, 1 - coalesce(covered, 0)) FROM newest
    LEFT JOIN (SELECT item_id, sum(share) AS covered FROM known GROUP BY item_id) USING (item_id)
)
SELECT 'seen ' || CASE WHEN seen <= 0 THEN -1 ELSE floor(log2(seen) / 2)::INT END AS band, sum(was), sum(became)
FROM parts GROUP BY band
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DayDrift:
    """The newest day (YYYY-MM-DD; "": no day has enough events) against its reference; None: nothing to tell.

    newest_ms: time of the day's newest event, or of the log's. num_events: of the day. num_people: how many people of
    equal activity would weigh as much as those they come from. left_out: days of the reference that one item swamps.
    top_item: the day's largest, with its share of the day and of the reference. items, actions: [name, share of the
    reference, share of the day], the largest.
    """

    day: str = ""
    newest_ms: int | None = None
    num_events: int = 0
    num_people: float | None = None
    num_reference: int = 0
    num_days: int = 0
    left_out: int = 0
    item_psi: float | None = None
    action_psi: float | None = None
    top_item: str = ""
    top_share: float | None = None
    top_share_before: float | None = None
    items: list[list[Any]] = field(default_factory=list)
    actions: list[list[Any]] = field(default_factory=list)


def day_drift(events: CleanEvents, chosen: Drift) -> DayDrift:
    """Return how the newest day with `min_events` events differs from the `reference_days` days before it.

    A later day with fewer is passed over: it has only begun, or its times are wrong. Raises UserError if the events
    were ingested anew meanwhile.
    """
    try:
        with events.connect() as connection:
            return _measured(connection, chosen)
    except duckdb.IOException:
        raise UserError("the events were ingested anew while their drift was measured; ask again") from None


def stored_day_drift(parent: Path, events: CleanEvents, chosen: Drift) -> storage.Result:
    """Return `day_drift` as the facts of a result in `parent`, measured once for these events and options."""
    options = ("reference_days", "min_events", "max_item_share")
    spec = {"events": events.digest, "version": VERSION} | {name: getattr(chosen, name) for name in options}
    return storage.ensure(parent, "events", spec, lambda _: asdict(day_drift(events, chosen)))


def _measured(connection: duckdb.DuckDBPyConnection, chosen: Drift) -> DayDrift:
    num_events = dict(connection.sql(_DAYS.format(day_ms=DAY_MS)).fetchall())
    enough = [day for day, num in num_events.items() if num >= chosen.min_events]
    if not enough:
        return DayDrift(newest_ms=connection.sql("SELECT max(event_ts) FROM events").fetchall()[0][0])
    newest = enough[-1]
    span = {"begin": (newest - chosen.reference_days) * DAY_MS, "end": (newest + 1) * DAY_MS, "day_ms": DAY_MS}
    connection.execute(_COUNTS.format(**span))
    largest = {day: (num / num_events[day], str(item)) for day, num, item in connection.sql(_LARGEST).fetchall()}
    before = [day for day in num_events if newest - chosen.reference_days <= day < newest]
    # One odd event of a day with few is a large share of it, and moves a reference of many little.
    swamped = [d for d in before if num_events[d] >= chosen.min_events and largest[d][0] > chosen.max_item_share]
    reference = [day for day in before if day not in swamped]
    sizes = sum(num_events[day] for day in reference), num_events[newest]
    values = {"newest": newest, "scale": sizes[1] / max(1, sizes[0])}
    connection.execute(_ITEMS.format(**values, days=_list([*reference, newest]), least=MIN_EXPECTED, num_top=NUM_TOP))
    items, actions = (
        connection.sql(_SHARES.format(**values, column=column, limit=limit)).fetchall()
        for column, limit in (("item_id", SHOWN), ("action", MAX_ACTIONS))
    )
    found = DayDrift(
        day=day_name(newest),
        newest_ms=round(_value(connection, "SELECT max(last) FROM counts")),
        num_events=sizes[1],
        num_reference=sizes[0],
        num_days=len(reference),
        left_out=len(swamped),
        top_share=largest[newest][0],
        top_item=largest[newest][1],
        items=_shares(items, sizes),
        actions=_shares(actions, sizes),
    )
    if sizes[0] < chosen.min_events:
        return found
    people = [_value(connection, _PEOPLE.format(**span, days=_list(days))) for days in (reference, [newest])]
    if people[1] < MIN_PEOPLE:
        return replace(found, num_people=people[1])
    return replace(
        found,
        num_people=people[1],
        item_psi=_psi(_item_bins(connection, newest)),
        action_psi=beyond_chance(_psi(actions), len(actions), people),
        top_share_before=_value(connection, _TOP_BEFORE.format(newest=newest)) / sizes[0],
    )


def day_name(day: int) -> str:
    """Return the date, YYYY-MM-DD, of a number of days since 1970."""
    return (_EPOCH + datetime.timedelta(days=day)).isoformat()


def _shares(rows: list[tuple[Any, ...]], sizes: tuple[int, int]) -> list[list[Any]]:
    return [[str(name), was / max(1, sizes[0]), became / sizes[1]] for name, was, became in rows[:SHOWN]]


def beyond_chance(drift: float, num_bins: int, sizes: Sequence[float]) -> float:
    """Return a PSI less what two samples of one mix, of these sizes, differ by on average."""
    return max(0.0, drift - (num_bins - 1) * sum(1 / size for size in sizes))


def _item_bins(connection: duckdb.DuckDBPyConnection, newest: int) -> list[tuple[Any, ...]]:
    """Return (bin, events of the reference, events of the newest day) of the most frequent items and of the others."""
    return [
        *connection.sql(_TOP.format(newest=newest)).fetchall(),
        *connection.sql(_TAIL.format(newest=newest)).fetchall(),
    ]


def _psi(bins: list[tuple[Any, ...]]) -> float:
    return psi({name: was for name, was, _ in bins}, {name: became for name, _, became in bins})


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _value(connection: duckdb.DuckDBPyConnection, sql: str) -> float:
    return float(connection.sql(sql).fetchall()[0][0])

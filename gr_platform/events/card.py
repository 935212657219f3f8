"""The figures of a data set's card: what its clean events look like, as counts and distributions.

Invariant: aggregates only, no row and no id of a user or an item, and memory does not grow with the events: whatever
needs each user's events in order is computed on a sample of whole users once there are more than 5 million events.
"""
# ruff: noqa: S608 - every name in the SQL is a constant of this file

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gr_platform.events.partitions import Facts

if TYPE_CHECKING:
    import duckdb

    from gr_platform.events.ingest import CleanEvents

SAMPLED_EVENTS = 5_000_000
DAY_BARS = 180
CURVE_POINTS = 60
# Bins of the time between two events, from 1 s to 300 years.
GAP_BINS_A_DECADE = 4
GAP_DECADES = 10
HOUR_MS = 3_600_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How a count (events a user, events an item) is distributed.

    edges, counts: bins [edges[i], edges[i + 1]) that grow by about a quarter of a decade, and how many lie in each.
    quantiles: name -> count.
    """

    edges: list[int]
    counts: list[int]
    quantiles: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """All figures of one data set; shares are 0 to 1, times ms UTC.

    density: events / (users x items). actions: (name, events). curve: (share of the items, most popular first, share of
    the events). days: events per `days_a_bar` days, from `first_day` (days since 1970). hours: events by hour of day.
    gaps: events by the time since the user's event before: bin 0 below 1 s, bin i from 10^((i - 1) / 4) s on. ties,
    repeats, out_of_order: shares of the sampled events that share their time with the user's event before, that are of
    an item the user had before, that came in after a later event of the user; None without a sample. partitions: the
    facts of each ingest date.
    """

    declaration: dict[str, Any]
    num_events: int
    num_users: int
    num_items: int
    num_values: int
    first_ts: int
    last_ts: int
    density: float
    rows_in: int
    duplicates: int
    quarantined: dict[str, int]
    actions: list[tuple[str, int]]
    per_user: Spread
    per_item: Spread
    curve: list[tuple[float, float]]
    gini: float
    first_day: int
    days_a_bar: int
    days: list[int]
    hours: list[int]
    sampled_events: int
    gaps: list[int]
    median_gap_s: float | None
    ties: float | None
    repeats: float | None
    out_of_order: float | None
    partitions: list[tuple[str, Facts]]

    def to_json(self) -> dict[str, Any]:
        """Return the card as JSON-able values."""
        return asdict(self)


def make_card(clean: "CleanEvents", partitions: list[tuple[str, Facts]]) -> Card:
    """Return the figures of clean events; partitions: each ingest date with its manifest's facts, oldest first."""
    quarantined: dict[str, int] = {}
    for _, facts in partitions:
        for rule, count in facts["quarantined"].items():
            quarantined[rule] = quarantined.get(rule, 0) + count
    with clean.connect() as connection:
        actions = connection.sql(
            "SELECT action, count(*) AS num_events, count(value), min(event_ts), max(event_ts) FROM events "
            "GROUP BY action ORDER BY num_events DESC, action"
        ).fetchall()
        users, items = _sizes(connection, "user_id"), _sizes(connection, "item_id")
        by_hour = _columns(
            connection, f"SELECT event_ts // {HOUR_MS} AS hour, count(*) FROM events GROUP BY hour ORDER BY hour"
        )
        num_events = sum(row[1] for row in actions)
        ordered = _ordered(connection, num_events)
    num_users, num_items = int(users[1].sum()), int(items[1].sum())
    curve, gini = _popularity(*items)
    return Card(
        declaration=clean.declaration.to_json(),
        num_events=num_events,
        num_users=num_users,
        num_items=num_items,
        num_values=sum(row[2] for row in actions),
        first_ts=min(row[3] for row in actions),
        last_ts=max(row[4] for row in actions),
        density=num_events / (num_users * num_items),
        rows_in=sum(facts["rows_in"] for _, facts in partitions),
        duplicates=sum(facts["duplicates"] for _, facts in partitions),
        quarantined=dict(sorted(quarantined.items(), key=lambda entry: (-entry[1], entry[0]))),
        actions=[(row[0], row[1]) for row in actions],
        per_user=_spread(*users),
        per_item=_spread(*items),
        curve=curve,
        gini=gini,
        **_calendar(*by_hour),
        **ordered,
        partitions=partitions,
    )


def _columns(connection: "duckdb.DuckDBPyConnection", sql: str) -> tuple[np.ndarray, np.ndarray]:
    first, second = connection.sql(sql).fetchnumpy().values()
    return np.asarray(first, np.int64), np.asarray(second, np.int64)


def _sizes(connection: "duckdb.DuckDBPyConnection", column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return each number of events that a user (item) has, ascending, and how many have it: exact, and small."""
    return _columns(
        connection,
        f"SELECT size, count(*) FROM (SELECT count(*) AS size FROM events GROUP BY {column}) "
        "GROUP BY size ORDER BY size",
    )


def _spread(sizes: np.ndarray, numbers: np.ndarray) -> Spread:
    decades = int(np.ceil(np.log10(sizes[-1] + 1) * 4))
    edges = np.unique(np.round(10 ** (np.arange(decades + 1) / 4)).astype(np.int64))
    edges = np.append(edges, sizes[-1] + 1) if edges[-1] <= sizes[-1] else edges
    counts, _ = np.histogram(sizes, bins=edges, weights=numbers)
    upto = np.cumsum(numbers)
    at = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}
    quantiles = {name: float(sizes[np.searchsorted(upto, share * upto[-1])]) for name, share in at.items()}
    quantiles["mean"] = float((sizes * numbers).sum() / upto[-1])
    return Spread(edges=edges.tolist(), counts=counts.astype(np.int64).tolist(), quantiles=quantiles)


def _popularity(sizes: np.ndarray, numbers: np.ndarray) -> tuple[list[tuple[float, float]], float]:
    """Return the share of events of the most popular items, and the Gini coefficient of events over items.

    Gini: 0 if every item has as many events, near 1 if one has all; 1 - twice the area under the Lorenz curve.
    """
    sizes, numbers = sizes[::-1], numbers[::-1]
    items = np.concatenate([[0.0], np.cumsum(numbers) / numbers.sum()])
    events = np.concatenate([[0.0], np.cumsum(sizes * numbers) / (sizes * numbers).sum()])
    # Items of one size share their events evenly, so between two sizes the curve is straight.
    gini = float(((events[1:] + events[:-1]) * np.diff(items)).sum() - 1)
    shares = np.geomspace(1 / numbers.sum(), 1.0, CURVE_POINTS)
    return [(float(x), float(y)) for x, y in zip(shares, np.interp(shares, items, events), strict=True)], gini


def _calendar(hours: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    days = hours // 24
    span = int(days[-1] - days[0]) + 1
    days_a_bar = -(-span // DAY_BARS)
    bars = np.bincount((days - days[0]) // days_a_bar, weights=counts)
    return {
        "first_day": int(days[0]),
        "days_a_bar": days_a_bar,
        "days": bars.astype(np.int64).tolist(),
        "hours": np.bincount(hours % 24, weights=counts, minlength=24).astype(np.int64).tolist(),
    }


def _ordered(connection: "duckdb.DuckDBPyConnection", num_events: int) -> dict[str, Any]:
    """Return the figures that need each user's events in order, of a sample of whole users of a large log."""
    every = -(-num_events // SAMPLED_EVENTS)
    connection.execute(
        "CREATE TEMP TABLE sample AS SELECT hash(user_id) AS u, hash(item_id) AS i, event_ts, source_file, source_row "
        f"FROM events {f'WHERE hash(user_id) % {every} = 0' if every > 1 else ''}"
    )
    sampled, pairs = connection.sql(
        "SELECT (SELECT count(*) FROM sample), (SELECT count(*) FROM (SELECT DISTINCT u, i FROM sample))"
    ).fetchall()[0]
    out_of_order = connection.sql(
        "SELECT count(*) FILTER (event_ts < before) FROM (SELECT event_ts, lag(event_ts) OVER "
        "(PARTITION BY u ORDER BY source_file, source_row) AS before FROM sample)"
    ).fetchall()[0][0]
    connection.execute(
        "CREATE TEMP TABLE gaps AS SELECT gap FROM (SELECT event_ts - lag(event_ts) OVER "
        "(PARTITION BY u ORDER BY event_ts) AS gap FROM sample) WHERE gap IS NOT NULL"
    )
    ties, median = connection.sql("SELECT count(*) FILTER (gap = 0), median(gap) FROM gaps").fetchall()[0]
    place = f"1 + floor(log10(gap / 1000) * {GAP_BINS_A_DECADE})::INTEGER"
    binned = _columns(
        connection,
        f"SELECT CASE WHEN gap < 1000 THEN 0 ELSE {place} END AS bin, count(*) FROM gaps GROUP BY bin ORDER BY bin",
    )
    num_bins = 1 + GAP_BINS_A_DECADE * GAP_DECADES
    return {
        "sampled_events": sampled,
        "gaps": np.bincount(np.minimum(binned[0], num_bins - 1), binned[1], num_bins).astype(np.int64).tolist(),
        "median_gap_s": None if median is None else median / 1000,
        "ties": ties / sampled if sampled else None,
        "repeats": (sampled - pairs) / sampled if sampled else None,
        "out_of_order": out_of_order / sampled if sampled else None,
    }

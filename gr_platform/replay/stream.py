"""A log is cut into what was there before and one file a day, as a service would have received them.

Invariant: a stream is a function of its log and options. Cut in time: every event of a day is later than all of the
days before it and of the history; a fault (faults.py) changes its own day alone.

The simulator's 180 days hold few events each, so they are told `speed` times as fast: the same users, items and order
in fewer days. A service in its second week comes of it, whose catalogue and users grow from day to day: that is why a
model of yesterday falls behind. Of an ingested data set a sample of users is taken, and sparse days are told as one.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr_platform.errors import UserError
from gr_platform.replay.faults import DAY_MS, Fault, poisoned, tenfold

SIMULATED_DAYS = 180
# Of the days told: those before the replay, and those behind it, in which the simulator lets nothing new be born.
HISTORY_DAYS, LAST_DAYS = 8, 3
MAX_SPEED = 10
MAX_DAYS = 60
# Of an ingested data set's events: what lies before the replay.
HISTORY_SHARE = 0.5
HISTORY = "history.parquet"
DECLARATION = "declaration.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """days: to replay. num_events: about, of the whole log. faults: number of a day, from 1 -> what is wrong there."""

    days: int = 7
    num_events: int = 100_000
    seed: int = 7
    faults: Mapping[int, Fault] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.days <= MAX_DAYS:
            raise ValueError(f"StreamOptions.days is {self.days}, must be from 1 to {MAX_DAYS}")
        for number, fault in self.faults.items():
            if not 1 <= number <= self.days or fault not in get_args(Fault):
                raise ValueError(
                    f"StreamOptions.faults has {fault!r} on day {number}, must be one of {', '.join(get_args(Fault))} "
                    f"on a day from 1 to {self.days}"
                )

    @property
    def speed(self) -> int:
        """How many times as fast the simulator's days are told."""
        return min(MAX_SPEED, SIMULATED_DAYS // (HISTORY_DAYS + self.days + LAST_DAYS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """One day of a replay: the events of [begin, end) in ms UTC. date: YYYY-MM-DD, of its last UTC day.

    path: what arrives, None of an empty day; true_path: what would have without the fault. num_events, top_share (of
    the most frequent item) and new_item_share (of rows on items unseen before) are of what arrives.
    """

    number: int
    date: str
    begin: int
    end: int
    path: Path | None
    true_path: Path
    fault: Fault | None
    num_events: int
    top_share: float
    new_item_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A log that is cut: import `history`, then each day's path under its date.

    declaration: a file for `gr import --declaration`, None where the files say it themselves. history_date: its last
    day.
    """

    dataset: str
    declaration: Path | None
    history: Path
    history_date: str
    num_history_events: int
    days: tuple[Day, ...]


def simulated(folder: Path, options: StreamOptions) -> Stream:
    """Return the simulator's stream, written into the new folder `folder`. Raises UserError as the simulator does."""
    from gr_platform.events.simulator import END_MS, simulate
    from gr_platform.events.simulator.target import NAME, catalogue_name

    folder.mkdir(parents=True)
    log = folder / "log.parquet"
    simulate(log, num_events=options.num_events, seed=options.seed)
    table = pq.read_table(log)
    told = END_MS - (END_MS - table["event_ts"].to_numpy()) // options.speed
    table = table.set_column(table.column_names.index("event_ts"), "event_ts", pa.array(told))
    first = END_MS - SIMULATED_DAYS // options.speed * DAY_MS
    edges = [first + (HISTORY_DAYS + number) * DAY_MS for number in range(options.days + 1)]
    (folder / catalogue_name(log.name)).rename(folder / catalogue_name(HISTORY))
    log.unlink()
    # The column's replacement has lost what the log says of itself.
    table = table.replace_schema_metadata(_metadata())
    return _cut(folder, table, edges, options, dataset=NAME, declaration=None)


def of_dataset(folder: Path, home: Path, ds: str, options: StreamOptions) -> Stream:
    """Return the stream of an ingested data set's clean events, written into the new folder `folder`.

    A seeded sample of its users has about `num_events` of them; the first half of these is the history, the rest days
    of about equally many events: runs of whole UTC days. Raises UserError if nothing was ingested or the log has too
    few days.
    """
    from gr_platform.events.ingest import clean_events

    events = clean_events(home, ds)
    table = events.query(
        "SELECT user_id, item_id, action, event_ts FROM events ORDER BY event_ts, source_file, source_row"
    )
    table = _sampled(table, options)
    edges = _equal_days(table["event_ts"].to_numpy(), options.days, ds)
    folder.mkdir(parents=True)
    declared = events.declaration.to_json() | {
        "columns": {name: name for name in table.column_names},
        "header": [],
        "context": [],
        "catalogue": [],
        "rename_actions": {},
        "time_unit": "ms",
    }
    (folder / DECLARATION).write_text(type(events.declaration).from_json(declared).to_toml(), encoding="utf-8")
    return _cut(folder, table, edges, options, dataset=ds, declaration=folder / DECLARATION)


def _cut(
    folder: Path,
    table: pa.Table,
    edges: Sequence[int],
    options: StreamOptions,
    *,
    dataset: str,
    declaration: Path | None,
) -> Stream:
    """Write a table in order of time as a history before edges[0] and a day between each two edges."""
    at = np.searchsorted(table["event_ts"].to_numpy(), edges)
    history = table.slice(0, at[0])
    if not len(history) or any(np.diff(at) == 0):
        raise UserError(f"the log of {dataset} has days without events where the replay is; replay fewer days")
    _write(history, folder / HISTORY)
    days = []
    for number in range(1, options.days + 1):
        begin, end = edges[number - 1], edges[number]
        true = table.slice(at[number - 1], at[number] - at[number - 1])
        before = table.slice(0, at[number - 1])
        days.append(_day(folder, true, before, number, (begin, end), options))
    return Stream(
        dataset=dataset,
        declaration=declaration,
        history=folder / HISTORY,
        history_date=_date(edges[0] - 1),
        num_history_events=len(history),
        days=tuple(days),
    )


def _day(
    folder: Path, true: pa.Table, before: pa.Table, number: int, span: tuple[int, int], options: StreamOptions
) -> Day:
    date, fault = _date(span[1] - 1), options.faults.get(number)
    true_path = path = folder / f"{date}.parquet"
    _write(true, true_path)
    arrives = true
    if fault == "empty":
        arrives = true.slice(0, 0)
    elif fault is not None:
        arrives = poisoned(true, before, options.seed) if fault == "poisoned" else tenfold(true)
        path = folder / f"{date}.{fault}.parquet"
        _write(arrives, path)
    counts = pc.value_counts(arrives["item_id"]).field("counts").to_numpy()
    new = pc.invert(pc.is_in(arrives["item_id"], value_set=pc.unique(before["item_id"])))
    return Day(
        number=number,
        date=date,
        begin=span[0],
        end=span[1],
        path=None if fault == "empty" else path,
        true_path=true_path,
        fault=fault,
        num_events=len(arrives),
        top_share=float(counts.max(initial=0) / max(1, len(arrives))),
        new_item_share=float(pc.sum(new).as_py() or 0) / max(1, len(arrives)),
    )


def _sampled(table: pa.Table, options: StreamOptions) -> pa.Table:
    """Return the events of users drawn until they have num_events together."""
    if len(table) <= options.num_events:
        return table
    codes = table["user_id"].combine_chunks().dictionary_encode()
    users = codes.indices.to_numpy()
    counts = np.bincount(users)
    drawn = np.random.default_rng(options.seed).permutation(len(counts))
    kept = np.zeros(len(counts), bool)
    kept[drawn[: np.searchsorted(counts[drawn].cumsum(), options.num_events) + 1]] = True
    return table.filter(pa.array(kept[users]))


def _equal_days(times: np.ndarray, num_days: int, ds: str) -> list[int]:
    """Return num_days + 1 UTC midnights: half of all events before the first, equally many between each two."""
    day = times // DAY_MS
    starts, counts = np.unique(day, return_counts=True)
    total = np.concatenate([[0], counts.cumsum()])
    wanted = len(times) * (HISTORY_SHARE + (1 - HISTORY_SHARE) * np.arange(num_days + 1) / num_days)
    places = np.searchsorted(total, wanted - 0.5)
    for number in range(1, num_days + 1):
        places[number] = max(places[number], places[number - 1] + 1)
    if places[-1] > len(starts) or places[0] == 0:
        raise UserError(f"the log of {ds} has events on {len(starts)} days, too few for {num_days} to replay")
    return [int(each) * DAY_MS for each in np.append(starts, starts[-1] + 1)[places]]


def _write(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd")


def _metadata() -> dict[bytes, bytes]:
    from gr_platform.events.simulator import ACTIONS
    from gr_platform.events.simulator.target import metadata

    return metadata(ACTIONS)


def _date(ms: int) -> str:
    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).date().isoformat()

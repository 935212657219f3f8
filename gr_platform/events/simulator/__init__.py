"""A synthetic interaction log for offline use: the paper's kind of stream, whose vocabulary grows and tastes drift.

Invariant: the log is a function of (num_events, seed) alone, ends at a fixed date, and is made in bounded memory.

What there is to learn: topics have Dirichlet-process (stick-breaking) weights; each topic's items form a series in
order of their birth, and new items are born all the time. A session follows one topic, mostly to the next unseen items
of its series, so the item before tells the next one. A later session continues where the user left that topic, so older
history counts too; a long pause means another topic, so times count. A user's topics shift from session to session. One
view in six is a detour to whatever is popular. Likes and purchases follow a hidden affinity of user and topic. Where
there are more than fifty topics they form fifty genres, of each of which a user follows one topic.

How: users are drawn in blocks (users.py), their views are cut into spans of time on disk (spill.py), and one span after
the other is put in order of time and written (here), at first to a hidden place (target.py).
"""

import math
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from gr_platform.errors import UserError
from gr_platform.events.simulator import target
from gr_platform.events.simulator.spill import Spill
from gr_platform.events.simulator.target import METADATA_KEY, NAME
from gr_platform.events.simulator.users import BOUGHT, LIKED, Views, draw_views
from gr_platform.events.simulator.world import END_MS, FIRST_ITEM_ID, World, catalogue_of, make_world

__all__ = ["ACTIONS", "END_MS", "METADATA_KEY", "NAME", "simulate"]

ACTIONS = ("view", "like", "purchase")
MIN_EVENTS = 2_000
EVENTS_A_USER = 94
TOLERANCE = 0.01
BLOCK_USERS = 8_192
SPAN_EVENTS = 1_000_000
PART_EVENTS = 10_000_000
ROW_GROUP = 131_072
# Ids have too many values for a dictionary, and times that only grow have small differences.
ENCODINGS = dict.fromkeys(("user_id", "item_id", "event_ts"), "DELTA_BINARY_PACKED")
SCHEMA = pa.schema(
    {"user_id": pa.int64(), "item_id": pa.int64(), "action": pa.string(), "event_ts": pa.int64()},
    metadata=target.metadata(ACTIONS),
)
BYTES_AN_EVENT = 20  # 13 of the spilled views and 7 of the finished log, both there at the end


def simulate(out: Path, *, num_events: int = 200_000, seed: int = 7, progress: bool = False) -> dict[str, Any]:
    """Write about `num_events` events to `out` and titles beside them; return figures of the log.

    An `out` that ends in .parquet is one file; any other is a folder of part-00000.parquet, ..., each a span of time of
    about ten million rows. Titles of all items (item_id, title) lie beside the first: `<its stem>.catalogue.parquet`.
    Columns: user_id int64, item_id int64, action string, event_ts int64 ms UTC, in order of time; an exposure with
    several actions has a row for each. No user views an item twice. With `progress`, a terminal shows how far it is.
    Raises UserError below 2,000 events, for a place that holds anything else, and for a disk with too little space.
    """
    if num_events < MIN_EVENTS:
        raise UserError(
            f"a simulated log needs at least {MIN_EVENTS} events to be of use, got {num_events}; ask for more"
        )
    out = out.resolve()
    target.check(out, num_events * BYTES_AN_EVENT)
    num_files = 1 if target.is_file(out) else math.ceil(num_events / PART_EVENTS)
    names = target.file_names(out, num_files)
    world = make_world(np.random.default_rng([seed, 0]), num_events)
    with target.workplace(out) as work:
        (made := work / "log").mkdir()
        spans_a_file = math.ceil(num_events / num_files / SPAN_EVENTS)
        with closing(Spill(work / "views", num_files * spans_a_file)) as spill:
            num_users = _draw(world, spill, num_events, seed, progress)
            facts = _write(spill.spans(), [made / name for name in names], spans_a_file, num_events, progress)
        pq.write_table(catalogue_of(world), made / target.catalogue_name(names[0]), compression="zstd")
        target.publish(work, made, out)
    return facts | {"num_users": num_users, "files": names}


def _draw(world: World, spill: Spill, num_events: int, seed: int, progress: bool) -> int:
    """Draw users into the spill, block after block until their events suffice; return how many have views."""
    num_users, num_rows, block, users = 0, 0, 0, range(0)
    with _bar("drawing", num_events, progress) as bar:
        while (missing := num_events - num_rows) > TOLERANCE * num_events:
            block += 1
            users = range(users.stop, users.stop + min(BLOCK_USERS, math.ceil(missing / EVENTS_A_USER)))
            views = draw_views(world, np.random.default_rng([seed, block]), users)
            spill.add(views)
            num_users += int(np.count_nonzero(np.bincount(views.user - users.start)))
            num_rows += views.num_rows
            bar.update(views.num_rows)
    return num_users


def _write(
    spans: Iterator[Views], paths: list[Path], spans_a_file: int, num_events: int, progress: bool
) -> dict[str, Any]:
    """Write `spans_a_file` spans to each path; return figures of what was written."""
    num_views, num_rows, items, first, last = 0, 0, set[int](), END_MS, 0
    with _bar("writing", num_events, progress) as bar:
        for path in paths:
            with pq.ParquetWriter(
                path, SCHEMA, compression="zstd", use_dictionary=["action"], column_encoding=ENCODINGS
            ) as writer:
                for views in islice(spans, spans_a_file):
                    table = _rows(views)
                    writer.write_table(table, row_group_size=ROW_GROUP)
                    num_views, num_rows = num_views + len(views), num_rows + len(table)
                    items.update(np.unique(views.item).tolist())
                    first, last = int(views.time.min(initial=first)), int(views.time.max(initial=last))
                    bar.update(len(table))
    return {
        "num_rows": num_rows,
        "num_views": num_views,
        "num_items": len(items),
        "first_ts": first,
        "last_ts": last,
    }


def _rows(views: Views) -> pa.Table:
    """Return the log of views: for each a row, then its like and purchase rows."""
    liked, bought = views.reaction & LIKED != 0, views.reaction & BOUGHT != 0
    num_rows = 1 + liked.astype(np.int64) + bought
    exposure = np.repeat(np.arange(len(views)), num_rows)
    action = np.zeros(len(exposure), np.int8)
    last = num_rows.cumsum() - 1
    action[last[liked] - bought[liked]] = 1
    action[last[bought]] = 2
    columns = {
        "user_id": views.user[exposure] + 1,
        "item_id": views.item[exposure] + FIRST_ITEM_ID,
        "action": pa.array(ACTIONS).take(pa.array(action)),
        "event_ts": views.time[exposure],
    }
    return pa.table(columns, schema=SCHEMA)


def _bar(label: str, num_events: int, progress: bool) -> "tqdm[NoReturn]":
    disable = None if progress else True
    return tqdm(desc=label, total=num_events, unit="event", unit_scale=True, disable=disable, leave=False)

"""A synthetic interaction log for offline use: the paper's kind of stream, whose vocabulary grows and tastes drift.

Invariant: the log is a function of (num_events, seed) alone and ends at a fixed date.

What there is to learn: topics have Dirichlet-process (stick-breaking) weights; each topic's items form a series in
order of their birth, and new items are born all the time. A session follows one topic, mostly to the next unseen items
of its series, so the item before tells the next one. A later session continues where the user left that topic, so older
history counts too; a long pause means another topic, so times count. A user's topics shift from session to session. One
view in six is a detour to whatever is popular. Likes and purchases follow a hidden affinity of user and topic.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr_platform.errors import UserError

NAME = "simulated"
ACTIONS = ("view", "like", "purchase")
END_MS = 1_782_777_600_000  # 2026-06-30T00:00:00Z
SPAN_MS = 180 * 86_400_000
HOUR_MS = 3_600_000
FIRST_ITEM_ID = 1001
MIN_VIEWS, MAX_VIEWS = 5, 300
DETOURS = 1 / 6
METADATA_KEY = b"gr_platform.declaration"


@dataclass(frozen=True, slots=True, kw_only=True)
class _World:
    """The fixed part. topic_of, born, quality, [items]; series int64 [topics, longest series] of items, -1 = none."""

    topic_of: np.ndarray
    born: np.ndarray
    quality: np.ndarray
    series: np.ndarray
    topic_weights: np.ndarray


@dataclass(slots=True, kw_only=True)
class _Walk:
    """The users' state while their views are drawn, all [users] or [users, topics]."""

    taste: np.ndarray
    place: np.ndarray
    topic: np.ndarray
    time: np.ndarray
    alive: np.ndarray


def simulate(out: Path, *, num_events: int = 200_000, seed: int = 7) -> dict[str, Any]:
    """Write about `num_events` events to the Parquet file `out` and titles beside it; return figures of the log.

    Columns: user_id int64, item_id int64, action string, event_ts int64 ms UTC, in order of time; an exposure with
    several actions has a row for each. No user views an item twice. `<out stem>.catalogue.parquet` holds
    item_id and title.
    Raises UserError below 2,000 events, and where `out` is a folder.
    """
    if num_events < 2_000:
        raise UserError(f"a simulated log needs at least 2000 events to be of use, got {num_events}; ask for more")
    if out.is_dir():
        raise UserError(f"{out.name} is a folder; name the file to write, for example {out.name}/log.parquet")
    rng = np.random.default_rng(seed)
    num_users = max(20, num_events // 92)
    world = _make_world(rng, num_items=int(np.clip(1_500 * (num_events / 200_000) ** 0.5, 200, 20_000)))
    users, items, times, affinity = _draw_views(rng, world, num_users)
    table = _with_reactions(rng, world, users, items, times, affinity)
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, out, compression="zstd")
    pq.write_table(_catalogue(world), out.with_suffix(".catalogue.parquet"), compression="zstd")
    return {
        "num_rows": table.num_rows,
        "num_views": len(users),
        "num_users": len(np.unique(users)),
        "num_items": len(np.unique(items)),
        "first_ts": int(times.min()),
        "last_ts": int(times.max()),
    }


def _make_world(rng: np.random.Generator, *, num_items: int) -> _World:
    num_topics = max(8, num_items // 30)
    sticks = rng.beta(1, num_topics / 4, num_topics)
    weights = sticks * np.concatenate([[1.0], np.cumprod(1 - sticks)[:-1]])
    weights = 0.5 * weights / weights.sum() + 0.5 / num_topics
    topic_of = rng.choice(num_topics, num_items, p=weights)
    # A Chinese restaurant process opens tables ever more slowly: births are dense at first and never stop.
    born = np.sort(np.where(rng.random(num_items) < 0.4, 0.0, rng.random(num_items) ** 1.5))
    born_ms = (END_MS - SPAN_MS + born * 0.95 * SPAN_MS).astype(np.int64)
    members = [np.flatnonzero(topic_of == topic) for topic in range(num_topics)]
    series = np.full((num_topics, max(map(len, members))), -1, np.int64)
    for topic, row in enumerate(members):
        series[topic, : len(row)] = row
    return _World(
        topic_of=topic_of, born=born_ms, quality=rng.normal(size=num_items), series=series, topic_weights=weights
    )


def _draw_views(
    rng: np.random.Generator, world: _World, num_users: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return users, items, times [V] of all views, and the affinity [users, topics] that reactions follow."""
    num_topics = len(world.series)
    logits = np.log(world.topic_weights) + 1.8 * rng.normal(size=(num_users, num_topics))
    arrival = END_MS - SPAN_MS + rng.random(num_users) ** 1.3 * 0.8 * SPAN_MS
    goal = np.clip(MIN_VIEWS + 1 + rng.lognormal(4.1, 0.85, num_users), 5, MAX_VIEWS).astype(np.int64)
    gap_ms = (END_MS - arrival) / (goal / 7 + 1)  # about seven views a session, over the rest of the span
    place = np.floor(rng.random((num_users, num_topics)) * (world.series >= 0).sum(1)).astype(np.int64)
    walk = _Walk(
        taste=logits,
        place=place,
        topic=np.zeros(num_users, np.int64),
        time=arrival.astype(np.int64),
        alive=np.ones(num_users, bool),
    )
    seen = np.zeros((num_users, len(world.topic_of)), bool)
    appeal = np.cumsum(np.exp(1.3 * world.quality))
    views = []
    for step in range(MAX_VIEWS):
        walk.alive &= step < goal
        _advance_time(rng, walk, gap_ms, first=step == 0)
        rows = np.flatnonzero(walk.alive)
        if not len(rows):
            break
        detours = np.searchsorted(appeal, rng.random(len(rows)) * appeal[-1])
        usable = (rng.random(len(rows)) < DETOURS) & ~seen[rows, detours] & (world.born[detours] <= walk.time[rows])
        items = np.where(usable, detours, -1)
        items[~usable] = _next_items(rng, world, walk, seen, rows[~usable])
        rows, items = rows[items >= 0], items[items >= 0]
        seen[rows, items] = True
        views.append((rows, items, walk.time[rows]))
    users, items, times = (np.concatenate(parts) for parts in zip(*views, strict=True))
    kept = np.bincount(users, minlength=num_users)[users] >= MIN_VIEWS
    users, items, times = users[kept], items[kept], times[kept]
    return users, items, times, 0.8 * (logits - logits.mean(1, keepdims=True)) / logits.std(1, keepdims=True)


def _advance_time(rng: np.random.Generator, walk: _Walk, gap_ms: np.ndarray, *, first: bool) -> None:
    """Move every user to the next view: minutes inside a session, days (and another topic) between sessions."""
    num_users, num_topics = walk.taste.shape
    new_session: np.ndarray = np.logical_or(rng.random(num_users) < 1 / 7, first)
    pause = 4 * HOUR_MS + rng.exponential(1.0, num_users) * np.maximum(gap_ms - 4 * HOUR_MS, HOUR_MS)
    minutes = rng.lognormal(0.5, 0.8, num_users) * 60_000
    walk.time = walk.time + np.where(new_session, 0 if first else pause, minutes).astype(np.int64)
    walk.alive &= walk.time < END_MS
    drift = rng.normal(scale=0.35, size=(num_users, num_topics))
    walk.taste = np.where(new_session[:, None], walk.taste + drift, walk.taste)
    wish = walk.taste + rng.gumbel(size=walk.taste.shape)
    wish[np.arange(num_users), walk.topic] = -np.inf  # a new session is about another topic
    walk.topic = np.where(new_session, wish.argmax(1), walk.topic)


def _next_items(rng: np.random.Generator, world: _World, walk: _Walk, seen: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the item [rows] that each user views next, or -1 where the topic holds no unseen item yet."""
    series = world.series[walk.topic[rows]]
    open_ = (series >= 0) & ~seen[rows[:, None], series] & (world.born[series] <= walk.time[rows, None])
    length = (series >= 0).sum(1, keepdims=True)
    ahead = (np.arange(series.shape[1]) - walk.place[rows, walk.topic[rows], None] - 1) % np.maximum(length, 1)
    # Among the unseen items the nearest ahead is by far the likeliest; better items are likelier to be jumped to.
    rank = np.where(open_, ahead, series.shape[1]).argsort(1, kind="stable").argsort(1, kind="stable")
    logits = np.maximum(-0.6 * rank, -4.5 + 0.8 * world.quality[series])
    chosen = np.where(open_, logits + rng.gumbel(size=logits.shape), -np.inf).argmax(1)
    found = open_[np.arange(len(rows)), chosen]
    walk.place[rows[found], walk.topic[rows[found]]] = chosen[found]
    return np.where(found, series[np.arange(len(rows)), chosen], -1)


def _with_reactions(
    rng: np.random.Generator,
    world: _World,
    users: np.ndarray,
    items: np.ndarray,
    times: np.ndarray,
    affinity: np.ndarray,
) -> pa.Table:
    """Return the log: a view row for each exposure, then its like and purchase rows, all in order of time."""
    taste, quality = affinity[users, world.topic_of[items]], world.quality[items]
    liked = rng.random(len(users)) < _sigmoid(-3.3 + 1.6 * taste + 0.7 * quality)
    bought = rng.random(len(users)) < _sigmoid(-5.2 + 1.2 * taste + 0.4 * quality + 1.8 * liked)
    exposure = np.concatenate([np.arange(len(users)), np.flatnonzero(liked), np.flatnonzero(bought)])
    action = np.repeat(np.arange(3), [len(users), liked.sum(), bought.sum()])
    order = np.lexsort((action, exposure, times[exposure]))
    exposure, action = exposure[order], action[order]
    metadata = {"name": NAME, "exclude_seen": "all", "actions": list(ACTIONS)}
    return pa.table(
        {
            "user_id": users[exposure] + 1,
            "item_id": items[exposure] + FIRST_ITEM_ID,
            "action": pa.array(ACTIONS).take(pa.array(action)),
            "event_ts": times[exposure],
        }
    ).replace_schema_metadata({METADATA_KEY: json.dumps(metadata).encode()})


def _catalogue(world: _World) -> pa.Table:
    number = np.empty(len(world.topic_of), np.int64)
    for row in world.series:
        number[row[row >= 0]] = np.arange(1, (row >= 0).sum() + 1)
    titles = [f"Topic {topic + 1}, part {part}" for topic, part in zip(world.topic_of, number, strict=True)]
    return pa.table({"item_id": np.arange(len(number)) + FIRST_ITEM_ID, "title": titles})


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))

"""A block of users walks through the world: which views there are, when, and what comes of them.

Invariant: a block is a function of the world and its own random generator; no user views an item twice.

Legend: B users of the block, K genres, V views, M users who still view at a step (the first M of the block).
"""

from dataclasses import dataclass

import numpy as np

from gr_platform.events.simulator.world import DAY_MS, END_MS, LEAP_STEPS, NUM_DAYS, PLACES, START_MS, World

HOUR_MS = 3_600_000
MIN_VIEWS, MAX_VIEWS = 5, 300
VIEWS_A_SESSION = 7
DETOURS = 1 / 6
LEAPS = 0.25
LIKED, BOUGHT = 1, 2
_FIRST = np.array([(1 << places) - 1 for places in range(PLACES + 1)], np.uint64)
_NONE, _ONE, _TURN, _LAST = np.uint64(0), np.uint64(1), np.uint64(PLACES), np.uint64(PLACES - 1)
_ALL_BITS = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """Views of a block: user int64 (from 0), item int32, time int64 ms, reaction uint8 (LIKED | BOUGHT), all [V]."""

    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    reaction: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    @property
    def num_rows(self) -> int:
        """Rows of the log: a view and its reactions are one each."""
        return len(self) + int(np.bitwise_count(self.reaction).sum())


class Walk:
    """The users of a block, busiest first, and what they have seen. All arrays [B] or [B, K]."""

    def __init__(self, world: World, rng: np.random.Generator, num_users: int) -> None:
        self.world, self.rng = world, rng
        goal = np.clip(MIN_VIEWS + 1 + rng.lognormal(4.1, 0.85, num_users), 5, MAX_VIEWS).astype(np.int64)
        self.user = np.argsort(-goal, kind="stable")
        self.goal = goal[self.user]
        self.time = (START_MS + rng.random(num_users) ** 1.3 * 0.8 * (END_MS - START_MS)).astype(np.int64)
        # Sessions spread over the rest of the span.
        self.gap_ms = (END_MS - self.time) / (self.goal / VIEWS_A_SESSION + 1)
        num_genres = len(world.genre_start) - 1
        shape, width = (num_users, num_genres), np.diff(world.genre_start)
        self.topic = (world.genre_start[:-1] + rng.random(shape, dtype=np.float32) * width).astype(np.int32)
        taste = np.log(world.weight, dtype=np.float32)[self.topic] + 1.8 * rng.standard_normal(shape, dtype=np.float32)
        self.affinity = 0.8 * (taste - taste.mean(1, keepdims=True)) / taste.std(1, keepdims=True)
        self.pull = np.exp(taste - taste.max(1, keepdims=True))
        length = world.num_born[:, -1][self.topic]
        self.place = (rng.random(shape, dtype=np.float32) * length).astype(np.uint8).reshape(-1)
        self.seen = np.zeros(num_users * num_genres, np.uint64)
        self.genre = np.zeros(num_users, np.int64)
        self.born = np.zeros(num_users, np.uint64)

    def advance(self, num: int, *, first: bool) -> None:
        """Bring `num` users to their next view: minutes inside a session, days (and another topic) between sessions."""
        rng = self.rng
        new = rng.random(num, dtype=np.float32) < 1 / VIEWS_A_SESSION
        rows = np.arange(num) if first else np.flatnonzero(new)
        wait = np.exp(np.float32(0.5) + np.float32(0.8) * rng.standard_normal(num, dtype=np.float32)) * 60_000
        pause = rng.standard_exponential(len(rows)) * np.maximum(self.gap_ms[rows] - 4 * HOUR_MS, HOUR_MS)
        wait[rows] = 0
        self.time[:num] += wait.astype(np.int64)
        if not first:
            self.time[rows] += (4 * HOUR_MS + pause).astype(np.int64)
        rows = rows[self.time[rows] < END_MS]
        self.genre[rows] = genre = self._choose_genre(rows, first=first)
        topic = self.topic[rows, genre]
        self.born[rows] = _FIRST[self.world.num_born[topic, (self.time[rows] - START_MS) // DAY_MS]]

    def _choose_genre(self, rows: np.ndarray, *, first: bool) -> np.ndarray:
        """Let the tastes of `rows` drift and return a genre for each, another than that of the session before."""
        pull = self.pull[rows]
        if not first:
            pull *= np.exp(np.float32(0.35) * self.rng.standard_normal(pull.shape, dtype=np.float32))
            self.pull[rows] = pull
            pull[np.arange(len(rows)), self.genre[rows]] = 0
        running = pull.cumsum(1)
        drawn = self.rng.random(len(rows), dtype=np.float32) * running[:, -1]
        return np.minimum(np.count_nonzero(running <= drawn[:, None], axis=1), running.shape[1] - 1)

    def view(self, num: int, detours: np.ndarray) -> np.ndarray:
        """Return the item that each of `num` users views, -1 = none: its usable detour [M], else one of its series."""
        world, num_genres = self.world, self.topic.shape[1]
        cell = np.arange(0, num * num_genres, num_genres) + self.genre[:num]
        rows, away, away_bit = self._usable(detours)
        open_ = self.born[:num] & ~self.seen.take(cell)
        open_[rows] = 0
        open_[self.time[:num] >= END_MS] = 0
        topic, before = self.topic.reshape(-1).take(cell), self.place.take(cell)
        place = np.where(open_ != 0, self._next_place(open_, before, topic), before)
        self.place[cell] = place
        items = np.where(open_ != 0, world.item_at[topic, place], -1)
        bit = np.where(open_ != 0, _ONE << place.astype(np.uint64), _NONE)
        items[rows], cell[rows], bit[rows] = detours[rows], away, away_bit
        self.seen[cell] |= bit
        return items

    def _usable(self, detours: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return who makes a detour, and the cell and bit of `seen` it sets: none where another topic is followed."""
        world, rows = self.world, np.flatnonzero(detours >= 0)
        items = detours[rows]
        genre, day = world.genre[world.topic[items]], (self.time[rows] - START_MS) // DAY_MS
        followed = self.topic[rows, genre] == world.topic[items]
        bit = np.where(followed, _ONE << world.place[items].astype(np.uint64), _NONE)
        cell = rows * self.topic.shape[1] + genre
        usable = (world.birth[items] <= day) & (day < NUM_DAYS) & (self.seen[cell] & bit == 0)
        return rows[usable], cell[usable], bit[usable]

    def _next_place(self, open_: np.ndarray, place: np.ndarray, topic: np.ndarray) -> np.ndarray:
        """Return the place [M] of the next item: an open one shortly ahead, or a leap to one of quality."""
        rng, num = self.rng, len(open_)
        turn = (place.astype(np.uint64) + _ONE) & _LAST
        ahead = (open_ >> turn) | (open_ << (_TURN - turn))
        # Each open item is taken with a chance of 7 in 16, so the nearest ahead is by far the likeliest.
        coin = rng.integers(0, _ALL_BITS, (4, num), np.uint64, endpoint=True)
        taken = ahead & coin[0] & (coin[1] | coin[2] | coin[3])
        taken = np.where(taken, taken, ahead)
        nearest = np.bitwise_count((taken & (~taken + _ONE)) - _ONE)
        place = ((nearest + turn) & _LAST).astype(np.uint8)
        rows = np.flatnonzero(rng.random(num, dtype=np.float32) < LEAPS)
        leap = self.world.leap[topic[rows], rng.integers(0, LEAP_STEPS, len(rows), np.uint8, endpoint=False)]
        usable = (open_[rows] >> leap.astype(np.uint64)) & _ONE != 0
        place[rows[usable]] = leap[usable]
        return place


def draw_views(world: World, rng: np.random.Generator, users: range) -> Views:
    """Return the views of a block of users, in no order of use; users of too few views have none."""
    num_users = len(users)
    walk = Walk(world, rng, num_users)
    alive = num_users - np.searchsorted(walk.goal[::-1], np.arange(walk.goal[0]), side="right")
    first = np.cumsum(alive) - alive
    detours = _draw_detours(world, rng, alive, first)
    parts = []
    for step, num in enumerate(alive):
        walk.advance(num, first=step == 0)
        items = walk.view(num, detours[first[step] : first[step] + num])
        rows = np.flatnonzero(items >= 0)
        parts.append((rows, items[rows], walk.time[rows]))
    rows, items, times = (np.concatenate(part) for part in zip(*parts, strict=True))
    kept = np.bincount(rows, minlength=num_users)[rows] >= MIN_VIEWS
    rows, items, times = rows[kept], items[kept], times[kept]
    taste = walk.affinity[rows, world.genre[world.topic[items]]]
    return Views(
        user=users.start + walk.user[rows], item=items, time=times, reaction=_react(rng, taste, world.quality[items])
    )


def _draw_detours(world: World, rng: np.random.Generator, alive: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return for each user of each step a popular item or -1, no item twice for a user; step s begins at first[s]."""
    detours = np.full(alive.sum(), -1, np.int32)
    spots = np.flatnonzero(rng.random(len(detours), dtype=np.float32) < DETOURS)
    items = np.searchsorted(world.appeal, rng.random(len(spots)) * world.appeal[-1])
    users = spots - first[np.searchsorted(first, spots, side="right") - 1]
    _, once = np.unique(users * world.num_items + items, return_index=True)
    detours[spots[once]] = items[once]
    return detours


def _react(rng: np.random.Generator, taste: np.ndarray, quality: np.ndarray) -> np.ndarray:
    liked = rng.random(len(taste), dtype=np.float32) < _sigmoid(-3.3 + 1.6 * taste + 0.7 * quality)
    bought = rng.random(len(taste), dtype=np.float32) < _sigmoid(-5.2 + 1.2 * taste + 0.4 * quality + 1.8 * liked)
    return liked * np.uint8(LIKED) + bought * np.uint8(BOUGHT)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))

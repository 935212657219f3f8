"""What all users of a simulated log meet: topics, the items of their series, and how popular those are.

Invariant: a topic has at most PLACES items, so that which of them a user has seen is one 64-bit word; the items of a
topic lie in order of birth, so those born by a day are the first few of its places.

Legend: I items, T topics, K genres.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

END_MS = 1_782_777_600_000  # 2026-06-30T00:00:00Z
DAY_MS = 86_400_000
NUM_DAYS = 180
START_MS = END_MS - NUM_DAYS * DAY_MS
FIRST_ITEM_ID = 1001
PLACES = 64
MAX_GENRES = 50
LEAP_STEPS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Items in order of birth: topic int32, place uint8 in its topic, birth (a day) int16, quality float32, all [I].

    appeal: running sum [I] of the weights of detours. item_at int32 [T, PLACES], -1 = none; num_born uint8
    [T, NUM_DAYS]; leap uint8 [T, LEAP_STEPS]: places, each as often as its item's quality deserves; weight [T].
    genre int32 [T]; genre_start int64 [K + 1]: a genre is a run of topics, of which a user follows one.
    """

    topic: np.ndarray
    place: np.ndarray
    birth: np.ndarray
    quality: np.ndarray
    appeal: np.ndarray
    item_at: np.ndarray
    num_born: np.ndarray
    leap: np.ndarray
    weight: np.ndarray
    genre: np.ndarray
    genre_start: np.ndarray

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return len(self.topic)


def make_world(rng: np.random.Generator, num_events: int) -> World:
    """Return the world of a log of that size: the catalogue grows more slowly than the log."""
    size = num_events / 200_000
    num_items = max(200, int(1_500 * size ** (0.5 if size < 1 else 0.6)))
    num_topics = max(8, num_items // 30)
    sticks = rng.beta(1, num_topics / 4, num_topics)
    weight = sticks * np.concatenate([[1.0], np.cumprod(1 - sticks)[:-1]])
    weight = 0.5 * weight / weight.sum() + 0.5 / num_topics
    topic, place = _places(rng, num_items, weight)
    # A Chinese restaurant process opens tables ever more slowly: births are dense at first and never stop.
    born = np.sort(np.where(rng.random(num_items) < 0.4, 0.0, rng.random(num_items) ** 1.5))
    birth = np.ceil(born * 0.95 * NUM_DAYS).astype(np.int16)
    quality = rng.standard_normal(num_items, dtype=np.float32)
    item_at = np.full((num_topics, PLACES), -1, np.int32)
    item_at[topic, place] = np.arange(num_items)
    births = np.zeros((num_topics, NUM_DAYS), np.uint8)
    np.add.at(births, (topic, birth), 1)
    genre_start = np.arange(min(MAX_GENRES, num_topics) + 1) * num_topics // min(MAX_GENRES, num_topics)
    return World(
        topic=topic,
        place=place,
        birth=birth,
        quality=quality,
        appeal=np.cumsum(np.exp(1.3 * quality.astype(np.float64))),
        item_at=item_at,
        num_born=births.cumsum(1, dtype=np.uint8),
        leap=_leaps(item_at, quality),
        weight=weight,
        genre=np.repeat(np.arange(len(genre_start) - 1, dtype=np.int32), np.diff(genre_start)),
        genre_start=genre_start,
    )


def catalogue_of(world: World) -> pa.Table:
    """Return item_id and title of each item."""
    titles = [f"Topic {topic + 1}, part {place + 1}" for topic, place in zip(world.topic, world.place, strict=True)]
    return pa.table({"item_id": np.arange(world.num_items) + FIRST_ITEM_ID, "title": titles})


def _places(rng: np.random.Generator, num_items: int, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each item's topic and place [I]; items that find their topic full draw another."""
    topic = rng.choice(len(weight), num_items, p=weight)
    while True:
        order = topic.argsort(kind="stable")
        sizes = np.bincount(topic, minlength=len(weight))
        place = np.empty(num_items, np.int64)
        place[order] = np.arange(num_items) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        crowded = np.flatnonzero(place >= PLACES)
        if not len(crowded):
            return topic.astype(np.int32), place.astype(np.uint8)
        room = np.where(sizes < PLACES, weight, 0.0)
        topic[crowded] = rng.choice(len(weight), len(crowded), p=room / room.sum())


def _leaps(item_at: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Return places [T, LEAP_STEPS] in the shares of exp(0.8 quality)."""
    steps = (np.arange(LEAP_STEPS) + 0.5) / LEAP_STEPS
    leap = np.zeros((len(item_at), LEAP_STEPS), np.uint8)
    for topic, items in enumerate(item_at):
        share = np.cumsum(np.exp(0.8 * quality[items[items >= 0]]))
        leap[topic] = np.searchsorted(share, steps * share[-1]) if len(share) else 0
    return leap

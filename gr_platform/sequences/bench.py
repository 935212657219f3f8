"""`gr bench reader`: how many tokens a second the reader turns from warm files into batches.

Invariant: files are made up (seeded) in one folder, read once before the clock starts, and deleted at the end; a token
counts where a batch holds it, and what a thinned batch dropped counts apart.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gr_platform import settings
from gr_platform.events.declaration import Declaration
from gr_platform.models.config import StochasticLength
from gr_platform.sequences.dataset import LISTS, SequenceDataset, read_segment
from gr_platform.sequences.exposures import MAX_BATCH_EVENTS, MAX_BATCH_USERS, write_segment
from gr_platform.sequences.reader import Reader, ReaderConfig
from gr_platform.sequences.vocabulary import Vocabulary
from gr_platform.sequences.window import window_starts
from gr_platform.training.seeds import generator

NUM_USERS, MEDIAN_LENGTH, SIGMA, MAX_LENGTH = 1_000_000, 62, 1.0, 1024
NUM_DAYS, DAY_USERS, DAY_LENGTH = 8, 0.05, 4
BATCH_USERS, BATCH_TOKENS = 128, 1 << 14
NUM_ITEMS, NUM_ACTIONS, START_MS, GAP_MS = 100_000, 5, 1_000_000_000_000, 3_600_000
DAY_MS = MAX_BATCH_EVENTS * GAP_MS  # later than all that came before
THINNED = StochasticLength(alpha=1.6)
SECONDS, TARGET = 3.0, 20e6
SCHEMA = pa.schema(
    [("user_id", pa.int64()), ("replaces", pa.bool_()), *((n, pa.large_list(pa.int64())) for n in LISTS)]
)
Row = dict[str, Any]


def run(_: int, num_users: int = NUM_USERS, seconds: float = SECONDS) -> list[Row]:
    """Return rows of tokens a second for each way to cut and thin, of one segment and of days on top of it."""
    home = settings.home()
    home.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory(dir=home, prefix=".bench-") as name:
        folders = _write(Path(name), num_users)
        for segments, label in ((folders[:1], ""), (folders, f", {NUM_DAYS} days on top")):
            dataset = _warm(segments)
            for cut in ({"batch_size": BATCH_USERS}, {"max_tokens": BATCH_TOKENS}):
                for thinning in (StochasticLength(), THINNED):
                    rows += _measured(dataset, label, seconds, cut, thinning)
    return rows


def _measured(
    dataset: SequenceDataset, label: str, seconds: float, cut: dict[str, int], thinning: StochasticLength
) -> list[Row]:
    """Return the rows of one way to read, stopped after `seconds` or an epoch."""
    config = ReaderConfig(
        seed=1,
        batch_size=cut.get("batch_size"),
        max_tokens=cut.get("max_tokens"),
        max_length=MAX_LENGTH,
        stochastic_length=thinning,
    )
    starts = window_starts(dataset.lengths, MAX_LENGTH, 1)
    reader = Reader(dataset, np.arange(dataset.num_users), starts, dataset.lengths, config)
    begin = time.perf_counter()
    tokens = whole = 0
    spans = dataset.lengths - starts
    planned = None
    for batch in reader.read(0):
        planned = planned or time.perf_counter()
        tokens += len(batch.rows) + len(batch.events.items)
        whole += len(batch.rows) + int(spans[batch.rows].sum())
        if time.perf_counter() - planned > seconds:
            break
    taken = time.perf_counter() - (planned or begin)
    name = f"reader, {_named(cut)}{label}"
    row = {"unit": "tokens/s", "against": None, "target": None, "num_exposures": dataset.num_exposures}
    if thinning.alpha == 2:
        plan = {"name": f"{name}: plan of an epoch", "value": (planned or begin) - begin, "unit": "s"}
        return [row | {"name": name, "value": tokens / taken, "target": TARGET}, row | plan]
    return [
        row | {"name": f"{name}, thinned: read", "value": whole / taken, "target": TARGET},
        row | {"name": f"{name}, thinned: kept", "value": tokens / taken},
    ]


def _named(cut: dict[str, int]) -> str:
    return f"{cut['batch_size']} users a batch" if "batch_size" in cut else f"{cut['max_tokens']:,} tokens a batch"


def _warm(folders: list[Path]) -> SequenceDataset:
    """Return the data set of segments whose every page was touched."""
    tables = [read_segment(folder) for folder in folders]
    for table in tables:
        for name in LISTS:
            for chunk in table[name].chunks:
                chunk.values.to_numpy().sum()
    ids = pa.array(np.arange(NUM_ITEMS))
    counts = {name: pa.array(np.ones(NUM_ITEMS, np.int64)) for name in ("count", "first_ts", "last_ts")}
    vocabulary = Vocabulary(pa.table({"item_id": ids, **counts, "active": pa.array(np.ones(NUM_ITEMS, bool))}))
    actions = tuple(f"action_{index}" for index in range(NUM_ACTIONS))
    return SequenceDataset(tables, Declaration(name="bench", actions=actions, positives=actions), vocabulary, "bench")


def _write(folder: Path, num_users: int) -> list[Path]:
    """Write a base and NUM_DAYS segments that append to some users each; return their folders."""
    rng = generator(0, "bench reader")
    drawn = np.exp(rng.normal(np.log(MEDIAN_LENGTH), SIGMA, num_users)).astype(np.int64)
    sizes = [(np.arange(num_users), np.clip(drawn, 2, 8 * MAX_LENGTH))]
    for _ in range(NUM_DAYS):
        users = np.flatnonzero(rng.random(num_users) < DAY_USERS)
        sizes.append((users, rng.integers(1, 2 * DAY_LENGTH, len(users))))
    folders = []
    for day, (users, lengths) in enumerate(sizes):
        folders.append(folder / f"segment-{day}")
        folders[-1].mkdir()
        write_segment(folders[-1], _batches(users, lengths, START_MS + day * DAY_MS, rng), SCHEMA)
    return folders


def _batches(
    users: np.ndarray, lengths: np.ndarray, start_ms: int, rng: np.random.Generator
) -> Iterator[pa.RecordBatch]:
    """Yield record batches of the sizes that sequences have on disk."""
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    first = 0
    while first < len(users):
        full = int(np.searchsorted(total, total[first] + MAX_BATCH_EVENTS))
        last = min(first + MAX_BATCH_USERS, max(full, first + 1), len(users))
        offsets = total[first : last + 1] - total[first]
        num = int(offsets[-1])
        made = {
            "items": rng.integers(1, NUM_ITEMS, num),
            "actions": 1 << rng.integers(0, NUM_ACTIONS, num),
            "times": start_ms + np.cumsum(rng.integers(0, GAP_MS, num)),
        }
        lists = [pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(made[name])) for name in LISTS]
        flags = pa.array(np.zeros(last - first, bool))
        yield pa.RecordBatch.from_arrays([pa.array(users[first:last]), flags, *lists], schema=SCHEMA)
        first = last

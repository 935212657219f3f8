"""A synthetic stream whose vocabulary is not stationary: a Dirichlet process over categories, items that appear.

Invariant: a function of its `Stream` alone; record r knows no item that appears after it.

A record is the sequence of one user. Records come in order of time. Each has a few categories of its own, a prior over
them and a concentration: position n takes a category anew from the prior with probability c / (c + n), else repeats the
category of an earlier position (so the richer a category, the more of it follows: the *intensity* of a taste tells what
comes next). Which categories are common drifts along the stream. The item is drawn evenly from the items of the
category that have appeared: a part of the vocabulary is there from the start, the rest appears at an even pace.

Legend: R records, n positions of a record, K categories of a record, I items, C categories.
Source: PAPER section 6 names the stream; its parameters are ours.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr_platform import storage
from gr_platform.events.declaration import Declaration
from gr_platform.sequences import vocabulary as vocabularies
from gr_platform.sequences.dataset import FILE, SequenceDataset, read_segment
from gr_platform.sequences.splits import Holdout, Targets
from gr_platform.sequences.vocabulary import NUM_OOV, Vocabulary
from gr_platform.training.seeds import generator

GENERATOR_VERSION = 1
START_MS, RECORD_MS, STEP_MS = 1_700_000_000_000, 1_000, 60_000
BLOCK_RECORDS = 4_096
DECLARATION = Declaration(name="drifting", actions=("view",), positives=("view",), exclude_seen="none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """initial: share of the vocabulary that is there from the start. drift: by how many standard deviations a
    category's log popularity moves from one end of the stream to the other. test: share of records at the end."""

    num_records: int = 200_000
    length: int = 128
    num_items: int = 20_000
    num_categories: int = 400
    categories_a_record: int = 5
    max_concentration: float = 500.0
    initial: float = 0.4
    drift: float = 2.0
    test: float = 0.1
    seed: int = 1


def digest(stream: Stream) -> str:
    """Return the digest of a stream's sequences, made or not."""
    return storage.digest_of(_spec(stream))


def load(parent: Path, stream: Stream) -> SequenceDataset:
    """Return the sequences of a stream, a record a user in order of time, writing them into `parent` at first."""
    made = storage.ensure(parent, "drifting_stream", _spec(stream), lambda folder: _write(folder, stream))
    return SequenceDataset(
        [read_segment(made.folder)], DECLARATION, Vocabulary.load(made.folder / vocabularies.FILE), digest(stream)
    )


def holdout(stream: Stream) -> Holdout:
    """Return the split of a single pass: all of the first records trained on, the last item of each other one asked."""
    num_trained = stream.num_records - round(stream.test * stream.num_records)
    ends = np.where(np.arange(stream.num_records) < num_trained, stream.length, 0)
    rows = np.arange(num_trained, stream.num_records)
    last = np.full(len(rows), stream.length - 1)
    return Holdout(name="stream", ends=ends, targets=Targets(rows=rows, positions=last, known=last))


def records(stream: Stream) -> Iterator[np.ndarray]:
    """Yield the items int64 [records, length], 0 the first to appear, of one block of records after the other."""
    rng = generator(stream.seed, "categories")
    items = np.arange(stream.num_items)
    category = rng.permutation(items % stream.num_categories)
    by_category = np.argsort(category, kind="stable")  # within a category in order of appearance
    starts = np.searchsorted(category[by_category], np.arange(stream.num_categories))
    ends = rng.standard_normal((2, stream.num_categories))
    for first in range(0, stream.num_records, BLOCK_RECORDS):
        block = np.arange(first, min(first + BLOCK_RECORDS, stream.num_records))
        own = generator(stream.seed, "records", first)
        age = block / stream.num_records
        known = (stream.num_items * (stream.initial + (1 - stream.initial) * age)).astype(np.int64)
        available = _available(category, known, stream.num_categories)
        taste = ends[0] + stream.drift * age[:, None] * ends[1]
        chosen = _categories(own, taste, stream)
        size = np.take_along_axis(available, chosen, 1)
        place = (own.random(chosen.shape) * size).astype(np.int64)
        yield by_category[starts[chosen] + place]


def _available(category: np.ndarray, known: np.ndarray, num_categories: int) -> np.ndarray:
    """Return how many items of each category the first `known` items hold, int64 [R, C]."""
    levels, at = np.unique(known, return_inverse=True)
    counts = np.stack([np.bincount(category[:level], minlength=num_categories) for level in levels])
    return counts[at]


def _categories(rng: np.random.Generator, taste: np.ndarray, stream: Stream) -> np.ndarray:
    """Return the category of each position, int64 [R, n]; taste [R, C] is the log popularity of categories."""
    num, n, k = len(taste), stream.length, stream.categories_a_record
    # Gumbel noise: the k largest are a weighted draw without replacement.
    own = np.argpartition(-(taste + rng.gumbel(size=taste.shape)), k - 1, axis=1)[:, :k]
    prior = rng.dirichlet(np.ones(k), num).cumsum(1)
    concentration = rng.uniform(1.0, stream.max_concentration, num)[:, None]
    fresh = rng.random((num, n)) < concentration / (concentration + np.arange(n))
    anew = np.minimum((rng.random((num, n, 1)) > prior[:, None, :]).sum(2), k - 1)
    earlier = (rng.random((num, n)) * np.arange(n)).astype(np.int64)
    picked = np.empty((num, n), np.int64)
    rows = np.arange(num)
    for position in range(n):
        repeated = picked[rows, earlier[:, position]] if position else anew[:, 0]
        picked[:, position] = np.where(fresh[:, position], anew[:, position], repeated)
    return np.take_along_axis(own, picked, 1)


def _spec(stream: Stream) -> dict[str, Any]:
    return {"stream": asdict(stream), "version": GENERATOR_VERSION, "declaration": DECLARATION.to_json()}


def _write(folder: Path, stream: Stream) -> dict[str, Any]:
    _write_vocabulary(folder, stream)
    as_lists = pa.large_list(pa.int64())
    schema = pa.schema({"user_id": pa.int64(), "items": as_lists, "actions": as_lists, "times": as_lists})
    first = 0
    with pa.OSFile(str(folder / FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for block in records(stream):
            ids = np.arange(first, first + len(block))
            offsets = pa.array(np.arange(len(block) + 1) * stream.length)
            times = START_MS + RECORD_MS * ids[:, None] + STEP_MS * np.arange(stream.length)
            values = (block + 1 + NUM_OOV, np.ones_like(block), times)
            lists = [pa.LargeListArray.from_arrays(offsets, pa.array(each.ravel())) for each in values]
            writer.write_batch(pa.RecordBatch.from_arrays([pa.array(ids), *lists], schema=schema))
            first += len(block)
    return {"num_records": stream.num_records, "num_events": stream.num_records * stream.length}


def _write_vocabulary(folder: Path, stream: Stream) -> None:
    nothing = np.zeros(stream.num_items, np.int64)
    columns = {"item_id": np.arange(stream.num_items), "count": nothing, "first_ts": nothing, "last_ts": nothing}
    table = pa.table(columns | {"active": np.ones(stream.num_items, bool)})
    pq.write_table(table, folder / vocabularies.FILE, compression="zstd")

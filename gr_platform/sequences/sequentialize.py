"""Clean events become one jagged sequence per user, streamed from a sorted query into Arrow IPC.

Invariant: rows of one (user, item, time) are one exposure with the union of their actions, and the order is total:
(user, event_ts, landed file, source row). Batch boundaries depend on content alone, so equal events give equal bytes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events.declaration import Declaration
from gr_platform.events.ingest import CleanEvents, clean_events
from gr_platform.sequences import vocabulary as vocabularies
from gr_platform.sequences.dataset import FILE, SequenceDataset
from gr_platform.sequences.splits import describe_targets

MAX_BATCH_USERS = 1 << 16
MAX_BATCH_EVENTS = 1 << 23
_STREAM_ROWS = 1 << 17

_SORTED = """
    SELECT user_id, index AS item, actions, event_ts
    FROM (
        SELECT user_id, item_id, event_ts, bit_or(mask) AS actions, min(source_file::BIGINT << 40 | source_row) AS place
        FROM events JOIN action_masks USING (action)
        GROUP BY user_id, item_id, event_ts
    ) JOIN vocabulary USING (item_id)
    ORDER BY user_id, event_ts, place
"""


def sequentialize(home: Path, ds: str) -> storage.Result:
    """Return the sequences of all ingested events over the current vocabulary, and make them current.

    File: one row per user, ascending: user_id; items (dense index), actions (bitmask), times (ms UTC) as
    large_list<int64>. Raises UserError if the vocabulary was built from other events.
    """
    events = clean_events(home, ds)
    parent = home / "sequences" / ds
    folder = storage.current(parent, "vocabulary")
    vocabulary = storage.read_manifest(folder)
    if vocabulary.spec["events"] != events.digest:
        raise UserError(f"the vocabulary is older than the events of {ds}; run the item_vocabulary stage first")
    spec = {
        "events": events.digest,
        "declaration": events.declaration.to_json(),
        "vocabulary": vocabulary.facts["vocabulary_digest"],
        "vocabulary_folder": folder.name,
    }
    result = storage.ensure(parent, "sequences", spec, lambda building: _build(building, events, folder))
    storage.point(parent, "sequences", result.folder)
    return result


def _build(folder: Path, events: CleanEvents, vocabulary_folder: Path) -> dict[str, Any]:
    ids = pq.read_table(vocabulary_folder / vocabularies.FILE, columns=["item_id"])
    index = pa.array(np.arange(len(ids), dtype=np.int64) + 1 + vocabularies.NUM_OOV)
    tables = {"vocabulary": ids.append_column("index", index), "action_masks": _action_masks(events.declaration)}
    with events.connect(**tables) as connection:
        stream = connection.sql(_SORTED).to_arrow_reader(_STREAM_ROWS)
        id_type = pa.int64() if events.declaration.user_id_type == "int64" else pa.string()
        schema = pa.schema([("user_id", id_type)] + [(name, pa.large_list(pa.int64())) for name in _LISTS])
        with pa.OSFile(str(folder / FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in _jagged(stream, schema):
                writer.write_batch(batch)
    return _facts(folder, events.declaration, vocabulary_folder)


_LISTS = ("items", "actions", "times")


def _action_masks(declaration: Declaration) -> pa.Table:
    masks = [1 << bit for bit in range(len(declaration.actions))]
    return pa.table({"action": list(declaration.actions), "mask": pa.array(masks, pa.int64())})


def _jagged(stream: pa.RecordBatchReader, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield record batches of whole users from exposures sorted by user, however the stream is cut."""
    pending: list[pa.RecordBatch] = []
    num_rows = 0
    for rows in stream:
        pending.append(rows)
        num_rows += len(rows)
        if num_rows >= MAX_BATCH_EVENTS:
            table = pa.Table.from_batches(pending).combine_chunks()
            done = 0
            for first, last in _cuts(_bounds(table), final=False):
                yield _batch(table, first, schema)
                done = last
            rest = table.slice(done)
            pending, num_rows = rest.to_batches(), len(rest)
    if num_rows:
        table = pa.Table.from_batches(pending).combine_chunks()
        for first, _ in _cuts(_bounds(table), final=True):
            yield _batch(table, first, schema)


def _bounds(table: pa.Table) -> np.ndarray:
    """Return the first row of each user and, last, the number of rows, int64 [users + 1]."""
    users = table["user_id"].combine_chunks()
    changed = pc.not_equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False)
    return np.concatenate([np.zeros(1, np.int64), np.flatnonzero(changed) + 1, np.array([len(users)], np.int64)])


def _cuts(bounds: np.ndarray, *, final: bool) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the bounds of each batch and the row it ends at.

    A batch closes with the user that brings it to MAX_BATCH_EVENTS, or with its MAX_BATCH_USERS-th. Unless `final`, the
    last user may go on in rows not read yet, so a batch that reaches it stays open.
    """
    first, num_users = 0, len(bounds) - 1
    while first < num_users:
        full = int(np.searchsorted(bounds, bounds[first] + MAX_BATCH_EVENTS))
        last = min(first + MAX_BATCH_USERS, full, num_users)
        if last == num_users and not final:
            return
        yield bounds[first : last + 1], int(bounds[last])
        first = last


def _batch(table: pa.Table, bounds: np.ndarray, schema: pa.Schema) -> pa.RecordBatch:
    span = table.slice(bounds[0], bounds[-1] - bounds[0]).combine_chunks()
    offsets = pa.array(bounds - bounds[0], pa.int64())
    columns = [span["user_id"].combine_chunks().take(offsets[:-1]).cast(schema.field("user_id").type)]
    for source in ("item", "actions", "event_ts"):
        values = span[source].combine_chunks().cast(pa.int64())
        columns.append(pa.LargeListArray.from_arrays(offsets, values))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _facts(folder: Path, declaration: Declaration, vocabulary_folder: Path) -> dict[str, Any]:
    vocabulary = vocabularies.Vocabulary.load(vocabulary_folder)
    table = pa.ipc.open_file(pa.memory_map(str(folder / FILE))).read_all()
    dataset = SequenceDataset(table, declaration, vocabulary, digest="")
    lengths = dataset.lengths
    return {
        "num_users": dataset.num_users,
        "num_exposures": len(dataset.items),
        "num_items": vocabulary.num_items,
        "min_length": int(lengths.min()),
        "median_length": float(np.median(lengths)),
        "max_length": int(lengths.max()),
        "first_ts": int(dataset.times.min()),
        "last_ts": int(dataset.times.max()),
        "action_counts": {
            name: int((dataset.actions >> bit & 1).sum()) for bit, name in enumerate(declaration.actions)
        },
        "splits": describe_targets(dataset),
    }

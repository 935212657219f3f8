"""Sorted events become exposures, exposures become one jagged row per user.

Invariant: rows of one (user, item, time) are one exposure with the union of their actions, in the place and with the
context of the first of them; the order is total: (user, event_ts, landed file, source row). Batches are cut by content
alone, however the stream is cut, so equal events give equal bytes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr_platform.events.moments import same_moment, tied, whole_moments
from gr_platform.prefetch import prefetched
from gr_platform.sequences.codes import Codes
from gr_platform.sequences.dataset import FILE, Jagged, list_names
from gr_platform.sequences.vocabulary import Vocabulary

MAX_BATCH_USERS = 1 << 16
MAX_BATCH_EVENTS = 1 << 22
STREAM_ROWS = 1 << 17
EVENT_COLUMNS = ("user_id", "item_id", "action", "event_ts")
# A table of places is as long as the range of ids: kept where that is small for the number of items.
_TABLE_LENGTH = 1 << 24


class ItemIndex:
    """Looks up dense indices of many item ids that all are in the vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._low, self._table = 0, None
        ids = vocabulary.item_ids
        if not vocabulary.is_string and len(ids) and int(ids.max()) - int(ids.min()) < _TABLE_LENGTH:
            self._low = int(ids.min())
            self._table = np.zeros(int(ids.max()) - self._low + 1, np.int64)
            self._table[ids - self._low] = np.arange(len(ids)) + vocabulary.first_item

    def __call__(self, ids: pa.Array) -> np.ndarray:
        """Return the indices of item ids, int64 [len]."""
        if self._table is not None:
            return np.asarray(self._table[ids.to_numpy() - self._low])
        if not self.vocabulary.is_string:
            return self.vocabulary.lookup(ids.to_numpy())
        coded = ids.dictionary_encode()
        known = self.vocabulary.lookup(coded.dictionary.to_numpy(zero_copy_only=False))
        return np.asarray(known[coded.indices.to_numpy()])


def events_of(files: Iterable[Path], context: Sequence[str] = ()) -> Iterator[pa.Table]:
    """Yield the columns that sequences are made of from files of sorted events, one file after the other."""
    columns = [*EVENT_COLUMNS, *context]
    for file in files:
        opened = pq.ParquetFile(file, read_dictionary=["action", *context])
        for batch in opened.iter_batches(STREAM_ROWS, columns=columns):
            yield pa.Table.from_batches([batch])


def exposures(
    events: Iterable[pa.Table], vocabulary: Vocabulary, actions: tuple[str, ...], codes: Mapping[str, Codes]
) -> Iterator[pa.Table]:
    """Return exposures (user_id, items, actions, times, context_...) of events in the total order (user_id, item_id,
    action, event_ts and the context columns that `codes` names), at least one moment of a user at a time."""
    index = ItemIndex(vocabulary)
    masks = pa.array(actions)
    prepared = (_prepared(rows, index, masks, codes) for rows in prefetched(events, depth=8))
    return map(_merged, whole_moments(prepared, "times"))


def _prepared(rows: pa.Table, index: ItemIndex, actions: pa.Array, codes: Mapping[str, Codes]) -> pa.Table:
    action = rows["action"].combine_chunks()
    if not pa.types.is_dictionary(action.type):
        action = action.dictionary_encode()
    bits = pc.index_in(action.dictionary, value_set=actions).to_numpy()
    masks = np.left_shift(np.int64(1), bits.astype(np.int64))[action.indices.to_numpy()]
    columns = [rows["user_id"], index(rows["item_id"].combine_chunks()), masks, rows["event_ts"]]
    columns += [known.lookup(rows[name].combine_chunks()) for name, known in codes.items()]
    return pa.table(columns, names=["user_id", *list_names(codes)])


def _merged(rows: pa.Table) -> pa.Table:
    """Return sorted rows with those of one (user, item, time) as one."""
    same = same_moment(rows, "times")
    at = np.flatnonzero(tied(same))
    if not len(at):
        return rows
    moment = np.cumsum(np.concatenate([[True], ~same]))[at]
    item, masks = rows["items"].to_numpy()[at], rows["actions"].to_numpy()
    key = moment * (int(item.max()) + 1) + item
    order = np.argsort(key, kind="stable")  # so the first row of each group is the first in source order
    begins = np.ones(len(at), bool)
    begins[1:] = np.diff(key[order]) != 0
    if begins.all():
        return rows
    groups = np.flatnonzero(begins)
    union = np.bitwise_or.reduceat(masks[at[order]], groups)
    masks = masks.copy()
    masks[at[order[groups]]] = union
    kept = np.ones(len(rows), bool)
    kept[at[order[~begins]]] = False
    return rows.set_column(2, "actions", pa.array(masks)).filter(pa.array(kept))


def jagged_rows(stream: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield record batches of whole users (`schema`) from exposures in order of users."""
    pending: list[pa.Table] = []
    num_rows = 0
    for rows in stream:
        pending.append(rows)
        num_rows += len(rows)
        if num_rows >= MAX_BATCH_EVENTS:
            table = pa.concat_tables(pending).combine_chunks()
            done = 0
            for bounds, last in _cuts(_bounds(table), final=False):
                yield _batch(table, bounds, schema)
                done = last
            pending, num_rows = [table.slice(done)], len(table) - done
    if num_rows:
        table = pa.concat_tables(pending).combine_chunks()
        for bounds, _ in _cuts(_bounds(table), final=True):
            yield _batch(table, bounds, schema)


def rows_of(blocks: Iterable[tuple[pa.Array, Jagged]]) -> Iterator[pa.Table]:
    """Yield exposures again from (user ids [B], their sequences)."""
    for users, block in blocks:
        owners = users.take(pa.array(block.owner))
        lists = [block.items, block.actions, block.times, *block.context.values()]
        yield pa.table([owners, *lists], names=["user_id", *list_names(block.context)])


def write_segment(folder: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> dict[str, Any]:
    """Write batches as a segment's file; return its facts."""
    num_users = num_exposures = 0
    with pa.OSFile(str(folder / FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in prefetched(batches):
            num_users += len(batch)
            num_exposures += len(batch.column("items").values)
            writer.write_batch(batch)
    return {"num_users": num_users, "num_exposures": num_exposures}


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
    if "replaces" in schema.names:
        columns.append(pa.array(np.zeros(len(bounds) - 1, bool)))
    lists = span.column_names[1:]
    columns += [pa.LargeListArray.from_arrays(offsets, span[name].combine_chunks()) for name in lists]
    return pa.RecordBatch.from_arrays(columns, schema=schema)

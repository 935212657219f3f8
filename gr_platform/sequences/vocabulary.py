"""Item ids become dense indices: rows of the embedding table.

Invariant: append-only. An index, once given, means the same item in every later vocabulary of the data set. Rows: 0 is
padding, 1..NUM_OOV are buckets for unknown ids, items follow in the order in which they were first seen. Reading one
needs numpy and pyarrow alone: the model server imports this module.
"""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.sequences.codes import Codes, appended

if TYPE_CHECKING:
    from gr_platform.events.ingest import CleanEvents

NUM_OOV = 4
FILE = "vocabulary.parquet"


class Vocabulary:
    """The items of a data set, immutable.

    item_ids: int64 or object (str) [num_items], aligned with index - first_item. counts, first_ts, last_ts int64
    [num_items]: rows of the log, ms; 0 where only rows without a time name the item. active: bool [num_rows], False for
    padding and buckets.
    """

    def __init__(self, table: pa.Table) -> None:
        ids = table["item_id"].combine_chunks()
        self.is_string = not pa.types.is_integer(ids.type)
        self.item_ids: np.ndarray = ids.to_numpy(zero_copy_only=False)
        self.counts: np.ndarray = table["count"].to_numpy()
        self.first_ts: np.ndarray = table["first_ts"].to_numpy()
        self.last_ts: np.ndarray = table["last_ts"].to_numpy()
        self.active = np.concatenate([np.zeros(1 + NUM_OOV, bool), table["active"].to_numpy()])

    @staticmethod
    def load(path: Path) -> "Vocabulary":
        """Return the vocabulary of a Parquet file, or of the folder that holds it. Raises UserError if unreadable."""
        file = path / FILE if path.is_dir() else path
        try:
            return Vocabulary(pq.read_table(file))
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise UserError(
                f"{file.name} cannot be read as a vocabulary ({type(error).__name__}); make it again"
            ) from None

    @property
    def num_items(self) -> int:
        """Number of known items."""
        return len(self.item_ids)

    @property
    def first_item(self) -> int:
        """Index of the first item: padding and buckets lie before it."""
        return 1 + NUM_OOV

    @property
    def num_rows(self) -> int:
        """Rows of an embedding table: padding, buckets and items."""
        return self.first_item + self.num_items

    @cached_property
    def digest(self) -> str:
        """Hex BLAKE2b-160 over id type, bucket count and ids in order: what an index means."""
        return self.digest_of_first(self.num_items)

    def digest_of_first(self, num_items: int) -> str:
        """Return the digest of the vocabulary as it was when it had `num_items` items."""
        state = hashlib.blake2b(f"{'string' if self.is_string else 'int64'},{NUM_OOV}".encode(), digest_size=20)
        if self.is_string:
            for item in self.item_ids[:num_items]:
                data = item.encode()
                state.update(len(data).to_bytes(8, "little") + data)
        else:
            state.update(self.item_ids[:num_items].astype("<i8").tobytes())
        return state.hexdigest()

    def lookup(self, ids: Any) -> np.ndarray:
        """Return int64 indices of item ids (any array-like of int, or of str or UTF-8 bytes); unknown ids get a bucket.

        The bucket is a stable hash of the id, so an unknown item has the same row in training and in serving. Raises
        ValueError for ids of the wrong type.
        """
        if self.is_string:
            return self._lookup_strings(np.asarray(ids, dtype=object).reshape(-1))
        wanted = np.asarray(ids)
        if wanted.size and wanted.dtype.kind not in "iu":
            raise ValueError(f"item ids have type {wanted.dtype}, this data set's are int64")
        wanted = wanted.astype(np.int64).reshape(-1)
        sorted_ids, order = self._sorted
        if not len(sorted_ids):
            return np.array([_bucket(int(item)) for item in wanted], np.int64)
        at = np.minimum(np.searchsorted(sorted_ids, wanted), len(sorted_ids) - 1)
        indices = order[at] + self.first_item
        for position in np.flatnonzero(sorted_ids[at] != wanted):
            indices[position] = _bucket(int(wanted[position]))
        return indices

    def ids(self, indices: Any) -> np.ndarray:
        """Return the item ids (int64, or object str) of dense indices. Raises ValueError for one that is no item."""
        dense = np.asarray(indices, np.int64)
        if dense.size and (dense.min() < self.first_item or dense.max() >= self.num_rows):
            raise ValueError(f"indices must lie in {self.first_item}..{self.num_rows - 1} to have an item id")
        return self.item_ids[dense - self.first_item]

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.item_ids, kind="stable").astype(np.int64)
        return self.item_ids[order], order

    @cached_property
    def _index_of(self) -> dict[str, int]:
        return {item: self.first_item + i for i, item in enumerate(self.item_ids)}

    def _lookup_strings(self, ids: np.ndarray) -> np.ndarray:
        known, found = self._index_of, np.empty(len(ids), np.int64)
        for position, item in enumerate(ids):
            text = item.decode("utf-8", "replace") if isinstance(item, bytes) else item
            if not isinstance(text, str):
                raise ValueError(f"item id {position} has type {type(item).__name__}, this data set's are strings")
            found[position] = known.get(text) or _bucket(text)
        return found


def unknown_rows(ids: Iterable[Any]) -> np.ndarray:
    """Return the row int64 of each item id in a vocabulary that does not know it."""
    return np.array([_bucket(item) for item in ids], np.int64)


def _bucket(item: int | str) -> int:
    """Return the out-of-vocabulary row 1..NUM_OOV of an id: its decimal or own text, hashed."""
    return 1 + int.from_bytes(hashlib.blake2b(str(item).encode(), digest_size=8).digest(), "little") % NUM_OOV


def build_vocabulary(home: Path, ds: str) -> storage.Result:
    """Return the vocabulary of all ingested events, appended to the data set's current one, and make it current.

    It starts afresh where the ids changed their type, which an import that replaces a data set's only file can do.
    New items follow in the order (landed file, first event_ts, id), so building it file by file equals one build; so do
    new values of each declared context column, whose codes lie beside it in context-<name>.parquet (value, count).
    """
    from gr_platform.events.cleaning import context_file
    from gr_platform.events.ingest import clean_events

    events = clean_events(home, ds)
    parent = home / "sequences" / ds
    base = _current(parent)
    if base is not None and base.manifest.spec["events"] == events.digest:
        return base
    known = Vocabulary.load(base.folder) if base else None
    if known is not None and known.is_string != (events.declaration.item_id_type == "string"):
        base = known = None
    table = _item_table(_items_of(events), known)
    vocabulary = Vocabulary(table)
    context = _context_tables(events, base)

    def build(folder: Path) -> dict[str, Any]:
        pq.write_table(table, folder / FILE, compression="zstd")
        for name, values in context.items():
            pq.write_table(values, folder / context_file(name), compression="zstd")
        return {
            "num_items": vocabulary.num_items,
            "num_rows": vocabulary.num_rows,
            "num_new": vocabulary.num_items - (base.manifest.facts["num_items"] if base else 0),
            "num_inactive": vocabulary.num_items - int(vocabulary.active.sum()),
            "vocabulary_digest": vocabulary.digest,
            **({"num_values": {name: len(values) for name, values in context.items()}} if context else {}),
        }

    spec: dict[str, Any] = {"events": events.digest, "num_oov": NUM_OOV, "ids": vocabulary.digest}
    if context:
        spec["context"] = {name: Codes(values).digest for name, values in context.items()}
    result = storage.ensure(parent, "vocabulary", spec, build)
    storage.point(parent, "vocabulary", result.folder)
    return result


# Items that only rows without a time name come behind the other new ones of their file.
_ITEMS = """
    SELECT item_id, sum(count)::BIGINT AS count, coalesce(min(first_ts), 0) AS first_ts,
        coalesce(max(last_ts), 0) AS last_ts, true AS active
    FROM items
    GROUP BY item_id
    ORDER BY min(source_file), arg_min(coalesce(first_ts, 9223372036854775807), source_file), item_id
"""


def _items_of(events: "CleanEvents") -> pa.Table:
    """Return the items of all partitions in their order of appearance, from what each partition counted."""
    from gr_platform.events.cleaning import ITEMS
    from gr_platform.events.database import connect, parquet_of

    counted = parquet_of(folder / ITEMS for folder in events.partitions.values())
    with connect(events.home) as connection:
        connection.execute(f"CREATE VIEW items AS FROM {counted}")
        return connection.sql(_ITEMS).to_arrow_table()


_VALUES = """
    SELECT value, sum(count)::BIGINT AS count
    FROM counted
    GROUP BY value
    ORDER BY min(source_file), arg_min(first_ts, source_file), value
"""


def _context_tables(events: "CleanEvents", base: storage.Result | None) -> dict[str, pa.Table]:
    """Return the values of each declared context column (value, count) behind those that have a code already."""
    from gr_platform.events.cleaning import context_file
    from gr_platform.events.database import connect, parquet_of

    tables: dict[str, pa.Table] = {}
    for name in events.declaration.context:
        file = context_file(name)
        known = Codes.load(base.folder / file) if base and file in base.manifest.files else None
        with connect(events.home) as connection:
            counted = parquet_of(folder / file for folder in events.partitions.values())
            connection.execute(f"CREATE VIEW counted AS FROM {counted}")
            tables[name] = appended(connection.sql(_VALUES).to_arrow_table(), known, name)
    return tables


def context_codes(folder: Path, names: Iterable[str]) -> dict[str, Codes]:
    """Return the codes of context columns from the folder of a vocabulary. Raises UserError if they are not there."""
    return {name: Codes.load(folder / f"context-{name}.parquet") for name in names}


def _current(parent: Path) -> storage.Result | None:
    if not (parent / "vocabulary.current").exists():
        return None
    folder = storage.current(parent, "vocabulary")
    return storage.Result(folder=folder, manifest=storage.read_manifest(folder, verify=True), reused=True)


def _item_table(seen: pa.Table, base: Vocabulary | None) -> pa.Table:
    """Return `seen` (items of the events, in order of appearance) behind all items of `base`, which keep their order.

    An item of the base that the events hold no more stays, inactive and with count 0.
    """
    if base is None or base.num_items == 0:
        return seen
    id_type = seen["item_id"].type
    kept = pa.array(base.item_ids, id_type)
    position = pc.index_in(kept, seen["item_id"].combine_chunks())
    gone = position.is_null()
    old = {
        "item_id": kept,
        "count": pc.fill_null(seen["count"].take(position), 0),
        "first_ts": pc.if_else(gone, pa.array(base.first_ts), seen["first_ts"].take(position)),
        "last_ts": pc.if_else(gone, pa.array(base.last_ts), seen["last_ts"].take(position)),
        "active": pc.invert(gone),
    }
    fresh = seen.filter(pc.invert(pc.is_in(seen["item_id"], kept)))
    return pa.concat_tables([pa.table(old, schema=seen.schema), fresh]).combine_chunks()

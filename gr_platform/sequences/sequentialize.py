"""Clean events become sequences: a base and one segment for what came in since, until they are worth a new base.

Invariant: a data set's sequences are a function of its events, declaration and vocabulary; which segments hold them is
not part of their digest. A segment appends to its users' sequences, or replaces a sequence whole where an event came in
late; equal events give equal bytes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events.database import parquet_of, quoted
from gr_platform.events.ingest import CleanEvents, clean_events
from gr_platform.events.partitions import event_files
from gr_platform.sequences import exposures
from gr_platform.sequences.codes import Codes
from gr_platform.sequences.dataset import SequenceDataset, list_names, read_segment
from gr_platform.sequences.exposures import EVENT_COLUMNS, events_of, jagged_rows, rows_of, write_segment
from gr_platform.sequences.vocabulary import Vocabulary, context_codes

# Segments beside the base are merged into a new one when they hold more than this share of the exposures.
COMPACT_SHARE = 0.2
SEQUENCES_VERSION = 2


def sequentialize(home: Path, ds: str) -> storage.Result:
    """Return the sequences of all ingested events over the current vocabulary, and make them current.

    Files: per segment one Arrow IPC file, a row a user: user_id; items (dense index), actions (bitmask), times (ms UTC)
    and context_<name> (codes) as large_list<int64>; behind the base also `replaces`. Raises UserError if the vocabulary
    is of other events.
    """
    events = clean_events(home, ds)
    parent = home / "sequences" / ds
    folder = storage.current(parent, "vocabulary")
    built_from = storage.read_manifest(folder)
    if built_from.spec["events"] != events.digest:
        raise UserError(f"the vocabulary is older than the events of {ds}; run the item_vocabulary stage first")
    spec = {
        "events": events.digest,
        "declaration": events.declaration.to_json(),
        "vocabulary": built_from.facts["vocabulary_digest"],
        "vocabulary_folder": folder.name,
        "version": SEQUENCES_VERSION,
    }
    codes = context_codes(folder, events.declaration.context)
    segments = _Segments(parent, events, Vocabulary.load(folder), codes)

    def build(_: Path) -> dict[str, Any]:
        dataset, names = segments.compacted()
        return _facts(dataset) | {"segments": names}

    made = storage.find(parent, "sequences", spec)
    if made is not None and not all(_is_whole(parent / name) for name in made.manifest.facts["segments"]):
        storage.discard(made.folder)
    result = storage.ensure(parent, "sequences", spec, build)
    storage.point(parent, "sequences", result.folder)
    return result


def _is_whole(folder: Path) -> bool:
    try:
        storage.read_manifest(folder, verify=True)
    except UserError:
        return False
    return True


class _Segments:
    """The segments of one set of events."""

    def __init__(self, parent: Path, events: CleanEvents, vocabulary: Vocabulary, codes: dict[str, Codes]) -> None:
        self.parent, self.events, self.vocabulary, self.codes = parent, events, vocabulary, codes
        self.declaration = events.declaration
        manifests = {date: storage.read_manifest(folder) for date, folder in events.partitions.items()}
        self.by_digest = {manifests[date].digest: folder for date, folder in events.partitions.items()}
        self.digests = [manifest.digest for manifest in manifests.values()]

    def compacted(self) -> tuple[SequenceDataset, list[str]]:
        """Return the sequences and the names of their segments, made as far as they are not there."""
        names, covered = self._usable()
        if rest := self.digests[covered:]:
            names.append(self._segment(names, self.digests[:covered], rest))
        tables = [read_segment(self.parent / name) for name in names]
        dataset = self._dataset(tables)
        sizes = [storage.read_manifest(self.parent / name).facts["num_exposures"] for name in names]
        if sum(sizes[1:]) > COMPACT_SHARE * sum(sizes):
            names = [self._base(dataset)]
            dataset = self._dataset([read_segment(self.parent / names[0])])
        return dataset, names

    def _dataset(self, tables: list[pa.Table]) -> SequenceDataset:
        return SequenceDataset(tables, self.declaration, self.vocabulary, "", self.codes)

    def _usable(self) -> tuple[list[str], int]:
        """Return those of the current segments that start these sequences too, and how many partitions they cover."""
        try:
            current = storage.read_manifest(storage.current(self.parent, "sequences"))
        except UserError:
            return [], 0
        names: list[str] = []
        covered = 0
        for name in current.facts.get("segments", []):
            try:
                spec = storage.read_manifest(self.parent / name, verify=True).spec
            except UserError:
                break
            end = covered + len(spec["events"])
            known: dict[str, Any] = {"num_items": spec["items"]["num"], "num_actions": len(spec["actions"])}
            known["num_values"] = {name: num for name, num, _ in spec.get("context", [])}
            if spec != self._spec(self.digests[:covered], self.digests[covered:end], **known):
                break
            names.append(name)
            covered = end
        return names, covered

    def _spec(
        self,
        before: list[str],
        events: list[str],
        *,
        num_items: int | None = None,
        num_actions: int | None = None,
        num_values: dict[str, int] | None = None,
    ) -> dict[str, Any]:
        """Return what a segment is made from: of vocabulary, actions and codes, which all are only appended to, as much
        as there was when it was made."""
        declared = self.declaration
        num_items = self.vocabulary.num_items if num_items is None else num_items
        known = min(num_items, self.vocabulary.num_items)
        spec: dict[str, Any] = {
            "before": before,
            "events": events,
            "actions": list(declared.actions[:num_actions]),
            "user_id_type": declared.user_id_type,
            "items": {"num": num_items, "digest": self.vocabulary.digest_of_first(known)},
            "version": SEQUENCES_VERSION,
        }
        if self.codes:
            spec["context"] = [_named_codes(name, codes, num_values or {}) for name, codes in self.codes.items()]
        return spec

    def _segment(self, names: list[str], before: list[str], events: list[str]) -> str:
        """Return the segment of the partitions `events` behind those that segments `names` hold."""
        spec = self._spec(before, events)

        def build(folder: Path) -> dict[str, Any]:
            schema = self._schema(replaces=bool(before))
            batches = jagged_rows(self._exposures(events), schema)
            if before:
                known = self._dataset([read_segment(self.parent / name) for name in names])
                batches = self._appended(batches, known, [*before, *events], schema)
            return write_segment(folder, batches, schema)

        return storage.ensure(self.parent, "segment", spec, build).folder.name

    def _base(self, dataset: SequenceDataset) -> str:
        """Return the base of all partitions, from sequences that are there."""
        schema = self._schema(replaces=False)
        spec = self._spec([], self.digests)
        blocks = ((dataset.ids_of(rows), block) for rows, block in dataset.blocks())
        made = storage.ensure(
            self.parent,
            "segment",
            spec,
            lambda folder: write_segment(folder, jagged_rows(rows_of(blocks), schema), schema),
        )
        return made.folder.name

    def _schema(self, *, replaces: bool) -> pa.Schema:
        id_type = pa.int64() if self.declaration.user_id_type == "int64" else pa.string()
        flag = [("replaces", pa.bool_())] if replaces else []
        lists = [(name, pa.large_list(pa.int64())) for name in list_names(self.codes)]
        return pa.schema([("user_id", id_type), *flag, *lists])

    def _exposures(self, digests: list[str], late: pa.Array | None = None) -> Iterator[pa.Table]:
        """Yield the exposures of partitions; of the users `late` alone, where given."""
        events = self._sorted(digests, late)
        return exposures.exposures(events, self.vocabulary, self.declaration.actions, self.codes)

    def _sorted(self, digests: list[str], late: pa.Array | None = None) -> Iterator[pa.Table]:
        """Yield the events of partitions in the total order; of the users `late` alone, where given."""
        files = [file for digest in digests for file in event_files(self.by_digest[digest])]
        if len(digests) == 1 and late is None:
            yield from events_of(files, list(self.codes))
            return
        chosen = "" if late is None else "SEMI JOIN late USING (user_id)"
        tables = {} if late is None else {"late": pa.table({"user_id": late})}
        with self.events.connect(**tables) as connection:
            columns = ", ".join(map(quoted, (*EVENT_COLUMNS, *self.codes)))
            sorted_ = (
                f"SELECT {columns} FROM {parquet_of(files)} {chosen} "  # noqa: S608
                "ORDER BY user_id, event_ts, source_file, source_row"
            )
            for batch in connection.sql(sorted_).to_arrow_reader(exposures.STREAM_ROWS):
                yield pa.Table.from_batches([batch])

    def _appended(
        self, batches: Iterator[pa.RecordBatch], known: SequenceDataset, digests: list[str], schema: pa.Schema
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows that go on where `known` ends, then, replacing all, those of users with a late event."""
        late: list[pa.Array] = []
        for batch in batches:
            users = batch.column("user_id")
            rows = known.rows_of(users)
            first = batch.column("times").values.to_numpy()[batch.column("times").offsets.to_numpy()[:-1]]
            old = np.flatnonzero(rows >= 0)
            is_late = np.zeros(len(batch), bool)
            is_late[old] = first[old] <= known.at(rows[old], known.lengths[rows[old]] - 1).times
            late.append(users.filter(pa.array(is_late)))
            if not is_late.all():
                yield _compact(batch.filter(pa.array(~is_late)), schema)
        if chosen := pa.concat_arrays(late) if sum(map(len, late)) else None:
            for batch in jagged_rows(self._exposures(digests, chosen), schema):
                yield batch.set_column(1, "replaces", pc.fill_null(pa.nulls(len(batch), pa.bool_()), True))


def _compact(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return a filtered batch with lists that hold nothing but their rows."""
    columns = []
    for name in schema.names:
        column = batch.column(name)
        if pa.types.is_large_list(column.type):
            lengths = np.diff(column.offsets.to_numpy())
            offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
            column = pa.LargeListArray.from_arrays(pa.array(offsets), column.flatten())
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _named_codes(name: str, codes: Codes, num_values: dict[str, int]) -> list[Any]:
    num = num_values.get(name, codes.num_values)
    return [name, num, codes.digest_of_first(min(num, codes.num_values))]


def _facts(dataset: SequenceDataset) -> dict[str, Any]:
    lengths = dataset.lengths if dataset.num_users else np.zeros(1, np.int64)
    return {
        "num_users": dataset.num_users,
        "num_exposures": dataset.num_exposures,
        "num_items": dataset.vocabulary.num_items,
        "min_length": int(lengths.min()),
        "median_length": float(np.median(lengths)),
        "max_length": int(lengths.max()),
    }

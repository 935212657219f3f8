"""Finished sequences, memory-mapped: what training, evaluation and the client read.

Invariant: read-only and jagged. A user's sequence is the concatenation of its pieces, a base and what later segments
appended, from the last one that replaces all before it; oldest first in the total order (event_ts, landed file, source
row). What is read is copied once, out of the memory map.

Legend: U users, B rows asked for, T exposures answered, P pieces.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events.declaration import Declaration
from gr_platform.sequences.vocabulary import Vocabulary

FILE = "sequences.arrow"
LISTS = ("items", "actions", "times")
BLOCK_EVENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Jagged:
    """Spans of B users' sequences: offsets int64 [B + 1]; items, actions (bitmasks), times (ms UTC) int64 [T]."""

    offsets: np.ndarray
    items: np.ndarray
    actions: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Exposures of each row, int64 [B]."""
        return np.diff(self.offsets)

    @property
    def owner(self) -> np.ndarray:
        """Row 0..B-1 of each exposure, int64 [T]."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def positions(self) -> np.ndarray:
        """Place of each exposure in its own span, int64 [T]."""
        return ramps(np.zeros(len(self), np.int64), self.lengths)

    def histories(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return items, actions and times of each row (views)."""
        spans = [slice(begin, end) for begin, end in pairwise(self.offsets.tolist())]
        return [(self.items[span], self.actions[span], self.times[span]) for span in spans]


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Where sequences lie, by user: offsets int64 [U + 1] into the P others, all int64 [P].

    chunk: which record batch; start: first exposure in it; begin: its place in the user's sequence; length: exposures.
    """

    offsets: np.ndarray
    chunk: np.ndarray
    start: np.ndarray
    begin: np.ndarray
    length: np.ndarray


class SequenceDataset:
    """All users' exposures. Rows are users in ascending order of their ids; lengths int64 [U] counts their exposures.

    segments: tables of user_id and LISTS as large_list<int64>, the base first and ascending by user; where they have a
    column `replaces`, it says that a row holds the user's whole sequence. Their memory is viewed, not copied.
    """

    def __init__(
        self, segments: Sequence[pa.Table], declaration: Declaration, vocabulary: Vocabulary, digest: str
    ) -> None:
        self.declaration = declaration
        self.vocabulary = vocabulary
        self.digest = digest
        batches = [batch for segment in segments for batch in segment.to_batches()]
        self._values = {name: [batch.column(name).values.to_numpy() for batch in batches] for name in LISTS}
        self._user_ids, self._pieces = _index(list(segments), batches)
        pieces = self._pieces
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(pieces.length)])
        self.lengths = np.diff(ends[pieces.offsets])

    @staticmethod
    def open(folder: Path) -> "SequenceDataset":
        """Return the sequences of a result folder. Raises UserError if it is unfinished or damaged."""
        manifest = storage.read_manifest(folder)
        names = [folder.parent / name for name in manifest.facts["segments"]]
        return SequenceDataset(
            [read_segment(name) for name in names],
            Declaration.from_json(manifest.spec["declaration"]),
            Vocabulary.load(folder.parent / manifest.spec["vocabulary_folder"]),
            manifest.digest,
        )

    @staticmethod
    def current(home: Path, ds: str) -> "SequenceDataset":
        """Return the data set's current sequences. Raises UserError if there are none yet."""
        return SequenceDataset.open(storage.current(home / "sequences" / ds, "sequences"))

    @property
    def num_users(self) -> int:
        """Number of user rows U."""
        return len(self.lengths)

    @property
    def num_exposures(self) -> int:
        """Exposures of all users together."""
        return int(self.lengths.sum())

    @cached_property
    def user_ids(self) -> np.ndarray:
        """Ids of the user rows, ascending: int64 [U], or object (str) [U]."""
        return self._user_ids.to_numpy(zero_copy_only=False)

    def find_user(self, user_id: int | str) -> int:
        """Return the row of a user. Raises UserError if the data set has no such user."""
        wanted: int | str = str(user_id)
        if self.declaration.user_id_type == "int64":
            try:
                wanted = int(user_id)
            except ValueError:
                raise UserError(
                    f"user {user_id!r} is not an integer, but the users of {self.declaration.name} are"
                ) from None
        row = pc.index(self._user_ids, pa.scalar(wanted, self._user_ids.type)).as_py() if _fits(wanted) else -1
        if row < 0:
            examples = ", ".join(str(user) for user in self._user_ids.slice(0, 3).to_pylist())
            raise UserError(
                f"data set {self.declaration.name} has no user {wanted}; it has {self.num_users} users, such as "
                f"{examples}"
            )
        return row

    def rows_of(self, user_ids: pa.Array) -> np.ndarray:
        """Return the rows of many users, -1 for one that the data set does not have, int64 [len]."""
        return pc.fill_null(pc.index_in(user_ids, value_set=self._user_ids), -1).to_numpy().astype(np.int64)

    def ids_of(self, rows: np.ndarray) -> pa.Array:
        """Return the ids of user rows."""
        return self._user_ids.take(pa.array(rows))

    def gather(self, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Jagged:
        """Return exposures starts..stops-1 of the sequences of user rows, int64 [B] each, as one copy.

        Raises ValueError unless 0 <= start <= stop <= length.
        """
        rows, starts, stops = (np.asarray(each, np.int64) for each in (rows, starts, stops))
        if ((starts < 0) | (stops < starts) | (stops > self.lengths[rows])).any():
            raise ValueError("spans must lie inside their users' sequences: 0 <= start <= stop <= length")
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(stops - starts)])
        chunk, source, length = self._spans(rows, starts, stops)
        return Jagged(offsets, *(_copied(self._values[name], chunk, source, length) for name in LISTS))

    def at(self, rows: np.ndarray, positions: np.ndarray) -> Jagged:
        """Return the exposure at `positions` of each user row, int64 [B] each: spans of one."""
        return self.gather(rows, positions, np.asarray(positions, np.int64) + 1)

    def history(self, row: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return items, actions and times of the first `end` exposures of a user row, int64 [end]."""
        if not 0 <= end <= self.lengths[row]:
            raise ValueError(f"end is {end}, user row {row} has {self.lengths[row]} exposures")
        found = self.gather(np.array([row]), np.array([0]), np.array([end]))
        return found.items, found.actions, found.times

    def blocks(
        self, *, ends: np.ndarray | None = None, max_events: int = BLOCK_EVENTS
    ) -> Iterator[tuple[np.ndarray, Jagged]]:
        """Yield all users in order as (rows, their exposures), at most `max_events` at once, or one user.

        ends: how many exposures of each user, int64 [U], where not all of them.
        """
        ends = self.lengths if ends is None else np.asarray(ends, np.int64)
        total = np.cumsum(ends)
        first = 0
        while first < self.num_users:
            before = int(total[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(total, before + max_events, side="right")))
            rows = np.arange(first, last)
            yield rows, self.gather(rows, np.zeros(len(rows), np.int64), ends[rows])
            first = last

    def _spans(
        self, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the chunk, its first exposure and the length of every span that the answer is made of, in order."""
        pieces = self._pieces
        first = pieces.offsets[rows]
        num = pieces.offsets[rows + 1] - first
        at = ramps(first, num)
        begin, length = pieces.begin[at], pieces.length[at]
        low = np.maximum(np.repeat(starts, num) - begin, 0)
        high = np.minimum(np.repeat(stops, num) - begin, length)
        kept = high > low
        at, low, high = at[kept], low[kept], high[kept]
        return pieces.chunk[at], pieces.start[at] + low, high - low


def read_segment(folder: Path) -> pa.Table:
    """Return a segment as a memory-mapped table. Raises UserError if it is damaged."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(folder / FILE))).read_all()
    except (OSError, pa.ArrowInvalid):
        raise UserError(f"{folder.name}/{FILE} is missing or damaged; delete {folder.name} and make it again") from None


def ramps(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return start, start + 1, ... of each span, one span after the other, int64 [sum of lengths]."""
    shift = starts - np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)[:-1]])[: len(starts)]
    return np.arange(int(lengths.sum()), dtype=np.int64) + np.repeat(shift, lengths)


def _index(segments: list[pa.Table], batches: list[pa.RecordBatch]) -> tuple[pa.Array, _Pieces]:
    """Return the ids of all users, ascending, and where their pieces lie."""
    offsets = [batch.column("items").offsets.to_numpy() for batch in batches]
    chunk = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    none = [np.zeros(0, np.int64)]
    start = np.concatenate([*(each[:-1] for each in offsets), *none])
    length = np.concatenate([*(np.diff(each) for each in offsets), *none])
    users = pa.concat_arrays(
        [batch.column("user_id") for batch in batches] or [segments[0]["user_id"].combine_chunks()]
    )
    if len(segments) == 1:
        rows = np.arange(len(users) + 1)
        return users, _Pieces(rows, chunk, start, np.zeros(len(users), np.int64), length)
    order = pc.sort_indices(users).to_numpy()  # stable: a user's pieces stay in the order of their segments
    users, chunk, start, length = users.take(pa.array(order)), chunk[order], start[order], length[order]
    replaces = np.concatenate([_replaces(batch) for batch in batches])[order]
    first = np.ones(len(users), bool)
    first[1:] = pc.not_equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False)
    owner = np.cumsum(first) - 1
    # A piece counts unless a later one of its user replaces it.
    place = np.arange(len(users))
    from_ = np.maximum.reduceat(np.where(replaces | first, place, 0), np.flatnonzero(first))
    kept = place >= from_[owner]
    owner, chunk, start, length = owner[kept], chunk[kept], start[kept], length[kept]
    rows = np.searchsorted(owner, np.arange(len(from_) + 1))
    ends = np.cumsum(length) - length
    begin = ends - ends[rows[:-1]][owner]
    return users.take(pa.array(np.flatnonzero(first))), _Pieces(rows, chunk, start, begin, length)


def _replaces(batch: pa.RecordBatch) -> np.ndarray:
    if "replaces" not in batch.schema.names:
        return np.zeros(len(batch), bool)
    return batch.column("replaces").to_numpy(zero_copy_only=False)


def _copied(chunks: list[np.ndarray], chunk: np.ndarray, source: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Return the spans of chunked values one after the other, int64 [T]."""
    used = np.unique(chunk)
    if len(used) == 1:
        return np.take(chunks[used[0]], ramps(source, length))
    out = np.empty(int(length.sum()), np.int64)
    place = np.cumsum(length) - length
    for each in used:
        mine = chunk == each
        out[ramps(place[mine], length[mine])] = np.take(chunks[each], ramps(source[mine], length[mine]))
    return out


def _fits(wanted: int | str) -> bool:
    return isinstance(wanted, str) or -(2**63) <= wanted < 2**63

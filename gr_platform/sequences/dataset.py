"""Finished sequences, memory-mapped: what training, evaluation and the client read.

Invariant: read-only and jagged. A user's sequence is the concatenation of its pieces, a base and what later segments
appended, from the last one that replaces all before it; oldest first in the total order (event_ts, landed file, source
row). What is read is copied once, out of the memory map.

Legend: U users, B rows asked for, T exposures answered.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events.declaration import Declaration
from gr_platform.sequences.codes import Codes
from gr_platform.sequences.pieces import index_of
from gr_platform.sequences.vocabulary import Vocabulary, context_codes

FILE = "sequences.arrow"
LISTS = ("items", "actions", "times")
CONTEXT = "context_"
BLOCK_EVENTS = 1 << 22
LONG_SPAN = 16  # exposures: from here on a memory copy a span is faster than a loop over record batches


@dataclass(frozen=True, slots=True)
class Jagged:
    """Spans of B users' sequences: offsets int64 [B + 1]; items, actions (bitmasks), times (ms UTC) int64 [T].

    context: declared context column -> codes int64 [T], 0 where there is none; {} for a data set without any.
    """

    offsets: np.ndarray
    items: np.ndarray
    actions: np.ndarray
    times: np.ndarray
    context: dict[str, np.ndarray] = field(default_factory=dict, kw_only=True)

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


class SequenceDataset:
    """All users' exposures. Rows are users in ascending order of their ids; lengths int64 [U] counts their exposures.

    segments: tables of user_id and LISTS as large_list<int64>, the base first and ascending by user; where they have a
    column `replaces`, it says that a row holds the user's whole sequence. Their memory is viewed, not copied.
    codes: context column -> what its codes mean; the segments hold a list `context_<name>` for each.
    """

    def __init__(
        self,
        segments: Sequence[pa.Table],
        declaration: Declaration,
        vocabulary: Vocabulary,
        digest: str,
        codes: Mapping[str, Codes] | None = None,
    ) -> None:
        self.declaration = declaration
        self.vocabulary = vocabulary
        self.digest = digest
        self.codes = dict(codes or {})
        batches = [batch for segment in segments for batch in segment.to_batches()]
        lists = list_names(self.codes)
        self._values = {name: [batch.column(name).values.to_numpy() for batch in batches] for name in lists}
        self._user_ids, self._pieces = index_of(list(segments), batches)
        pieces = self._pieces
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(pieces.length)])
        self.lengths = np.diff(ends[pieces.offsets])

    @staticmethod
    def open(folder: Path) -> "SequenceDataset":
        """Return the sequences of a result folder. Raises UserError if it is unfinished or damaged."""
        manifest = storage.read_manifest(folder)
        names = [folder.parent / name for name in manifest.facts["segments"]]
        declaration = Declaration.from_json(manifest.spec["declaration"])
        vocabulary = folder.parent / manifest.spec["vocabulary_folder"]
        return SequenceDataset(
            [read_segment(name) for name in names],
            declaration,
            Vocabulary.load(vocabulary),
            manifest.digest,
            context_codes(vocabulary, declaration.context),
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

    def row_of(self, user_id: int | str) -> int:
        """Return the row of one user, -1 for one that the data set does not have; users ascend, so log2(U) looks."""
        row = bisect_left(range(self.num_users), user_id, key=lambda at: self._user_ids[at].as_py())
        return row if row < self.num_users and self._user_ids[row].as_py() == user_id else -1

    def rows_of(self, user_ids: pa.Array) -> np.ndarray:
        """Return the rows of many users, -1 for one that the data set does not have, int64 [len]."""
        return pc.fill_null(pc.index_in(user_ids, value_set=self._user_ids), -1).to_numpy().astype(np.int64)

    def ids_of(self, rows: np.ndarray) -> pa.Array:
        """Return the ids of user rows."""
        return self._user_ids.take(pa.array(rows))

    def gather(self, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Jagged:
        """Return exposures starts..stops-1 of the sequences of user rows, int64 [B] each, as one copy.

        Raises ValueError unless 0 <= start <= stop <= length, UserError for an item that the vocabulary has no row of.
        """
        rows, starts, stops = (np.asarray(each, np.int64) for each in (rows, starts, stops))
        if ((starts < 0) | (stops < starts) | (stops > self.lengths[rows])).any():
            raise ValueError("spans must lie inside their users' sequences: 0 <= start <= stop <= length")
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(stops - starts)])
        chunk, source, length = self._spans(rows, starts, stops)
        found = {name: _copied(chunks, chunk, source, length) for name, chunks in self._values.items()}
        # Else a model's table is read past its end: a traceback on the CPU, on a GPU the end of the process.
        if found["items"].size and found["items"].max() >= self.vocabulary.num_rows:
            raise UserError(
                f"the sequences name item {found['items'].max()}, but the vocabulary ends at "
                f"{self.vocabulary.num_rows - 1}, so the item has no embedding; run gr materialize "
                "--select item_vocabulary --select sequences"
            )
        context = {name: found.pop(CONTEXT + name) for name in self.codes}
        return Jagged(offsets, **found, context=context)

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


def list_names(context: Iterable[str]) -> tuple[str, ...]:
    """Return the list columns of a segment whose data set has these context columns."""
    return (*LISTS, *(CONTEXT + name for name in context))


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


def _copied(chunks: list[np.ndarray], chunk: np.ndarray, source: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Return the spans of chunked values one after the other, int64 [T]."""
    used = np.unique(chunk)
    if len(used) == 1:
        return np.take(chunks[used[0]], ramps(source, length))
    if len(length) and LONG_SPAN * len(length) <= length.sum():
        spans = zip(chunk.tolist(), source.tolist(), (source + length).tolist(), strict=True)
        return np.concatenate([chunks[each][begin:end] for each, begin, end in spans])
    out = np.empty(int(length.sum()), np.int64)
    place = np.cumsum(length) - length
    for each in used:
        mine = chunk == each
        out[ramps(place[mine], length[mine])] = np.take(chunks[each], ramps(source[mine], length[mine]))
    return out


def _fits(wanted: int | str) -> bool:
    return isinstance(wanted, str) or -(2**63) <= wanted < 2**63

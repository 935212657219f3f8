"""Finished sequences, memory-mapped: what training, evaluation and the client read.

Invariant: read-only and jagged. The events of user row u are positions offsets[u]..offsets[u + 1] - 1 of the flat
arrays, oldest first in the total order (event_ts, landed file, source row).

Legend: U users, T exposures.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events.declaration import Declaration
from gr_platform.sequences.vocabulary import Vocabulary

FILE = "sequences.arrow"


class SequenceDataset:
    """All users' exposures.

    offsets int64 [U + 1], first 0, last T; items int64 [T] dense indices; actions int64 [T] bitmasks; times int64 [T]
    ms UTC. One record batch: the arrays are views of the memory map; several: they are concatenated once.
    """

    def __init__(self, table: pa.Table, declaration: Declaration, vocabulary: Vocabulary, digest: str) -> None:
        self.declaration = declaration
        self.vocabulary = vocabulary
        self.digest = digest
        self._user_ids = table["user_id"]
        batches = table.to_batches()
        lengths = [np.diff(batch.column("items").offsets.to_numpy()) for batch in batches]
        self.lengths = np.concatenate([np.zeros(0, np.int64), *lengths])
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])
        self.items = _flat(batches, "items")
        self.actions = _flat(batches, "actions")
        self.times = _flat(batches, "times")

    @staticmethod
    def open(folder: Path) -> "SequenceDataset":
        """Return the sequences of a result folder. Raises UserError if it is unfinished or damaged."""
        manifest = storage.read_manifest(folder)
        path = folder / FILE
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowInvalid):
            raise UserError(
                f"{folder.name}/{FILE} is missing or damaged; delete {folder.name} and make it again"
            ) from None
        return SequenceDataset(
            table,
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

    @cached_property
    def user_ids(self) -> np.ndarray:
        """Ids of the user rows, ascending: int64 [U], or object (str) [U]."""
        return self._user_ids.combine_chunks().to_numpy(zero_copy_only=False)

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

    def history(self, row: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return items, actions and times of the first `end` exposures of a user row (views, int64 [end])."""
        if not 0 <= end <= self.lengths[row]:
            raise ValueError(f"end is {end}, user row {row} has {self.lengths[row]} exposures")
        start = self.offsets[row]
        span = slice(start, start + end)
        return self.items[span], self.actions[span], self.times[span]


def _fits(wanted: int | str) -> bool:
    return isinstance(wanted, str) or -(2**63) <= wanted < 2**63


def _flat(batches: list[pa.RecordBatch], name: str) -> np.ndarray:
    parts = [batch.column(name).flatten().to_numpy() for batch in batches]
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *parts])

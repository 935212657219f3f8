"""The histories that the last materialised sequences hold: memory-mapped, one user at a time, by pyarrow and numpy.

Invariant: whoever asks gets one whole set of sequences, the old one or the new one; a switch is noticed within a
second of the pointer's change and opened beside the running requests. Sequences that cannot be read leave the old ones.
"""

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.sequences.dataset import SequenceDataset

log = logging.getLogger(__name__)
CHECK_S = 1.0
# A pointer that leads to nothing readable is tried again after this long, though it has not changed.
RETRY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseHistory:
    """The last events of one user, oldest first (raw ids; int64), and how many came before them."""

    items: np.ndarray
    actions: np.ndarray
    times: np.ndarray
    num_before: int


class Base:
    """One set of sequences, looked up by user. `digest` "" where there is none yet."""

    def __init__(self, dataset: SequenceDataset | None, since_s: float) -> None:
        """`since_s`: when the pointer was moved to it, seconds since 1970."""
        self._dataset = dataset
        self.since_s = since_s
        self.digest = dataset.digest if dataset else ""

    def find(self, user: int | str) -> tuple[int, int | None]:
        """Return the length of a user's history and the time of its last event, ms; (0, None) for an unknown user."""
        row = self._row(user)
        length = int(self._dataset.lengths[row]) if self._dataset and row >= 0 else 0
        if self._dataset is None or length == 0:
            return 0, None
        return length, int(self._dataset.at(np.array([row]), np.array([length - 1])).times[0])

    def last_times(self, users: list[int] | list[str]) -> list[int | None]:
        """Return the time of the last event of many users, ms, None for an unknown one."""
        if self._dataset is None:
            return [None] * len(users)
        rows = self._dataset.rows_of(pa.array(users, self._dataset.ids_of(np.zeros(0, np.int64)).type))
        known = np.flatnonzero((rows >= 0) & (self._dataset.lengths[rows] > 0))
        times = self._dataset.at(rows[known], self._dataset.lengths[rows[known]] - 1).times
        found = dict(zip(known.tolist(), times.tolist(), strict=True))
        return [found.get(index) for index in range(len(users))]

    def tail(self, user: int | str, limit: int, until: int | None = None) -> BaseHistory:
        """Return the last `limit` of a user's events that are not after `until` (ms)."""
        row = self._row(user)
        if row < 0 or self._dataset is None:
            nothing = np.zeros(0, np.int64)
            return BaseHistory(items=nothing, actions=nothing, times=nothing, num_before=0)
        end = int(self._dataset.lengths[row])
        if until is not None and end and self._dataset.at(np.array([row]), np.array([end - 1])).times[0] > until:
            _, _, times = self._dataset.history(row, end)
            end = int(np.searchsorted(times, until, side="right"))
        start = max(0, end - limit)
        found = self._dataset.gather(np.array([row]), np.array([start]), np.array([end]))
        return BaseHistory(
            items=self._dataset.vocabulary.ids(found.items),
            actions=found.actions,
            times=found.times,
            num_before=start,
        )

    def _row(self, user: int | str) -> int:
        return self._dataset.row_of(user) if self._dataset else -1


class CurrentBase:
    """The base that the `sequences.current` pointer of a data set names. Safe to share between threads."""

    def __init__(self, home: Path, ds: str, *, user_id_type: str, item_id_type: str) -> None:
        """Sequences whose ids are of other types than these are left aside: none of their users could be asked for."""
        self._parent = home / "sequences" / ds
        self._types = (user_id_type, item_id_type)
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._base = Base(None, 0.0)
        self._seen = (0, 0)
        self._next_check = self._retry_at = 0.0
        self.get()
        self.wait()

    def get(self) -> Base:
        """Return the base as of a second ago at most, or the one before while a new one is being opened."""
        now = time.monotonic()
        if now >= self._next_check:
            with self._lock:
                if now >= self._next_check:
                    self._next_check = now + CHECK_S
                    self._look(now)
        return self._base

    def wait(self) -> None:
        """Return when no base is being opened."""
        with self._loading:
            pass

    def _look(self, now: float) -> None:
        try:
            found = (self._parent / "sequences.current").stat()
        except OSError:
            return
        changed = (found.st_mtime_ns, found.st_ino)
        if (changed != self._seen or now >= self._retry_at > 0) and self._loading.acquire(blocking=False):
            self._retry_at = 0.0
            self._seen = changed
            threading.Thread(target=self._load, args=(found.st_mtime,), name="history-base", daemon=True).start()

    def _load(self, since_s: float) -> None:
        try:
            dataset = SequenceDataset.open(storage.current(self._parent, "sequences"))
            declared = dataset.declaration
            if (declared.user_id_type, declared.item_id_type) != self._types:
                raise UserError(
                    f"the sequences have {declared.user_id_type} users and {declared.item_id_type} items, the served "
                    f"models {self._types[0]} and {self._types[1]}; deploy models of these sequences"
                )
            self._base = Base(dataset, since_s)
            log.info("event=history_base_opened users=%d digest=%s", dataset.num_users, dataset.digest)
        except Exception as error:
            # A thread of its own: raised here, it would reach nobody, and requests go on with the base before.
            log.warning("event=history_base_not_opened reason=%s", error)
            self._retry_at = time.monotonic() + RETRY_S
        finally:
            self._loading.release()

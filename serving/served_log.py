"""The served log: what was answered, as Parquet files that a thread of its own writes.

Invariant: `record` never waits for a disk and never raises. A part appears whole, by a rename, and is never appended
to. What cannot be kept is counted: rows beyond the queue's bound, parts beyond the bound on disk, failed writes. A
failed write is tried again with the rows that wait. No user id is written, only its keyed hash.
"""

import contextlib
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq

from gr_platform import serving_state
from gr_platform.errors import UserError
from serving.served_rows import Served, ServedBy, day_of, table_of

log = logging.getLogger(__name__)
_WRITING = ".writing-"
_ABANDONED_S = 3600
_TRY_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LogBounds:
    """A part ends with `part_rows` rows or `part_s` seconds after its first; at most `total_bytes` lie on disk.

    queue_rows, queue_bytes: rows that may wait in memory, and roughly their size.
    """

    part_rows: int = 10_000
    part_s: float = 60.0
    total_bytes: int = 1 << 30
    queue_rows: int = 50_000
    queue_bytes: int = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LogCounters:
    """Since the start: rows written; rows dropped; writes that failed; parts deleted for room."""

    num_written: int = 0
    num_dropped: int = 0
    num_failed: int = 0
    num_deleted: int = 0


class ServedLog:
    """The log of one server model in `folder`: `date=YYYY-MM-DD/part-*.parquet`. Safe to share between threads."""

    def __init__(
        self, folder: Path, by: ServedBy, *, hash_user: Callable[[str], str], bounds: LogBounds | None = None
    ) -> None:
        """`hash_user` stands for a user id in the log; called by the writing thread, it may raise OSError."""
        self._folder, self._by, self._hash_user = folder, by, hash_user
        self._bounds = bounds or LogBounds()
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Served, int]] = deque()
        self._num_taken = self._queued_bytes = 0
        self._first_s = 0.0
        self._closing = False
        self._counters = LogCounters()
        self._thread = threading.Thread(target=self._run, name="served-log", daemon=True)
        self._thread.start()

    @property
    def counters(self) -> LogCounters:
        """What happened so far."""
        return self._counters

    def record(self, entry: Served) -> None:
        """Take an answer to be written soon; dropped and counted if too many wait already or the log is closed."""
        size = entry.size_bytes
        with self._changed:
            full = (
                len(self._waiting) + self._num_taken >= self._bounds.queue_rows
                or self._queued_bytes + size > self._bounds.queue_bytes
            )
            if full or self._closing:
                self._count(num_dropped=1)
                return
            if not self._waiting:
                self._first_s = time.monotonic()
            self._waiting.append((entry, size))
            self._queued_bytes += size
            if len(self._waiting) in (1, self._bounds.part_rows):
                self._changed.notify()

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what waits and end the thread; rows that cannot be written now are dropped and counted."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        self._sweep()
        while taken := self._take():
            try:
                self._write(taken)
            except (OSError, UserError) as error:
                log.warning("event=served_log_not_written rows=%d reason=%s", len(taken), error)
                self._put_back(taken)
            except Exception:
                # A thread of its own: raised here, it would end the log for good.
                log.exception("event=served_log_rows_lost rows=%d", len(taken))
                self._done(taken, num_failed=1, num_dropped=len(taken))

    def _take(self) -> list[tuple[Served, int]]:
        """Wait for a part's worth of rows of one day and take them; none when the log is closed and empty."""
        with self._changed:
            while not self._closing and len(self._waiting) < self._bounds.part_rows:
                left = self._first_s + self._bounds.part_s - time.monotonic() if self._waiting else None
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            taken: list[tuple[Served, int]] = []
            while self._waiting and len(taken) < self._bounds.part_rows:
                if taken and day_of(self._waiting[0][0]) != day_of(taken[0][0]):
                    break
                taken.append(self._waiting.popleft())
            self._num_taken = len(taken)
            self._first_s = time.monotonic()
            return taken

    def _put_back(self, taken: list[tuple[Served, int]]) -> None:
        """Let rows wait again after a failed write, or drop them at the end."""
        if self._closing:
            self._done(taken, num_failed=1, num_dropped=len(taken))
            return
        with self._changed:
            self._count(num_failed=1)
            self._waiting.extendleft(reversed(taken))
            self._num_taken = 0
            self._first_s = time.monotonic()
            # However many wait, a disk that was full a moment ago is asked again only after a while.
            self._changed.wait_for(lambda: self._closing, max(self._bounds.part_s, _TRY_AGAIN_S))

    def _done(self, taken: Sequence[tuple[Served, int]], **counts: int) -> None:
        with self._changed:
            self._queued_bytes -= sum(size for _, size in taken)
            self._num_taken = 0
            self._count(**counts)

    def _count(self, **counts: int) -> None:
        with self._changed:
            known = self._counters
            self._counters = replace(known, **{name: getattr(known, name) + count for name, count in counts.items()})

    def _write(self, taken: list[tuple[Served, int]]) -> None:
        hashed = [(entry, None if entry.user is None else self._hash_user(entry.user)) for entry, _ in taken]
        # Held together with the look for forgotten users: whoever is forgotten later has this part looked through.
        with serving_state.log_lock(self._folder):
            gone = serving_state.forgotten_users(self._folder)
            rows = [(entry, user) for entry, user in hashed if entry.served_ts > gone.get(user or "", -1)]
            if rows:
                self._write_part(rows)
            self._done(taken, num_written=len(rows))
            try:
                self._trim()
            except OSError as error:
                # The rows are written: failing here must not write them again.
                log.warning("event=served_log_not_trimmed reason=%s", error)
                self._count(num_failed=1)

    def _write_part(self, rows: list[tuple[Served, str | None]]) -> None:
        first = rows[0][0]
        folder = self._folder / f"date={day_of(first)}"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = f"part-{first.served_ts}-{secrets.token_hex(4)}.parquet"
        staged = folder / f"{_WRITING}{name}"
        try:
            with open(os.open(staged, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as stream:
                pq.write_table(table_of(rows, self._by), stream, compression="zstd")
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(staged, folder / name)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise

    def _trim(self) -> None:
        """Delete the oldest parts beyond the bound, and days without parts."""
        sizes = []
        for part in serving_state.log_parts(self._folder):
            with contextlib.suppress(FileNotFoundError):
                sizes.append((part, part.stat().st_size))
        total = sum(size for _, size in sizes)
        for part, size in sizes:
            if total <= self._bounds.total_bytes:
                return
            part.unlink(missing_ok=True)
            total -= size
            self._count(num_deleted=1)
            with contextlib.suppress(OSError):
                part.parent.rmdir()

    def _sweep(self) -> None:
        """Delete what killed writers left half-written."""
        for staged in self._folder.glob(f"date=*/{_WRITING}*"):
            with contextlib.suppress(OSError):
                if time.time() - staged.stat().st_mtime > _ABANDONED_S:
                    staged.unlink()

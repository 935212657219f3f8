"""The events that users got since the last sequences, in one SQLite file that several processes share.

Invariant: a call's events are stored whole or not at all. One (user, item, time) is one event, whose place among those
of its time is that of its first arrival and whose mask is the union of all that came. What of a user is dropped for
room is counted in the user's row, so that the history keeps its length; a user who was quiet longest may be dropped
whole. The file is private to its owner.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np

from gr_platform.errors import UserError
from serving.history_file import (
    PRUNE_STEP,
    User,
    connect,
    count_events,
    fact,
    forget_until,
    range_of,
    set_up,
    size_bytes,
    transaction,
    users_after,
)

_SHRINK_TO = 0.9
_SHRINK_USERS = 0.02
_INSERT = """
INSERT INTO events VALUES (?, ?, ?, ?, ?)
ON CONFLICT (user_id, time_ms, item_id) DO UPDATE SET actions = actions | excluded.actions
"""
_TOUCH = """
INSERT INTO users VALUES (:user, :places, :dropped, :until, :now)
ON CONFLICT (user_id) DO UPDATE SET num_places = :places, num_dropped = :dropped, dropped_until = :until,
touched_ms = :now
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much is kept: newest events of a user, and bytes of the file's pages in use (least recent users go first)."""

    events_per_user: int = 10_000
    total_bytes: int = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """The last appended events of a user (ids as they came; int64), oldest first.

    num_before: stored events that came before them; num_dropped: those dropped for room, all before the stored ones.
    """

    items: list[User]
    actions: np.ndarray
    times: np.ndarray
    num_before: int
    num_dropped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Appended:
    """What became of a call's events: kept (or merged), known to the base already, too late; the length now."""

    num_kept: int
    num_known: int
    num_late: int
    length: int


class HistoryStore:
    """An open store. Safe to share between threads and processes."""

    def __init__(self, path: Path, *, id_types: str, bounds: Bounds | None = None) -> None:
        """`id_types` says what ids are; a store of others is emptied, as its ids mean nothing now.

        Raises UserError if the file is damaged or of another release, sqlite3.Error if it cannot be written.
        """
        self._path = path
        self._bounds = bounds or Bounds()
        self._idle: SimpleQueue[sqlite3.Connection] = SimpleQueue()
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        try:
            with self._connection() as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                with transaction(connection):
                    set_up(connection, self._path.name, id_types)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            raise UserError(
                f"$GR_HOME/histories/{path.name} is damaged ({error}); stop the server and delete it: what was "
                "appended since the last sequences is lost"
            ) from None

    def append_all(
        self, batch: Sequence[tuple[User, Sequence[tuple[User, int, int]], int | None]], now_ms: int
    ) -> list[Appended]:
        """Store (user, events, after) in one transaction; return what became of each. Raises sqlite3.Error."""
        with self._connection() as connection, transaction(connection):
            done = [self._append(connection, user, events, after, now_ms) for user, events, after in batch]
            self._shrink(connection)
        return done

    def tail(self, user: User, limit: int, *, after: int | None, until: int | None = None) -> Tail:
        """Return the last `limit` stored events of a user later than `after` and not later than `until` (ms)."""
        with self._connection() as connection, transaction(connection, "BEGIN"):
            known = connection.execute("SELECT num_dropped, dropped_until FROM users WHERE user_id = ?", (user,))
            num_dropped, dropped_until = known.fetchone() or (0, None)
            if dropped_until is None or (after is not None and after >= dropped_until):
                num_dropped = 0
            where, values = range_of(user, after, until)
            rows = connection.execute(
                f"SELECT item_id, actions, time_ms FROM events WHERE {where} "  # noqa: S608 - no value is in the text
                "ORDER BY time_ms DESC, place DESC LIMIT ?",
                (*values, limit),
            ).fetchall()[::-1]
            count = len(rows) if len(rows) < limit else count_events(connection, user, after, until)
        return Tail(
            items=[row[0] for row in rows],
            actions=np.array([row[1] for row in rows], np.int64),
            times=np.array([row[2] for row in rows], np.int64),
            num_before=count - len(rows),
            num_dropped=num_dropped,
        )

    def prune(self, digest: str, last_times: Callable[[list], list[int | None]]) -> int:
        """Delete what the sequences `digest` hold (events not after each user's last); return how many events.

        Some users at a time, so that appends go on meanwhile. Does nothing if it was done for these sequences.
        """
        with self._connection() as connection:
            if fact(connection, "pruned") == digest:
                return 0
            num_deleted, users = 0, users_after(connection, None)
            while users:
                pairs = zip(users, last_times(users), strict=True)
                known = [(user, last) for user, last in pairs if last is not None]
                for first in range(0, len(known), PRUNE_STEP):
                    with transaction(connection):
                        num_deleted += sum(
                            forget_until(connection, user, last) for user, last in known[first : first + PRUNE_STEP]
                        )
                users = users_after(connection, users[-1])
            with transaction(connection):
                connection.execute("INSERT OR REPLACE INTO facts VALUES ('pruned', ?)", (digest,))
        return num_deleted

    def size_bytes(self) -> int:
        """Return the bytes of the pages in use."""
        with self._connection() as connection:
            return size_bytes(connection)

    def close(self) -> None:
        """Close the connections; a call after it opens a new one."""
        while True:
            try:
                self._idle.get_nowait().close()
            except Empty:
                return

    def _append(
        self,
        connection: sqlite3.Connection,
        user: User,
        events: Sequence[tuple[User, int, int]],
        after: int | None,
        now_ms: int,
    ) -> Appended:
        known = connection.execute(
            "SELECT num_places, num_dropped, dropped_until FROM users WHERE user_id = ?", (user,)
        ).fetchone()
        places, dropped, until = known or (0, 0, None)
        if until is not None and after is not None and after >= until:
            dropped, until = 0, None
        fresh = [event for event in events if after is None or event[2] > after]
        kept = [event for event in fresh if until is None or event[2] > until]
        # A call that brings nothing, as a canary, changes nothing: its user stays as quiet as before.
        if kept or (known and until != known[2]):
            connection.executemany(
                _INSERT, [(user, ms, item, mask, places + at) for at, (item, mask, ms) in enumerate(kept)]
            )
            lost, until = self._cut(connection, user, after, until)
            dropped += lost
            row = {"user": user, "places": places + len(kept), "dropped": dropped, "until": until, "now": now_ms}
            connection.execute(_TOUCH, row)
        return Appended(
            num_kept=len(kept),
            num_known=len(events) - len(fresh),
            num_late=len(fresh) - len(kept),
            length=dropped + count_events(connection, user, after, None),
        )

    def _cut(
        self, connection: sqlite3.Connection, user: User, after: int | None, until: int | None
    ) -> tuple[int, int | None]:
        """Drop a user's oldest events beyond the bound, whole moments; return how many, and the time of the last."""
        surplus = count_events(connection, user, after, None) - self._bounds.events_per_user
        if surplus <= 0:
            return 0, until
        where, values = range_of(user, after, None)
        last = connection.execute(
            f"SELECT time_ms FROM events WHERE {where} ORDER BY time_ms LIMIT 1 OFFSET ?",  # noqa: S608
            (*values, surplus - 1),
        ).fetchone()[0]
        lost = count_events(connection, user, after, last)
        connection.execute("DELETE FROM events WHERE user_id = ? AND time_ms <= ?", (user, last))
        return lost, last

    def _shrink(self, connection: sqlite3.Connection) -> None:
        """Drop the users who were quiet longest until the file's pages in use are within the bound again."""
        if size_bytes(connection) <= self._bounds.total_bytes:
            return
        while size_bytes(connection) > _SHRINK_TO * self._bounds.total_bytes:
            num_users = connection.execute("SELECT count(*) FROM users").fetchone()[0]
            if not num_users:
                return
            quiet = connection.execute(
                "SELECT user_id FROM users ORDER BY touched_ms LIMIT ?", (max(1, int(_SHRINK_USERS * num_users)),)
            ).fetchall()
            for table in ("events", "users"):
                connection.executemany(f"DELETE FROM {table} WHERE user_id = ?", quiet)  # noqa: S608

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = self._idle.get_nowait()
        except Empty:
            connection = connect(self._path)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        self._idle.put(connection)

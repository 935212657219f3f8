"""The SQLite file of appended events: its tables, and the few statements on them that more than one place needs.

Invariant: no value is part of a statement's text. Readers never wait for writers (WAL), and a writer that finds another
waits BUSY_S at most. The file's rows are zeroed when they are deleted.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gr_platform.errors import UserError

SCHEMA_VERSION = 1
BUSY_S = 2.0
# Users looked up in the sequences at once, which goes through all of these, and pruned in one transaction.
PRUNE_USERS = 20_000
PRUNE_STEP = 500
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS users (
    user_id PRIMARY KEY, num_places INTEGER NOT NULL, num_dropped INTEGER NOT NULL, dropped_until INTEGER,
    touched_ms INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS users_touched ON users (touched_ms);
CREATE TABLE IF NOT EXISTS events (
    user_id NOT NULL, time_ms INTEGER NOT NULL, item_id NOT NULL, actions INTEGER NOT NULL, place INTEGER NOT NULL,
    PRIMARY KEY (user_id, time_ms, item_id)
) WITHOUT ROWID;
"""

User = int | str


def connect(path: Path) -> sqlite3.Connection:
    """Return a connection without transactions of its own, that any one thread at a time may use."""
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    for pragma in ("synchronous = NORMAL", "secure_delete = ON", "journal_size_limit = 67108864"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def set_up(connection: sqlite3.Connection, name: str, id_types: str) -> None:
    """Make the tables that are missing; empty them if they hold ids of other types. Raises UserError."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, SCHEMA_VERSION):
        raise UserError(
            f"$GR_HOME/histories/{name} has schema version {version}, this release reads "
            f"{SCHEMA_VERSION}; stop the server and delete it"
        )
    for statement in filter(str.strip, _SCHEMA.split(";")):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    if fact(connection, "id_types") not in (None, id_types):
        for table in ("events", "users", "facts"):
            connection.execute(f"DELETE FROM {table}")  # noqa: S608
    connection.execute("INSERT OR REPLACE INTO facts VALUES ('id_types', ?)", (id_types,))


@contextmanager
def transaction(connection: sqlite3.Connection, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
    """Commit what is done inside, or nothing of it."""
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # A full disk has rolled back already.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def range_of(user: User, after: int | None, until: int | None) -> tuple[str, tuple[User, ...]]:
    """Return the condition of a user's events later than `after` and not later than `until`, and its values."""
    parts: list[tuple[str, User | None]] = [("user_id = ?", user), ("time_ms > ?", after), ("time_ms <= ?", until)]
    given = [(text, value) for text, value in parts if value is not None]
    return " AND ".join(text for text, _ in given), tuple(value for _, value in given)


def count_events(connection: sqlite3.Connection, user: User, after: int | None, until: int | None) -> int:
    """Return how many events of a user are later than `after` and not later than `until`."""
    where, values = range_of(user, after, until)
    return int(connection.execute(f"SELECT count(*) FROM events WHERE {where}", values).fetchone()[0])  # noqa: S608


def forget_until(connection: sqlite3.Connection, user: User, last: int) -> int:
    """Delete a user's events not after `last`, and the user's row if it says nothing any more; return how many."""
    deleted = connection.execute("DELETE FROM events WHERE user_id = ? AND time_ms <= ?", (user, last)).rowcount
    connection.execute(
        "UPDATE users SET num_dropped = 0, dropped_until = NULL WHERE user_id = ? AND dropped_until <= ?", (user, last)
    )
    if not count_events(connection, user, None, None):
        connection.execute("DELETE FROM users WHERE user_id = ? AND num_dropped = 0", (user,))
    return deleted


def fact(connection: sqlite3.Connection, name: str) -> str | None:
    """Return a noted fact, or None."""
    found = connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return found[0] if found else None


def size_bytes(connection: sqlite3.Connection) -> int:
    """Return the bytes of the pages in use."""
    pages, free, size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)


def users_after(connection: sqlite3.Connection, user: User | None) -> list:
    """Return the next PRUNE_USERS users behind `user`, in the order of their ids."""
    where, values = ("", ()) if user is None else ("WHERE user_id > ?", (user,))
    rows = connection.execute(
        f"SELECT user_id FROM users {where} ORDER BY user_id LIMIT ?",  # noqa: S608
        (*values, PRUNE_USERS),
    )
    return [row[0] for row in rows]

"""`gr forget` in what the model server keeps: the appended histories and the served log.

Invariant: it may run while the server serves. A forgotten row is in no file afterwards, and rows of the log that the
server has not written yet are dropped when it does; other people's rows stay as they were. A run that was killed is
finished by running it again.
"""

import contextlib
import os
import secrets
import shutil
import sqlite3
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr_platform import serving_state
from gr_platform.errors import UserError
from gr_platform.events.declaration import IdType

HISTORIES = "the server's histories"
SERVED_LOG = "the served log"
_WAIT_S = 30.0


def erase_served(home: Path, ds: str, user_id: str, id_type: IdType) -> dict[str, int]:
    """Return where rows of a user were erased -> how many. Raises UserError if a file is damaged or in use."""
    serving_state.forget_recent(home)
    found = {HISTORIES: _erase_history(home, ds, user_id, id_type), SERVED_LOG: _erase_log(home, ds, user_id)}
    return {name: count for name, count in found.items() if count}


def _erase_history(home: Path, ds: str, user_id: str, id_type: IdType) -> int:
    path = serving_state.histories_file(home, ds)
    user: int | str = int(user_id) if id_type == "int64" else user_id
    if not path.exists() or (isinstance(user, int) and not -(2**63) <= user < 2**63):
        return 0
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)) as connection:
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("BEGIN IMMEDIATE")
            count = connection.execute("DELETE FROM events WHERE user_id = ?", (user,)).rowcount
            connection.execute("DELETE FROM users WHERE user_id = ?", (user,))
            connection.execute("COMMIT")
            # What was deleted still stands in the file of changes until they are moved into the store.
            busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    except sqlite3.Error as error:
        raise UserError(f"the histories of {ds} cannot be changed now ({error}); run this again") from None
    if busy:
        raise UserError(f"the histories of {ds} are being read just now; run this again")
    return count


def _erase_log(home: Path, ds: str, user_id: str) -> int:
    folder = serving_state.served_folder(home, ds)
    if not folder.is_dir() or not (home / serving_state.KEY).exists():
        return 0
    hashed = serving_state.user_hash(serving_state.hash_key(home), ds, user_id)
    with serving_state.log_lock(folder):
        serving_state.remember_forgotten(folder, hashed, time.time_ns() // 1_000_000)
        count = sum(_erase_part(part, hashed) for part in serving_state.log_parts(folder))
    # Made from the log, and made again from what is left of it.
    shutil.rmtree(folder / "outcomes", ignore_errors=True)
    return count


def _erase_part(part: Path, hashed: str) -> int:
    """Write a part again without a user's rows, if it has any; return their number."""
    try:
        users = pq.ParquetFile(part).read(columns=["user_hash"])["user_hash"]
        count = pc.sum(pc.equal(users, hashed)).as_py() or 0
        if not count:
            return 0
        table = pq.ParquetFile(part).read()
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{part.parent.name}/{part.name} of the served log cannot be read ({type(error).__name__}); delete it and "
            "run this again"
        ) from None
    kept = table.filter(pc.fill_null(pc.not_equal(table["user_hash"], hashed), True))
    if not len(kept):
        part.unlink()
        return count
    staged = part.with_name(f".writing-{secrets.token_hex(4)}-{part.name}")
    try:
        with open(os.open(staged, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as stream:
            pq.write_table(kept, stream, compression="zstd")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staged, part)
    finally:
        staged.unlink(missing_ok=True)
    return count

"""What the model server keeps about people: where it lies, and the keyed hash that stands for a user in its log.

Invariant: a hash tells nothing to whoever lacks the key, a file of the state folder that only its owner may read. The
server writes what is named here, `gr forget` and the `served` asset read it; standard library alone.
"""

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gr_platform import storage
from gr_platform.errors import UserError

KEY = "user-hash.key"
FORGOTTEN = "forgotten.json"
_KEY_BYTES = 32


def histories_file(home: Path, ds: str) -> Path:
    """Return the SQLite file of the events that users' histories got since the last sequences."""
    return home / "histories" / f"{ds}.sqlite"


def served_folder(home: Path, ds: str) -> Path:
    """Return the folder of the served log: `date=YYYY-MM-DD/part-*.parquet`, and FORGOTTEN."""
    return home / "served" / ds


def recent_folder(home: Path) -> Path:
    """Return the folder of the histories that the models were asked for last, without whose they are."""
    return home / "serving" / "recent"


def forget_recent(home: Path) -> None:
    """Delete those histories, all of them, and tell running models to do the same."""
    folder = recent_folder(home)
    if folder.is_dir():
        (folder / FORGOTTEN).touch()
        for file in folder.glob("*.safetensors*"):
            file.unlink(missing_ok=True)


def histories_forgotten_at(folder: Path) -> float:
    """Return when somebody was forgotten last, seconds since the epoch; 0 if nobody was. `folder`: `recent_folder`."""
    try:
        return (folder / FORGOTTEN).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def log_parts(folder: Path) -> list[Path]:
    """Return the finished parts of a served log, oldest first."""
    return sorted(folder.glob("date=*/part-*.parquet"), key=lambda part: (part.parent.name, part.name))


@contextmanager
def log_lock(folder: Path) -> Iterator[None]:
    """Be the only one on this machine who changes the parts of a served log; waits for another who does."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / ".lock").open("wb") as stream:
        # Given up by the system when the file is closed, by a killed process too.
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def user_hash(key: bytes, ds: str, user_id: int | str) -> str:
    """Return the 32 hex digits that stand for a user of a data set."""
    return hashlib.blake2b(f"{ds}\0{user_id}".encode(), key=key, digest_size=16).hexdigest()


def hash_key(home: Path) -> bytes:
    """Return the key of the hashes, drawn at random by whoever asks first. Raises UserError if its file is damaged."""
    path = home / KEY
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        staged = home / f".{KEY}-{secrets.token_hex(4)}"
        try:
            with open(os.open(staged, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as stream:
                stream.write(secrets.token_hex(_KEY_BYTES))
                stream.flush()
                os.fsync(stream.fileno())
            # A link, not a rename: of two who draw one at once, the second must take the first one's.
            os.link(staged, path)
        except FileExistsError:
            pass
        finally:
            staged.unlink(missing_ok=True)
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii"))
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise UserError(
            f"$GR_HOME/{KEY} is damaged; restore it from a backup, or delete it: what was served before then joins "
            "with no user any more"
        )
    return key


def forgotten_users(folder: Path) -> dict[str, int]:
    """Return hash -> when (ms UTC) of users whose earlier rows the server must not write any more."""
    try:
        return {str(user): int(ms) for user, ms in storage.read_object(folder / FORGOTTEN).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError):
        raise UserError(f"{FORGOTTEN} of the served log of {folder.name} is damaged; delete it") from None


def remember_forgotten(folder: Path, hashed: str, now_ms: int, *, keep_ms: int = 24 * 3600 * 1000) -> None:
    """Add a user to the forgotten ones; entries older than `keep_ms` go: no row waits that long to be written."""
    try:
        known = {user: ms for user, ms in forgotten_users(folder).items() if ms > now_ms - keep_ms}
    except UserError:
        known = {}
    storage.write_text(folder / FORGOTTEN, json.dumps(known | {hashed: now_ms}, indent=1, sort_keys=True) + "\n")

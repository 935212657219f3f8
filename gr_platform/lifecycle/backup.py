"""A copy of the state folder in one file, taken while the platform runs, and the way back.

Invariant: a backup is there whole or not at all, and a restore takes place whole or not at all: what was read and
checked lies in `.restoring/` of the state folder until it is moved into place, which a restore after a kill finishes.
"""

import datetime
import errno
import json
import os
import shutil
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gr_platform import settings, storage
from gr_platform.errors import UserError
from gr_platform.lifecycle import archive, migration
from gr_platform.registry import relocation
from gr_platform.training.unfinished import FOLDERS as CHECKPOINTS

# A run at work is waited for: a copy of half of what it writes would be none.
WAIT_S = 3600.0
LOCKS = ("stages", "landing", "mlflow")
DAGSTER = "dagster_home"
# Of the state folder: what only running programs have, and what can be had again.
_LEFT_OUT = {"logs", "services.json", "serving", "downloads", "replays", migration.RESTORING}
_PASSING = (*storage.TEMPORARY, ".writing-")
_WORKING = ".gr-backup-"
_SQLITE = b"SQLite format 3\0"
_BESIDE_SQLITE = ("-wal", "-shm", "-journal")
_DONE, _TREE = "checked.json", "tree"


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What a backup holds, or a restore brought back. relocated: addresses of MLflow's files that were rewritten."""

    header: archive.Header
    num_bytes: int
    relocated: int = 0


def backup(home: Path, path: Path, *, checkpoints: bool = False, progress: bool = True) -> Copied:
    """Copy the state folder into a new archive `path` (.tar.zst or .tar.gz), readable by its owner alone.

    checkpoints: those of unfinished trainings too. Waits for a run at work. Raises UserError if the file is there
    already, its disk is full, or a database is damaged; then no file is left.
    """
    ending = archive.ending_of(path)
    if path.exists():
        raise UserError(f"{path.name} is there already; name another file")
    if not (home / "landing").is_dir() and not (home / "runs").is_dir():
        raise UserError("there is nothing to back up yet: nothing was imported into this state folder")
    if path.resolve().is_relative_to(home):
        raise UserError(f"{path.name} would lie in the state folder that it is a copy of; name a file elsewhere")
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f"{_WORKING}*"):  # of a backup that was killed
        if time.time() - leftover.stat().st_mtime > storage.LEFTOVER_AGE_S:
            shutil.rmtree(leftover, ignore_errors=True)
    with ExitStack() as held:
        for work in LOCKS:
            held.enter_context(storage.exclusive(home, work, wait_s=WAIT_S))
        try:
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=_WORKING) as working:
                copied = _write(home, Path(working), ending, checkpoints=checkpoints, progress=progress)
                os.rename(Path(working) / "archive", path)
                return copied
        except OSError as error:
            raise _full(path, error) from None


def _full(path: Path, error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return UserError(f"the disk of {path.name} is full; nothing was kept there: free some space, or name another")
    return error


def _write(home: Path, working: Path, ending: str, *, checkpoints: bool, progress: bool) -> Copied:
    found = list(_found(home, checkpoints=checkpoints))
    num_bytes = sum(entry.stat.st_size for entry in found if stat.S_ISREG(entry.stat.st_mode))
    names = {"mlflow": settings.mlflow_db(), "dagster": settings.dagster_db()}
    header = archive.Header(
        home=str(home),
        layout=migration.layout(home),
        release=version("gr-platform"),
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        num_bytes=num_bytes,
        databases={name: "postgresql" if address else "sqlite" for name, address in names.items()},
        checkpoints=checkpoints,
    )
    with open(working / "archive", "xb", opener=_private) as stream, _bar("backup", progress) as bar:
        bar.reset(num_bytes)
        writer = archive.Writer(stream, ending, header)
        for entry in found:
            _add(writer, entry, working)
            bar.update(entry.stat.st_size if stat.S_ISREG(entry.stat.st_mode) else 0)
        writer.close()
    with (working / "archive").open("rb") as stream:
        os.fsync(stream.fileno())
    return Copied(header=header, num_bytes=(working / "archive").stat().st_size)


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    path: Path
    stat: os.stat_result


def _found(home: Path, *, checkpoints: bool) -> Iterator[_Entry]:
    """Yield what belongs into a backup, folders before what is in them."""
    instance = settings.dagster_home()
    elsewhere = not instance.is_relative_to(home)
    passing = _PASSING if checkpoints else (*_PASSING, CHECKPOINTS)
    left_out = _LEFT_OUT | ({DAGSTER} if elsewhere else set())
    for path in sorted(home.iterdir()):
        if path.name not in left_out:
            yield from _below(path, path.name, passing)
    if elsewhere:
        yield from _below(instance, DAGSTER, passing)


def _below(path: Path, name: str, passing: tuple[str, ...]) -> Iterator[_Entry]:
    if path.name.startswith(passing) or path.name.endswith(".lock"):
        return
    try:
        entry = _Entry(name, path, path.lstat())
        inside = sorted(path.iterdir()) if stat.S_ISDIR(entry.stat.st_mode) else []
    except FileNotFoundError:
        return  # swept away meanwhile
    yield entry
    for child in inside:
        yield from _below(child, f"{name}/{child.name}", passing)


def _add(writer: archive.Writer, entry: _Entry, working: Path) -> None:
    mode = entry.stat.st_mode
    if stat.S_ISDIR(mode):
        writer.folder(entry.name, mode & 0o777, entry.stat.st_mtime)
    elif stat.S_ISLNK(mode):
        target = os.readlink(entry.path)
        inside = os.path.normpath(os.path.join(os.path.dirname(entry.name), target))
        if not os.path.isabs(target) and not inside.startswith(".."):
            writer.link(entry.name, target, entry.stat.st_mtime)
    elif stat.S_ISREG(mode) and not _belongs_to_sqlite(entry.path):
        try:
            with entry.path.open("rb") as stream:
                if stream.read(len(_SQLITE)) != _SQLITE:
                    stream.seek(0)
                    writer.file(entry.name, stream, os.fstat(stream.fileno()))
                    return
        except FileNotFoundError:
            return  # swept away meanwhile
        _add_sqlite(writer, entry, working)


def _belongs_to_sqlite(path: Path) -> bool:
    return any(
        path.name.endswith(end) and path.with_name(path.name.removesuffix(end)).is_file() for end in _BESIDE_SQLITE
    )


def _add_sqlite(writer: archive.Writer, entry: _Entry, working: Path) -> None:
    """Add a database that others may be writing: as it was at one moment, by SQLite's own means."""
    copy = working / "database"
    try:
        source = sqlite3.connect(f"file:{entry.path}?mode=rw", uri=True, timeout=60.0)
        target = sqlite3.connect(copy)
        try:
            source.backup(target)
        finally:
            source.close()
            target.close()
        with copy.open("rb") as stream:
            found = os.fstat(stream.fileno())
            fields = list(found)
            fields[stat.ST_MODE], fields[stat.ST_MTIME] = entry.stat.st_mode, int(entry.stat.st_mtime)
            writer.file(entry.name, stream, os.stat_result(fields))
    except sqlite3.DatabaseError as error:
        if "full" in str(error):
            raise OSError(f"No space left on device ({error})") from None
        raise UserError(
            f"$GR_HOME/{entry.name} cannot be copied ({error}); if it is damaged, restore it or delete it"
        ) from None
    finally:
        copy.unlink(missing_ok=True)


def restore(home: Path, path: Path, *, registry: bool = False, progress: bool = True) -> Copied:
    """Bring an archive back into an empty state folder, which may be another one than it was made of.

    registry: also rewrite the addresses of MLflow's files in the PostgreSQL that `GR_MLFLOW_DB` names; those in the
    archive's own SQLite always are. Raises UserError if the folder is not empty, or the archive damaged, foreign or of
    a newer release; nothing is changed then.
    """
    with storage.exclusive(home, "restore"):
        staged = home / migration.RESTORING
        if not (staged / _DONE).is_file():
            _require_empty(home)
            shutil.rmtree(staged, ignore_errors=True)
            (staged / _TREE).mkdir(parents=True)
            try:
                copied = _unpack(home, path, staged / _TREE, registry=registry, progress=progress)
                # The empty folder's own layout; that of the archive comes with its files, if it had one.
                (home / migration.STATE).unlink(missing_ok=True)
                storage.write_text(staged / _DONE, json.dumps(asdict(copied)))
            except BaseException:
                shutil.rmtree(staged, ignore_errors=True)
                raise
        fields = storage.read_object(staged / _DONE)
        for place in sorted((staged / _TREE).iterdir()):
            os.rename(place, home / place.name)
        shutil.rmtree(staged)
        return Copied(**fields | {"header": archive.Header(**fields["header"])})


def _require_empty(home: Path) -> None:
    # What every command leaves: its log, its locks, the layout of a folder that is about to be begun.
    left = {"logs", migration.STATE, migration.RESTORING}
    others = sorted(path.name for path in home.iterdir() if path.name not in left and not path.name.endswith(".lock"))
    if others:
        raise UserError(
            f"the state folder is not empty (it holds {', '.join(others[:3])}): nothing was restored; set GR_HOME to "
            "a new folder"
        )


def _unpack(home: Path, path: Path, tree: Path, *, registry: bool, progress: bool) -> Copied:
    with _bar("restore", progress) as bar:
        header = archive.unpack(path, tree, bar)
    if header.layout > migration.LAYOUT:
        raise UserError(f"{path.name} was made by a newer release ({header.release}); restore it with that one")
    database = tree / "mlflow.db"
    relocated = 0
    if database.is_file():
        relocated = relocation.relocate(f"sqlite:///{database}", home)
    if registry and (address := settings.mlflow_db()):
        relocated += relocation.relocate(address, home)
    return Copied(header=header, num_bytes=header.num_bytes, relocated=relocated)


def _bar(what: str, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(desc=what, unit="B", unit_scale=True, leave=False, disable=None if shown else True)

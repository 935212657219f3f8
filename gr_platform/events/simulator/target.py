"""Where a simulated log goes: what may be replaced, whether it fits, and the step that makes it visible.

Invariant: nothing but an earlier simulated log is ever replaced; until the log is complete it lies in a hidden folder
beside its place, which is gone after any end but a kill, and which the next run to the same place clears.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gr_platform.errors import UserError
from gr_platform.events import catalogue

NAME = "simulated"
METADATA_KEY = b"gr_platform.declaration"
PART = "part-{:05}.parquet"
_OURS = re.compile(r"part-\d{5}(\.catalogue)?\.parquet")


def is_file(out: Path) -> bool:
    """Return whether `out` names one Parquet file; otherwise it names a folder of parts."""
    return out.suffix == ".parquet"


def file_names(out: Path, num_files: int) -> list[str]:
    """Return the names of the log's files, in order of time."""
    return [out.name] if is_file(out) else [PART.format(part) for part in range(num_files)]


def catalogue_name(first: str) -> str:
    """Return the name of the titles beside the first file of a log, where an import of that file finds them."""
    return f"{first.removesuffix('.parquet')}.{catalogue.FILE}"


def check(out: Path, needed_bytes: int) -> None:
    """Raise UserError if `out` holds anything but a simulated log, or its disk less than `needed_bytes`."""
    if is_file(out) and out.is_dir():
        raise UserError(f"{out.name} is a folder; name the file to write, for example {out.name}/log.parquet")
    if is_file(out) and out.exists() and not _is_simulated(out):
        raise UserError(f"{out.name} exists and is no simulated log; name another file")
    if not is_file(out) and out.is_file():
        raise UserError(f"{out.name} is a file; name one that ends in .parquet, or a folder for a log in parts")
    if out.is_mount():
        raise UserError(f"{out.name} is a whole disk, which cannot be replaced at once; name a folder inside it")
    if not is_file(out) and out.is_dir():
        names = sorted(path.name for path in out.iterdir())
        foreign = [name for name in names if not _OURS.fullmatch(name)]
        if names and (foreign or not _is_simulated(out / PART.format(0))):
            raise UserError(f"the folder {out.name} holds other files ({(foreign or names)[0]}); name a new folder")
    above = next(folder for folder in out.parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"{above.name} is a file, so {out.name} cannot be written in it; name another folder")
    if (free := shutil.disk_usage(above).free) < needed_bytes:
        raise UserError(
            f"a log of that size needs about {needed_bytes / 1e9:.1f} GB while it is made, the disk of {out.name} has "
            f"{free / 1e9:.1f} GB free; free some space, or name a place on another disk"
        )


@contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `out`. Raises UserError while another program has it."""
    folder = out.parent / f".building-{out.name}"
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, out)
        for leftover in folder.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def publish(work: Path, made: Path, out: Path) -> None:
    """Move the folder `made` (in the workplace) or, for a single log, its files to where `out` names them."""
    if is_file(out):
        # The log last: what stands beside it is complete by then.
        for path in sorted(made.iterdir(), key=lambda path: path.name == out.name):
            path.replace(out.parent / path.name)
        return
    if out.exists():
        out.rename(work / "replaced")
    made.rename(out)


def metadata(actions: tuple[str, ...]) -> dict[bytes, bytes]:
    """Return what a simulated log says about itself in its schema: name, actions, exclude_seen."""
    return {METADATA_KEY: json.dumps({"name": NAME, "exclude_seen": "all", "actions": list(actions)}).encode()}


def _lock(handle: int, out: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another program is writing {out.name}; wait for it, or name another place") from None


def _is_simulated(path: Path) -> bool:
    try:
        found = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return False
    return METADATA_KEY in found

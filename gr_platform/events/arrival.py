"""A log comes in: its bytes are hashed, and copied or parsed into a Parquet file that later stages read.

Invariant: what is staged is one whole state of the file: a file that changes meanwhile is refused. Parquet is copied
byte for byte; text is parsed once, strictly, and stays text.
"""
# ruff: noqa: S608 - identifiers and strings are quoted by `quoted` and `literal`

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import duckdb

from gr_platform import storage
from gr_platform.errors import UserError, machine_fault
from gr_platform.events.database import literal, quoted
from gr_platform.events.readers import Source, unreadable

_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A log whose bytes are known. copy: the staged copy of a Parquet file, None where there is none."""

    source: Source
    sha256: str
    before: os.stat_result
    copy: Path | None


def receive(source: Source, staging: Path | None) -> Arrival:
    """Return the log hashed, a Parquet file copied into `staging` in the same pass. Raises UserError if it changes."""
    before = source.path.stat()
    copy = None if source.is_text or staging is None else staging / "landed.parquet"
    sha256 = storage.file_sha256(source.path) if copy is None else _copy(source.path, copy)
    _check_unchanged(source.path, before)
    return Arrival(source=source, sha256=sha256, before=before, copy=copy)


def as_parquet(connection: duckdb.DuckDBPyConnection, arrival: Arrival, staging: Path, columns: Iterable[str]) -> Path:
    """Return the Parquet file to read a log from: its copy, itself where nothing was copied, or columns of its text.

    Raises UserError if a line does not fit or the file changed since it was hashed.
    """
    source = arrival.source
    if not source.is_text:
        return arrival.copy or source.path
    parsed = staging / "landed.parquet"
    # JSON lines may have thousands of keys, so what nobody asks for is left out.
    selected = ", ".join(map(quoted, columns))
    try:
        # The order of rows is the file's, so their place in the Parquet file is their number.
        connection.execute(
            f"COPY (SELECT {selected} FROM {source.relation}) TO {literal(str(parsed))} "
            "(FORMAT parquet, COMPRESSION zstd)"
        )
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        if machine_fault(error):  # writing failed, not reading
            raise
        raise unreadable(source.path, error) from None
    _check_unchanged(source.path, arrival.before)
    return parsed


def _copy(path: Path, copy: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream, copy.open("wb") as out:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            out.write(chunk)
    return digest.hexdigest()


def _check_unchanged(path: Path, before: os.stat_result) -> None:
    now = path.stat()
    if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise UserError(f"{path.name} changed while it was read; import it when nothing writes to it any more")

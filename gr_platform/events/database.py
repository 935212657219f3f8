"""DuckDB connections with bounds: memory, threads and where it may spill.

Invariant: nothing is read from or written to the current folder, and results do not depend on the bounds.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import psutil

from gr_platform import settings, storage

MEMORY_LIMIT = "1000MB"
_SPILL = ".spill-"


@contextmanager
def connect(home: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield an in-memory database that spills into a folder of its own under `home`, in UTC, without extensions."""
    home.mkdir(parents=True, exist_ok=True)
    storage.sweep(home)
    _sweep_spills(home)
    with (
        # Two processes must not share a spill folder: DuckDB names its files by number alone.
        tempfile.TemporaryDirectory(dir=home, prefix=f"{_SPILL}{os.getpid()}-") as spill,
        duckdb.connect(":memory:", config=_config(spill)) as connection,
    ):
        connection.execute("SET TimeZone = 'UTC'")
        # Its bar would go to standard output, where commands print their answers.
        connection.execute("SET enable_progress_bar = false")
        yield connection


def _sweep_spills(home: Path) -> None:
    """Delete what killed processes spilled: it may be large, and the run that goes on needs the room."""
    for leftover in home.glob(f"{_SPILL}*"):
        pid = leftover.name.removeprefix(_SPILL).split("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _config(spill: str) -> dict[str, str | bool | int | float | list[str]]:
    return {
        "memory_limit": MEMORY_LIMIT,
        "temp_directory": spill,
        "threads": settings.num_cores(),
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
    }


def quoted(name: str) -> str:
    """Return `name` as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """Return `text` as a quoted SQL string."""
    return "'" + text.replace("'", "''") + "'"


def parquet_of(files: Iterable[Path], *, by_name: bool = False) -> str:
    """Return SQL that reads Parquet files, one after the other; by_name: a column that a file lacks is NULL there."""
    named = ", union_by_name=true" if by_name else ""
    return f"read_parquet([{', '.join(literal(str(file)) for file in files)}], hive_partitioning=false{named})"

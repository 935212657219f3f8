"""What `gr backup`, `gr restore` and `gr migrate` say.

Invariant: what is not in an archive (PostgreSQL's databases, unfinished trainings) is said, never left to be found out.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.lifecycle import migration
from gr_platform.settings import DAGSTER_DB, MLFLOW_DB

OUTSIDE = "{} is in PostgreSQL and not in the archive: pg_dump copies it, {} names it"
_NAMES = {"mlflow": ("MLflow's registry", MLFLOW_DB), "dagster": ("Dagster's history", DAGSTER_DB)}


def backup_report(home: Path, path: Path, *, checkpoints: bool) -> Iterator[str]:
    """Yield the lines of `gr backup`."""
    from gr_platform.lifecycle.backup import backup

    try:
        with storage.exclusive(home, "stages"):
            pass
    except UserError:
        yield "a run is at work on this state folder: waiting for its end"
    done = backup(home, path, checkpoints=checkpoints)
    packed, whole = done.num_bytes / 1e6, done.header.num_bytes / 1e6
    yield f"{path}: {packed:,.1f} MB of {whole:,.1f} MB, readable by you alone: user ids and the hashes' key are in it"
    yield from _outside(done.header.databases)


def restore_report(home: Path, path: Path, *, registry: bool) -> Iterator[str]:
    """Yield the lines of `gr restore`."""
    from gr_platform.lifecycle.backup import restore

    done = restore(home, path, registry=registry)
    yield f"{done.header.num_bytes / 1e6:,.1f} MB of {done.header.created_at} restored into {home}"
    moved = Path(done.header.home) != home
    if moved:
        yield f"it was {done.header.home} then; addresses of MLflow's files rewritten: {done.relocated}"
    if moved and done.header.databases["mlflow"] == "postgresql" and not registry:
        yield "MLflow in PostgreSQL still names that folder: restore there, or with --registry into another new one"
    yield from _outside(done.header.databases)
    if done.header.layout < migration.LAYOUT:
        yield "it was made by an earlier release: run gr migrate"


def migrate_report(home: Path) -> Iterator[str]:
    """Yield the lines of `gr migrate`."""
    if migration.layout(home) < migration.LAYOUT:
        yield "if you have no backup yet, stop this with Ctrl-C and run gr backup first; what is done stays done"
    yield from migration.migrate(home)


def _outside(databases: Mapping[str, str]) -> Iterator[str]:
    for program, where in databases.items():
        if where == "postgresql":
            yield OUTSIDE.format(*_NAMES[program])

"""MLflow's store after its state folder moved: it holds the addresses of files with the whole path.

Invariant: only addresses of files in the artifact folder of some state folder are rewritten, so doing it twice changes
nothing more, and what lies elsewhere (an object store) stays.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Table -> column: where MLflow writes the address of a file.
ADDRESSES = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}
_INSIDE = "/mlartifacts/"


def relocate(address: str, home: Path) -> int:
    """Let a store name its files below the state folder `home`; return how many addresses were rewritten.

    address: of the store, for SQLAlchemy. Whatever folder they name is replaced: the one that the store was made in, or
    an earlier one, if it was copied by other means since.
    """
    import sqlalchemy as sa

    engine = sa.create_engine(address)
    try:
        with engine.begin() as connection:
            there = set(sa.inspect(connection).get_table_names())
            return sum(_relocate(connection, table, name, home) for table, name in ADDRESSES.items() if table in there)
    finally:
        engine.dispose()


def _relocate(connection: Any, table: str, name: str, home: Path) -> int:
    import sqlalchemy as sa

    column, new = sa.column(name, sa.String), f"{home.as_uri()}{_INSIDE}"
    rows, num_rewritten = sa.table(table, column), 0
    for old in sorted({*_folders(connection.execute(sa.select(column).distinct()).scalars())} - {new}):
        moved = sa.literal(new).concat(sa.func.substr(column, len(old) + 1))
        change = sa.update(rows).values({name: moved})
        num_rewritten += connection.execute(change.where(column.startswith(old, autoescape=True))).rowcount
    return num_rewritten


def _folders(addresses: Iterator[str | None]) -> Iterator[str]:
    """Yield the artifact folder of each address that is in one."""
    for each in addresses:
        if each and each.startswith("file:///") and _INSIDE in each:
            yield each.rpartition(_INSIDE)[0] + _INSIDE

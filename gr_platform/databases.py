"""The PostgreSQL databases of Dagster and MLflow, where the environment names any: do they answer?

Invariant: no text made here holds an address. Asked before the libraries ask, which try for up to a minute.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gr_platform import settings
from gr_platform.errors import UserError, database_fault

TIMEOUT_S = 10
_MAKING_TABLES = 0x6772


def require() -> None:
    """Raise UserError unless every database that the environment names answers."""
    for name, address in configured().items():
        require_answer(name, address)


def require_instance(dagster_home: Path) -> None:
    """Raise UserError unless the PostgreSQL of a Dagster instance answers, if that is where its storage is."""
    written, address = dagster_home / "dagster.yaml", settings.dagster_db()
    if address and written.is_file() and settings.DAGSTER_DB in written.read_text(encoding="utf-8"):
        require_answer(settings.DAGSTER_DB, address)


def configured() -> dict[str, str]:
    """Return variable -> address of the databases that the environment names."""
    found = {settings.MLFLOW_DB: settings.mlflow_db(), settings.DAGSTER_DB: settings.dagster_db()}
    return {name: address for name, address in found.items() if address}


@functools.cache
def require_answer(name: str, address: str) -> None:
    """Raise UserError unless the database at an address answers; once it did, it is not asked again.

    name: the variable that the address came from.
    """
    import psycopg2

    try:
        _connect(address).close()
    except psycopg2.Error as error:
        why = database_fault(error) or "the PostgreSQL database refuses the connection"
        # Our own frames tell nothing of whose database it was; the caller knows.
        raise UserError(why.replace(f"{settings.MLFLOW_DB} or {settings.DAGSTER_DB}", name)) from None


def has_table(address: str, table: str) -> bool:
    """Return whether a database has a table. Raises UserError if it does not answer."""
    require_answer(settings.MLFLOW_DB, address)
    connection = _connect(address)
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT to_regclass(%s) IS NOT NULL", (table,))
            return bool(cursor.fetchone()[0])
    finally:
        connection.close()


@contextmanager
def alone(address: str) -> Iterator[None]:
    """Be the only one, on any machine, who makes tables in a database; waits for another who does."""
    # A session's lock: given up when the connection ends, whatever became of the program.
    connection = _connect(address)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_lock(%s)", (_MAKING_TABLES,))
        yield
    finally:
        connection.close()


def _connect(address: str) -> Any:
    import psycopg2

    return psycopg2.connect(address.replace("+psycopg2", "", 1), connect_timeout=TIMEOUT_S)

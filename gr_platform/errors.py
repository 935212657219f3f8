"""The one error a user can mend: its text is a sentence that says what, where and what to do.

Invariant: the command line prints a `UserError` as one sentence and exits with status 2; anything else is a defect
of ours and keeps its traceback. What the operating system refuses (no space, no permission) the user can mend too.
"""

import errno
import traceback
from collections.abc import Iterator
from pathlib import Path

# DuckDB stops spilling short of a full disk and names the setting by which it does.
_NO_SPACE = ("No space left on device", "database or disk is full", "disk I/O error", "'max_temp_directory_size'")
_LOCKED = "database is locked"
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
# What PostgreSQL says -> what is wrong and what to do. Its own text names hosts and users: for the log alone.
_DATABASE = {
    "password authentication failed": "refuses the user or the password; mend them in the variable",
    "No space left on device": "has a full disk; free some there",
    "does not exist": "has no such database, user or table; create it (createdb), or mend the variable",
    "permission denied": "does not let the user create tables; grant that (ALTER DATABASE ... OWNER TO)",
    "read-only transaction": "only reads; point the variable at the primary server",
    "too many": "has no connection left; raise its max_connections",
}
_NO_ANSWER = "does not answer; start it or mend the variable"


class UserError(ValueError):
    """The caller's input or machine is at fault; the message says what it got, what it needs and what to do."""


def sentence_for(error: BaseException) -> str | None:
    """Return what to tell the user about an error they can mend, None for a defect of ours.

    Dagster and others wrap what a stage raised, so the causes are asked too.
    """
    ours = next((each for each in _chain(error) if isinstance(each, UserError)), None)
    return str(ours) if ours is not None else database_fault(error) or machine_fault(error)


def database_fault(error: BaseException) -> str | None:
    """Return the sentence for an error of a PostgreSQL database, without its address; None for any other.

    The driver is known by name, so that nothing is imported for it.
    """
    for each in _chain(error):
        names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(each).__mro__}
        known = [what for text, what in _DATABASE.items() if text in str(each)]
        # Anything else the server objects to is a defect of ours.
        if "psycopg2.Error" in names and (known or names & {"psycopg2.OperationalError", "psycopg2.InterfaceError"}):
            what = (known or [_NO_ANSWER])[0]
            return f"the PostgreSQL database of {_variable(error)} {what}, and run the same command again"
    return None


def _variable(error: BaseException) -> str:
    """Return the variable of the database that an error came from, told by whose code was at work last."""
    whose = ""
    for each in _chain(error):
        for frame, _ in traceback.walk_tb(each.__traceback__):
            package = str(frame.f_globals.get("__name__", "")).partition(".")[0].removesuffix("_postgres")
            whose = package if package in ("dagster", "mlflow") else whose
    return {"dagster": "GR_DAGSTER_DB", "mlflow": "GR_MLFLOW_DB"}.get(whose, "GR_MLFLOW_DB or GR_DAGSTER_DB")


def machine_fault(error: BaseException) -> str | None:
    """Return the sentence for an error that a full disk, a lock or a missing permission caused, None for any other."""
    for each in _chain(error):
        refused = each.errno if isinstance(each, OSError) else None
        # DuckDB and SQLite have errors of their own, which carry the system's reason as text.
        if refused in (errno.ENOSPC, errno.EDQUOT) or any(text in str(each) for text in _NO_SPACE):
            return (
                "the disk of the state folder is full; free some space, or set GR_HOME to a folder with more, and run "
                "the same command again"
            )
        if _LOCKED in str(each):
            return (
                "another program keeps a database of the state folder locked (MLflow's or Dagster's), so that it "
                "cannot be written; wait for it or end it, and run the same command again"
            )
        if isinstance(each, OSError) and refused in _NOT_WRITABLE:
            name = Path(str(each.filename)).name if each.filename else "a file"
            return f"{name} cannot be opened or written ({each.strerror}); mend its permissions, or set GR_HOME"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    # Errors that were raised again elsewhere (Dagster does) can name each other as their causes.
    following, met = error, set[int]()
    while following is not None and id(following) not in met:
        met.add(id(following))
        yield following
        following = following.__cause__ or following.__context__

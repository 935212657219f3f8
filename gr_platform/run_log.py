"""Which run a log line belongs to, and the file where lines go.

Invariant: a line carries the id of the run under way where it was logged: that of its own thread, else the only one of
this process, else the one this process was started for. Two runs at once never lend each other's id.
"""

import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from gr_platform import settings
from gr_platform.errors import UserError

FILE = "logs/gr.log"
# The environment variable by which a process tells those it starts.
VARIABLE = "GR_RUN_ID"
_COMMAND = "gr-"
_PLACE = re.compile(r"(?:(\w+)=)?%(?:%|[-+ #0]*\d*(?:\.\d+)?[a-zA-Z])|(?:^|(?<=\s))(\w+)=([^\s%]+)")

_own: ContextVar[str] = ContextVar("gr_run", default="")
_lock = threading.Lock()
# Another one, since a handler that is closed waits for lines that are being written, and those ask for their run.
_attaching = threading.Lock()
_under_way: list[str] = []
_of_process = ""
_attached: dict[Path, tuple[list[logging.Handler], int, int]] = {}


def current() -> str:
    """Return the id of the run under way here, '' where there is none."""
    if own := _own.get():
        return own
    with _lock:
        others = set(_under_way) - {""}
    return others.pop() if len(others) == 1 else _of_process or settings.run_id()


def dagster_run() -> str:
    """Return the id of the Dagster run under way here, '' where there is none: a command of `gr` is no such run."""
    return "" if current().startswith(_COMMAND) else current()


@contextmanager
def under(run: str) -> Iterator[None]:
    """Have the lines of this block, and of threads that it starts, carry the id of a run."""
    before = _own.get()
    with _lock:
        _under_way.append(run)
    _own.set(run)
    try:
        yield
    finally:
        # Not by a token: Dagster may close what it opened from another context.
        _own.set(before)
        with _lock:
            _under_way.remove(run)


def begin_command(token: str) -> None:
    """Have the lines of this process carry the id of a command, unless it was started for a run."""
    global _of_process
    _of_process = settings.run_id() or _COMMAND + token


def handler(home: Path) -> logging.Handler:
    """Return what appends lines to a state folder's log. Raises UserError if that cannot be written."""
    path = home / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write to the state folder ({error.strerror}); set GR_HOME to a folder of yours"
        ) from None
    made.setFormatter(JsonLines() if settings.log_format() == "json" else Lines())
    return made


@contextmanager
def written(home: Path) -> Iterator[None]:
    """Have what libraries log in this block, in any thread, go to the state folder's log; raises as `handler` does.

    Where it goes there already, as under every command of `gr`, nothing changes.
    """
    path, root = (home / FILE).absolute(), logging.getLogger()
    with _attaching:
        handlers, level, users = _attached.get(path, ([], root.level, 0))
        if not users and not any(getattr(each, "baseFilename", "") == str(path) for each in root.handlers):
            # What nobody else takes is shown on stderr; that it goes to a file too must not end this.
            shown = [] if root.handlers or logging.lastResort is None else [logging.lastResort]
            handlers = [handler(home), *shown]
            for each in handlers:
                root.addHandler(each)
            root.setLevel(min(level, logging.INFO))
        _attached[path] = (handlers, level, users + 1)
    try:
        yield
    finally:
        with _attaching:
            handlers, level, users = _attached.pop(path)
            if users > 1:
                _attached[path] = (handlers, level, users - 1)
            elif handlers:
                root.setLevel(level)
                for each in handlers:
                    root.removeHandler(each)
                handlers[0].close()


class Lines(logging.Formatter):
    """Time, level, logger, run=<id> where there is a run, and the message, which is key=value by convention."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(run)s%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; asked in the thread that logged it, so the run is that thread's."""
        run = current()
        record.run = f"run={run} " if run else ""
        return super().format(record)


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, run, message, and each key=value of the message."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; asked in the thread that logged it, so the run is that thread's."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            **fields_of(record),
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "run": current(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return the keys and values of a message such as `event=reload model=%s`, values as they were logged.

    {} where the message is not made so, because its arguments could not be told apart.
    """
    # A lone mapping is handed over bare.
    values = iter(record.args if isinstance(record.args, tuple) else (record.args,))
    fields: dict[str, Any] = {}
    try:
        for place in _PLACE.finditer(str(record.msg)):
            if place[2]:
                fields[place[2]] = place[3]
            elif not place[0].endswith("%%"):
                value = next(values)
                if place[1]:
                    fields[place[1]] = value if isinstance(value, bool | int | float | str | None) else str(value)
    except StopIteration:
        return {}
    return fields

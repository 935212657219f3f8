"""What happens when something is wrong: a line in `alerts.jsonl`, a warning in the log, and the hooks of the operator.

Invariant: `send` never fails and ends within the hooks' limits, whatever a disk or a hook does. An alert is its kind
and subject: the same again within an hour is not sent. The address of a hook is a secret: no line or file holds it.
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gr_platform import run_log, storage
from gr_platform.errors import UserError
from gr_platform.lifecycle import alert_hooks

log = logging.getLogger(__name__)

FILE = "alerts.jsonl"
# What a hook did not do, as a line of its own: it is no alert and goes to no hook.
HOOK = "alert_hook"
SAME_WITHIN_MS = 3_600_000
# What a hook is told.
TOLD = ("kind", "subject", "text", "at_ms", "run")
MAX_BYTES = 1_000_000
MAX_SUBJECT, MAX_TEXT = 200, 4000
_LOCK_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One line of the file. at_ms: ms UTC; run: the run it came from, '' for none.

    num_alerts, num_failed_hooks: how many there were in the life of the state folder, this line included.
    """

    at_ms: int
    kind: str
    subject: str
    text: str
    run: str = ""
    num_alerts: int = 0
    num_failed_hooks: int = 0


def send(home: Path, kind: str, subject: str, text: str) -> bool:
    """Tell the operator that something is wrong; return whether it was told, False for the same again within an hour.

    kind: a word, such as run_failed; subject: what is wrong, in a line that stays the same while it is wrong; text:
    the figures and what to do.
    """
    alert = Alert(
        at_ms=time.time_ns() // 1_000_000,
        kind=kind,
        subject=_clean(" ".join(subject.split()))[:MAX_SUBJECT],
        text=_clean(text)[:MAX_TEXT],
        run=run_log.current(),
    )
    with ExitStack() as stack:
        # A log that cannot be written is no reason to be silent.
        with suppress(UserError):
            stack.enter_context(run_log.written(home))
        return _send(home, alert)


def read(home: Path, limit: int | None = None) -> list[Alert]:
    """Return the last alerts, oldest first, failures of hooks among them; lines that are damaged are passed over."""
    found = [alert for path in (home / f"{FILE}.1", home / FILE) for alert in _lines(path)]
    return found if limit is None else found[max(0, len(found) - limit) :]


def _clean(text: str) -> str:
    """Return a text without what UTF-8 cannot hold: names of files can carry it."""
    return text.encode("utf-8", "replace").decode()


def _send(home: Path, alert: Alert) -> bool:
    try:
        is_new = _append(home, alert)
    except (OSError, UserError) as error:
        log.error("event=alert_not_kept kind=%s reason=%s", alert.kind, error)
        is_new = not _told_lately(alert)
    if not is_new:
        log.info("event=alert_again kind=%s subject=%r", alert.kind, alert.subject)
        return False
    _told[alert.kind, alert.subject] = alert.at_ms
    log.warning("event=alert kind=%s subject=%r text=%r", alert.kind, alert.subject, alert.text)
    for hook, problem in alert_hooks.run({name: getattr(alert, name) for name in TOLD}):
        log.error("event=alert_hook_failed hook=%s problem=%r", hook, problem)
        failure = Alert(at_ms=alert.at_ms, kind=HOOK, subject=alert.subject, text=f"{hook}: {problem}", run=alert.run)
        try:
            _append(home, failure)
        except (OSError, UserError) as error:
            log.error("event=alert_not_kept kind=%s reason=%s", HOOK, error)
    return True


# What this process told, for a disk that takes no lines: a full one must not call somebody every half minute.
_told: dict[tuple[str, str], int] = {}


def _told_lately(alert: Alert) -> bool:
    return _is_same_hour(alert.at_ms, _told.get((alert.kind, alert.subject), 0))


def _is_same_hour(at_ms: int, before_ms: int) -> bool:
    # Either way: a line from a clock that was ahead must not silence what comes for ever.
    return abs(at_ms - before_ms) < SAME_WITHIN_MS


def _append(home: Path, alert: Alert) -> bool:
    """Add a line and return whether it was not there: an alert is there if it was told within the hour before."""
    with storage.exclusive(home, "alerts", wait_s=_LOCK_S):
        before = read(home)
        known = [a for a in before if (a.kind, a.subject) == (alert.kind, alert.subject)]
        if alert.kind != HOOK and known and _is_same_hour(alert.at_ms, known[-1].at_ms):
            return False
        last = before[-1] if before else alert
        counted = {
            "num_alerts": last.num_alerts + (alert.kind != HOOK),
            "num_failed_hooks": last.num_failed_hooks + (alert.kind == HOOK),
        }
        path = home / FILE
        if path.exists() and path.stat().st_size > MAX_BYTES:
            path.replace(home / f"{FILE}.1")
        with path.open("a+b") as stream:
            # A line that a killed process left unfinished ends here.
            whole = stream.tell() == 0 or (stream.seek(-1, 2) >= 0 and stream.read(1) == b"\n")
            line = json.dumps(asdict(alert) | counted, ensure_ascii=False)
            stream.write(("" if whole else "\n").encode() + line.encode() + b"\n")
    return True


def _lines(path: Path) -> Iterator[Alert]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield Alert(**json.loads(line))
        except (ValueError, TypeError):
            continue

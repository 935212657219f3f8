"""The days of a data set: what the ledger of landed files has of each, and which are missing.

Invariant: reading only; a day is a date in UTC, written YYYY-MM-DD.
"""

import datetime
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gr_platform import storage
from gr_platform.events.ledger import ledger_entries


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """How many files of a day have landed, and how many rows they have."""

    files: int = 0
    rows: int = 0


def landed(home: Path, ds: str) -> dict[str, Landed]:
    """Return day -> what a data set has of it, {} if nothing was landed. Raises UserError if the ledger is damaged."""
    found: dict[str, Landed] = {}
    for entry in ledger_entries(home / "landing" / ds):
        before = found.get(entry.ingest_date, Landed())
        found[entry.ingest_date] = Landed(files=before.files + 1, rows=before.rows + entry.num_rows)
    return found


def gaps(home: Path, ds: str, dates: Iterable[str], *, now_s: float | None = None) -> list[str]:
    """Return in a sentence, if any, what is missing of a data set and these days.

    A day is missing if it is over and nothing of it has landed, though something of an earlier day has. Raises
    UserError if a ledger is damaged.
    """
    today = datetime.datetime.fromtimestamp(time.time() if now_s is None else now_s, datetime.UTC).date().isoformat()
    days = landed(home, ds)
    missing = sorted(date for date in dates if min(days, default=today) < date < today and date not in days)
    if not missing:
        return []
    more = f" and {len(missing) - 1} more day(s)" if len(missing) > 1 else ""
    return [f"{ds} has no data of {missing[0]}{more}"]


def ledger_state(home: Path, ds: str) -> str:
    """Return a digest of all that was landed of a data set so far: another one means that there is something new."""
    folder = home / "landing" / ds
    stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in sorted(folder.rglob("*.json"))]
    return storage.digest_of([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])[:16]


def stretches(dates: Iterable[str]) -> list[tuple[str, str]]:
    """Return first and last of each unbroken stretch of days (YYYY-MM-DD), in order."""
    found: list[tuple[datetime.date, datetime.date]] = []
    for day in sorted(map(datetime.date.fromisoformat, set(dates))):
        if found and day - found[-1][1] == datetime.timedelta(days=1):
            found[-1] = found[-1][0], day
        else:
            found.append((day, day))
    return [(first.isoformat(), last.isoformat()) for first, last in found]


def days_between(first: str, last: str) -> list[str]:
    """Return the days from first to last, both YYYY-MM-DD and included."""
    begin, end = map(datetime.date.fromisoformat, (first, last))
    return [(begin + datetime.timedelta(days=n)).isoformat() for n in range((end - begin).days + 1)]

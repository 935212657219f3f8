"""The inbox: files dropped into `$GR_HOME/inbox/<data set>/` are landed by the day they belong to.

Invariant: a file leaves the inbox only when it has landed or was refused with a reason beside it, and landing goes by
content, so whatever is killed half-way is finished by doing it again. A fault of the machine leaves the file where it
lies. Originals of what has landed are kept until `gr forget`, which cannot tell whom they name.
"""

import datetime
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gr_platform import storage
from gr_platform.errors import UserError

log = logging.getLogger(__name__)

FOLDER = "inbox"
TAKEN, REFUSED = "taken", "refused"
REASON = ".reason.txt"
# The first day that a file can belong to: no log of a recommender is older.
FIRST_DAY = datetime.date(2000, 1, 1)
# A file that was not touched for so long is complete: whoever writes slower names it `.part` meanwhile.
SETTLED_S = 10.0
LANDING_WAIT_S = 600.0
_UNFINISHED = (".part", ".partial", ".tmp", ".crc", ".crdownload", ".download")
# Beside a log of the same stem: its titles, which the import finds by itself.
_CATALOGUE = ".catalogue."
_DAY_FOLDER = re.compile(r"date=(.*)")
_DAY = re.compile(r"(?<!\d)(\d{4}-\d{2}-\d{2})(?!\d)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """A file in the inbox and the day it belongs to. objection: why it belongs to none; then its day is its arrival.

    state: size, time of the last write (ns) and of the last change of any kind (s): another one, another file.
    """

    path: Path
    day: datetime.date
    state: tuple[int, int, float]
    objection: str = ""

    @property
    def date(self) -> str:
        """The day as YYYY-MM-DD."""
        return self.day.isoformat()


@dataclass(slots=True, kw_only=True)
class Taken:
    """What became of a data set's files of one day. rows: of the landed ones; known: of these, how many were there.

    refused: file name -> reason.
    """

    dataset: str
    date: str
    files: int = 0
    rows: int = 0
    known: int = 0
    refused: dict[str, str] = field(default_factory=dict)


def data_sets(home: Path) -> list[str]:
    """Return the data sets that have a folder in the inbox, by name."""
    from gr_platform.events.declaration import check_name

    found = []
    for path in sorted(_inbox(home).glob("*/")):
        try:
            found.append(check_name(path.name))
        except UserError:
            continue
    return found


def waiting(home: Path, ds: str, *, now_s: float | None = None) -> dict[str, list[Drop]]:
    """Return date -> the files of a data set that can be landed, both in order.

    Left out: files touched in the last seconds (`now_s`: seconds since the epoch, default now) and those of tomorrow.
    """
    now_s = time.time() if now_s is None else now_s
    today = _day_of(now_s)
    found: dict[str, list[Drop]] = {}
    for path in sorted(_files(home, ds)):
        state = _state(path)
        if state is None or not _settled(state[2], now_s):
            continue
        arrived = min(_day_of(state[2]), today)
        day, objection = _belongs(path.relative_to(_inbox(home) / ds), arrived=arrived, today=today)
        if day <= today:
            found.setdefault(day.isoformat(), []).append(Drop(path=path, day=day, state=state, objection=objection))
    return dict(sorted(found.items()))


def early(home: Path, names: Iterable[str]) -> dict[str, int]:
    """Return date -> how many files of data sets lie there for a day that has not come, oldest first."""
    today, found = _day_of(time.time()), dict[str, int]()
    for ds in names:
        for path in _files(home, ds):
            if (state := _state(path)) is not None:
                arrived = min(_day_of(state[2]), today)
                day, _ = _belongs(path.relative_to(_inbox(home) / ds), arrived=arrived, today=today)
                if day > today:
                    found[day.isoformat()] = found.get(day.isoformat(), 0) + 1
    return dict(sorted(found.items()))


def take(home: Path, ds: str, date: str, *, now_s: float | None = None) -> Taken:
    """Land a data set's waiting files of one day and return what became of them; the first file ever creates it.

    A refused file goes to `refused/<date>/` with its reason beside it, and the others go on. Raises UserError where
    none can land (the data set is damaged), and what the machine raises (OSError, a full disk): all is left in place.
    """
    drops = waiting(home, ds, now_s=now_s).get(date, [])
    _require_sound(home, ds)
    taken = Taken(dataset=ds, date=date)
    for drop in drops:
        # One file at a time, moved under the same lock: another who takes this day finds it gone, not half done.
        with storage.exclusive(home, "landing", wait_s=LANDING_WAIT_S):
            if drop.path.is_file():
                _take_one(home, drop, taken)
    return taken


def settling(home: Path, ds: str, *, now_s: float | None = None) -> int:
    """Return how many files of a data set may still be written: `waiting` lists them a few seconds later."""
    now_s = time.time() if now_s is None else now_s
    return sum((state := _state(path)) is not None and not _settled(state[2], now_s) for path in _files(home, ds))


def delete_taken(home: Path, ds: str) -> int:
    """Delete the originals of what was landed, which nothing reads any more, and return how many there were."""
    folder = _inbox(home) / ds / TAKEN
    count = sum(1 for path in folder.rglob("*") if path.is_file())
    if count:
        shutil.rmtree(folder)
    return count


def _take_one(home: Path, drop: Drop, taken: Taken) -> None:
    from gr_platform.events.landing import import_file

    name = drop.path.name
    try:
        if drop.objection or not os.access(drop.path, os.R_OK):
            raise UserError(drop.objection or f"{name} may not be read; mend its permissions")
        # Which data set is meant by default is for a person to say, not for whatever arrives next.
        first = not (home / "landing" / "active").is_file()
        file = import_file(drop.path, home=home, activate=first, dataset=taken.dataset, ingest_date=drop.date)
    except UserError as error:
        if _state(drop.path) != drop.state:
            log.info("event=still_written dataset=%s file=%s", taken.dataset, name)
            return
        _refuse(home, drop, taken, str(error))
        return
    taken.files, taken.rows, taken.known = taken.files + 1, taken.rows + file.num_rows, taken.known + file.reused
    folder = _inbox(home) / taken.dataset / TAKEN / taken.date
    for beside in sorted(drop.path.parent.glob(f"{_escaped(drop.path.stem)}{_CATALOGUE}*")):
        beside.rename(_free(folder, beside.name))
    drop.path.rename(_free(folder, name))


def _refuse(home: Path, drop: Drop, taken: Taken, reason: str) -> None:
    folder = _inbox(home) / taken.dataset / REFUSED / taken.date
    target = _free(folder, drop.path.name)
    storage.write_text(target.with_name(target.name + REASON), f"{reason}\n")
    drop.path.rename(target)
    taken.refused[target.name] = reason
    log.warning("event=refused dataset=%s file=%s reason=%s", taken.dataset, drop.path.name, reason)


def _free(folder: Path, name: str) -> Path:
    """Return a path in a folder that nothing has yet: `name`, else with a number before its endings."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, dot, endings = name.partition(".")
    number = 1
    path = folder / name
    while path.exists():
        number += 1
        path = folder / f"{stem}~{number}{dot}{endings}"
    return path


def _require_sound(home: Path, ds: str) -> None:
    """Raise UserError if the data set could take no file at all, so that none is refused for it."""
    from gr_platform.events.declaration import check_name
    from gr_platform.events.ledger import ledger_entries, load_declaration

    if ledger_entries(home / "landing" / check_name(ds)):
        load_declaration(home, ds)


def _belongs(path: Path, *, arrived: datetime.date, today: datetime.date) -> tuple[datetime.date, str]:
    """Return a file's day and '': that of a folder `date=`, else in its name, else in a folder's, else its arrival.

    A day that can be none: the arrival, and why.
    """
    *folders, name = path.parts
    told = next((match[1] for part in reversed(folders) if (match := _DAY_FOLDER.fullmatch(part))), None)
    if told is None:
        texts = [text for part in (name, *reversed(folders)) for text in _DAY.findall(part) if _date(text)]
        told = texts[0] if texts else arrived.isoformat()
    day = _date(told)
    # Where it is tomorrow already, a file of tomorrow is no mistake: it waits.
    if day is None or not FIRST_DAY <= day <= today + datetime.timedelta(days=1):
        return arrived, f"{name} belongs to {told}, no day from {FIRST_DAY} to today; rename its folder or the file"
    return day, ""


def _files(home: Path, ds: str) -> Iterator[Path]:
    root = _inbox(home) / ds
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        done = (TAKEN, REFUSED) if here == root else ()
        folders[:] = [each for each in folders if not each.startswith((".", "_")) and each not in done]
        for name in names:
            path = here / name
            hidden = name.startswith((".", "_")) or name.lower().endswith(_UNFINISHED) or _CATALOGUE in name
            if not hidden and path.is_file():
                yield path


def _state(path: Path) -> tuple[int, int, float] | None:
    """Return what `Drop.state` is, None for a file that was taken or withdrawn."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime


def _settled(changed_s: float, now_s: float) -> bool:
    # Not by the last write: a copy may carry that of its source. A clock may be ahead as well.
    return abs(now_s - changed_s) >= SETTLED_S


def _date(text: str) -> datetime.date | None:
    try:
        return datetime.date.fromisoformat(text) if _DAY.fullmatch(text) else None
    except ValueError:
        return None


def _day_of(seconds: float) -> datetime.date:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date()


def _escaped(stem: str) -> str:
    return "".join(f"[{each}]" if each in "*?[" else each for each in stem)


def _inbox(home: Path) -> Path:
    return home / FOLDER


def strays(home: Path) -> list[str]:
    """Return what lies in the inbox itself and is no data set's folder, by name: nobody takes it."""
    if not _inbox(home).is_dir():
        return []
    known = set(data_sets(home))
    return sorted(p.name for p in _inbox(home).iterdir() if p.name not in known and not p.name.startswith("."))

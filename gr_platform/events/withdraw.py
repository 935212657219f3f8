"""`gr withdraw`: a day that should not have been learned from leaves the landed logs.

Invariant: whole files go, by the date they were landed under; the ledger entry goes first, so one that was killed has
withdrawn a file or not, and is finished by running it again. The next run makes events and sequences without them.
"""

from dataclasses import dataclass
from pathlib import Path

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events.landing import landed_files
from gr_platform.events.ledger import remove

WAIT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawn:
    """What left a data set: the names of the files as they came, and their rows together."""

    dataset: str
    date: str
    files: list[str]
    num_rows: int


def landed_on(home: Path, ds: str, date: str) -> Withdrawn:
    """Return what was landed under a date and could be withdrawn. Raises UserError if nothing was, or nothing else."""
    landed = landed_files(home, ds)
    mine = [file for file in landed if file.ingest_date == date]
    if not mine:
        dates = sorted({file.ingest_date for file in landed})
        raise UserError(f"nothing of {ds} was landed under {date}; its dates: {', '.join(dates[-10:]) or 'none'}")
    if len(mine) == len(landed):
        raise UserError(f"{date} is all that {ds} has; import another log first, or delete the data set's folders")
    names = [file.entry.source_name for file in mine]
    return Withdrawn(dataset=ds, date=date, files=names, num_rows=sum(file.num_rows for file in mine))


def withdraw(home: Path, ds: str, date: str) -> Withdrawn:
    """Delete the landed copies of all files of a date and return what they were. Raises UserError as `landed_on`."""
    with storage.exclusive(home, "stages"), storage.exclusive(home, "landing", wait_s=WAIT_S):
        found = landed_on(home, ds, date)
        for file in landed_files(home, ds):
            if file.ingest_date == date:
                remove(file)
    return found

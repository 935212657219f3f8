"""What `gr land` says: a line for each day and data set of which files were landed or refused.

Invariant: it lands nothing by itself; the job `landing_day` does, on the instance that the UI shows.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gr_platform.commands import pipeline
from gr_platform.errors import UserError
from gr_platform.lifecycle import days, inbox

REFUSED = f"{inbox.FOLDER}/{{ds}}/{inbox.REFUSED}/{{date}}"


def report(home: Path, dagster_home: Path, first: str | None, last: str | None, ds: str | None) -> Iterator[str]:
    """Yield what became of the files of the days from `first` to `last`; without days, of all that wait.

    first alone: until today. ds None: every data set that has an inbox. Raises UserError.
    """
    if last and not first:
        raise UserError("--to was given without --from; name the first day too")
    stretches = [(first, last or time.strftime("%Y-%m-%d", time.gmtime()))] if first else _waiting(home, ds)
    names, landed = [ds] if ds else inbox.data_sets(home), 0
    for begin, end in stretches:
        seen: list[Mapping[str, Any]] = []
        pipeline.land(home, dagster_home, begin, end, dataset=ds or "", on_stage=seen.append)
        for fields in (each for each in seen if each["event"] == "landed"):
            landed += fields["files"]
            yield from _lines(fields)
    dates = [date for begin, end in stretches for date in days.days_between(begin, end)]
    yield from (f"! {gap}" for each in names for gap in days.gaps(home, each, dates))
    yield from (f"! {name} lies in no data set's folder of the inbox" for name in inbox.strays(home))
    if later := sum(inbox.settling(home, each) for each in names):
        yield f"! {later} file(s) were touched in the last {inbox.SETTLED_S:.0f} s and may still be written: land again"
    for date, count in inbox.early(home, names).items():
        yield f"{count} file(s) wait for their day, {date}"
    yield f"{landed:,} file(s) landed" if landed else f"nothing landed; drop files into $GR_HOME/{inbox.FOLDER}/NAME/"


def _waiting(home: Path, ds: str | None) -> list[tuple[str, str]]:
    return days.stretches(
        date for each in ([ds] if ds else inbox.data_sets(home)) for date in inbox.waiting(home, each)
    )


def _lines(fields: Mapping[str, Any]) -> Iterator[str]:
    yield f"{fields['date']}  {fields['name']:<16} {fields['files']:>4} file(s) {fields['rows']:>12,} rows"
    for name, why in fields["refused"].items():
        yield f"  refused {name}: {why}"
    if fields["refused"]:
        yield f"  they lie in {REFUSED.format(ds=fields['name'], date=fields['date'])} of the state folder"

"""The stage before all others: files that were dropped into the inbox are landed, a partition a day."""

import logging
from pathlib import Path

import dagster as dg

from assets.materialization import PREVIEW_ROWS, STAGES, Stage, table, verdict
from assets.resources import StateFolder
from gr_platform.errors import UserError, machine_fault
from gr_platform.lifecycle import days, inbox
from gr_platform.lifecycle.inbox import Taken

POOL = "landing"
# A disk that hiccups or a share that is away for a moment; what is full stays full.
RETRIES, RETRY_AFTER_S = 2, 5.0

# Until tomorrow: a day is a partition as soon as it begins.
partitions = dg.DailyPartitionsDefinition(start_date=inbox.FIRST_DAY.isoformat(), end_offset=1, timezone="UTC")


@dg.asset(
    group_name="data",
    kinds={"duckdb", "parquet"},
    partitions_def=partitions,
    backfill_policy=dg.BackfillPolicy.single_run(),
    pool=POOL,
    check_specs=[
        dg.AssetCheckSpec(
            "arrived", asset="landed_day", description="Each day that is over has data, and no file was refused."
        )
    ],
)
def landed_day(context: dg.AssetExecutionContext, state_folder: StateFolder) -> dg.MaterializeResult:
    """A day's files of every data set in the inbox, landed; refused ones lie in `refused/` with their reason."""
    stage = Stage("landed_day")
    home, dates = state_folder.folder(), list(context.partition_keys)
    names = [state_folder.dataset] if state_folder.dataset else inbox.data_sets(home)
    found, damaged = [], []
    for ds in names:
        try:
            found += _take(home, ds, dates)
        except UserError as error:  # the data set itself: the others land all the same
            damaged.append(error)
        except Exception as error:
            if isinstance(error, OSError) or machine_fault(error):
                raise dg.RetryRequested(max_retries=RETRIES, seconds_to_wait=RETRY_AFTER_S) from error
            raise
    if damaged:
        raise damaged[0]
    known = {ds: days.landed(home, ds) for ds in names}
    for date in dates:
        of_day = [ledger[date] for ledger in known.values() if date in ledger]
        now = [each for each in found if each.date == date]
        figures = {
            "files": sum(each.files for each in of_day),
            "rows": sum(each.rows for each in of_day),
            "new_files": sum(each.files - each.known for each in now),
            "refused_files": sum(len(each.refused) for each in now),
        }
        context.add_asset_metadata(figures, partition_key=date)
    return _finished(stage, home, names, dates, found)


def _take(home: Path, ds: str, dates: list[str]) -> list[Taken]:
    """Return what became of a data set's waiting files, a day at a time; days of which nothing waits are left out."""
    found = []
    for date in sorted(set(inbox.waiting(home, ds)) & set(dates)):
        taken = inbox.take(home, ds, date)
        found.append(taken)
        fields = {"name": ds, "event": "landed", "date": date, "files": taken.files, "rows": taken.rows}
        text = "event=landed dataset=%s date=%s files=%d rows=%d refused=%d"
        values = (ds, date, taken.files, taken.rows, len(taken.refused))
        STAGES.log(logging.INFO, text, *values, extra={"stage": fields | {"refused": taken.refused}})
    return found


def _finished(stage: Stage, home: Path, names: list[str], dates: list[str], found: list[Taken]) -> dg.MaterializeResult:
    faults = [f"{each.dataset}/{name}: {why}" for each in found for name, why in each.refused.items()]
    faults += [gap for ds in names for gap in days.gaps(home, ds, dates)]
    faults += [f"{name} lies in no data set's folder of the inbox" for name in inbox.strays(home)]
    rows = [[each.date, each.dataset, each.files, each.rows, each.known, len(each.refused)] for each in found]
    columns = ["day", "data set", "files", "rows", "there before", "refused"]
    result = stage.finish(
        digest="-".join(days.ledger_state(home, ds) for ds in names) or "empty",
        reused=not found,
        figures={"days": f"{dates[0]} to {dates[-1]}" if len(dates) > 1 else dates[0]},
        preview=table(columns, rows[-PREVIEW_ROWS:]),
    )
    said = f"{sum(each.files for each in found)} files landed, none refused"
    check = verdict("landed_day arrived", faults, said, severity=dg.AssetCheckSeverity.WARN)
    return result._replace(check_results=[check])

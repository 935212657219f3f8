"""When runs are asked for by the clock: yesterday's files, a retraining a day, one from scratch a week.

Invariant: a schedule asks for nothing that would change nothing, and says why; what `lifecycle.toml` leaves empty has
no schedule.
"""

import datetime
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
from dagster._utils.schedules import cron_string_iterator

from assets import runs
from assets.jobs import WAIT_S, Start, retraining_config, retraining_tags
from assets.runs import LANDING_DAY, RETRAINING
from gr_platform import settings
from gr_platform.errors import UserError
from gr_platform.lifecycle import alerts, inbox, options
from gr_platform.lifecycle.options import LifecycleOptions

RUNNING = dg.DefaultScheduleStatus.RUNNING


def schedules(chosen: LifecycleOptions) -> list[dg.ScheduleDefinition]:
    """Return the schedules whose cron line is not empty, all in UTC. Raises UserError naming a line that is no cron."""
    return list(_schedules(chosen))


def _schedules(chosen: LifecycleOptions) -> Iterator[dg.ScheduleDefinition]:
    named = {
        "ingest": ("daily_landing", LANDING_DAY, _landing, "Lands what still waits in the inbox of the day before."),
        "daily": ("daily_retraining", RETRAINING, _daily, "Trains on from the champion, unless nothing is new."),
        "weekly": ("weekly_retraining", RETRAINING, _weekly, "Trains from scratch, unless nothing is new."),
    }
    for option, (name, job, evaluate, description) in named.items():
        line = getattr(chosen.schedule, option)
        if not line:
            continue
        try:
            yield dg.ScheduleDefinition(
                name=name,
                job_name=job,
                cron_schedule=line,
                execution_fn=evaluate,
                execution_timezone="UTC",
                default_status=RUNNING,
                description=description,
            )
        except dg.DagsterInvalidDefinitionError:
            file = f"$GR_HOME/{options.FILE}"
            raise UserError(f"{file}: schedule.{option} is {line!r}, which is no moment of cron; mend it") from None


def nothing_to_train(instance: dg.DagsterInstance, home: Path, start: Start) -> str | None:
    """Return why a retraining of the data set would do nothing or must wait, or None where it should begin.

    From scratch it is a new one if the last that began so had less data, whatever was trained on since.
    """
    from gr_platform.events.landing import active_dataset

    try:
        ds = settings.dataset() or active_dataset(home)
    except UserError as error:
        return str(error)
    if runs.under_way(instance, RETRAINING):
        return "a retraining waits or works already"
    tags = {runs.DATASET: ds, runs.LANDED: runs.landed(home, ds)}
    if start == "scratch":
        tags[runs.START] = start
    done = dg.RunsFilter(job_name=RETRAINING, statuses=[dg.DagsterRunStatus.SUCCESS], tags=tags)
    if instance.get_run_ids(done, limit=1):
        return f"nothing of {ds} was landed since the last retraining"
    return None


def retraining(home: Path, start: Start, reason: str) -> dg.RunRequest:
    """Return the request of a retraining as `lifecycle.toml` wants it now. Raises UserError."""
    chosen = options.read(home)
    return dg.RunRequest(
        run_config=retraining_config(chosen, start, wait_s=WAIT_S), tags=retraining_tags(chosen, start, reason)
    )


def _landing(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    if not inbox.data_sets(settings.home()):
        return dg.SkipReason("no data set has a folder in the inbox")
    day = context.scheduled_execution_time.astimezone(datetime.UTC).date() - datetime.timedelta(days=1)
    return dg.RunRequest(partition_key=day.isoformat())


def _daily(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    return _requested(context, "warm", "daily")


def _weekly(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    return _requested(context, "scratch", "weekly")


def _requested(context: dg.ScheduleEvaluationContext, start: Start, reason: str) -> dg.RunRequest | dg.SkipReason:
    home = settings.home()
    try:
        weekly = options.read(home).schedule.weekly
        if start == "warm" and weekly and _falls_on(weekly, context.scheduled_execution_time):
            return dg.SkipReason("today it is trained from scratch")
        if why := nothing_to_train(context.instance, home, start):
            return dg.SkipReason(why)
        return retraining(home, start, reason)
    except UserError as error:
        # Nobody looks at what a schedule skipped, and models would grow old in silence.
        alerts.send(home, "no_retraining", f"the {reason} retraining was not asked for", str(error))
        return dg.SkipReason(str(error))


def _falls_on(cron: str, moment: datetime.datetime) -> bool:
    """Return whether a cron line fires on the moment's day in UTC."""
    midnight = moment.astimezone(datetime.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return next(cron_string_iterator(midnight.timestamp(), cron, "UTC")).date() == midnight.date()

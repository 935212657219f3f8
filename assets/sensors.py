"""When runs are asked for by what happens: a file arrives, the champion changes, something drifts or fails.

Invariant: a look costs milliseconds while nothing has changed, and a state folder that is empty or damaged is a reason
to skip, never an error: the daemon looks again.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets import automation, runs
from assets.jobs import deploying_config
from assets.runs import DEPLOYING, LANDING_DAY, RETRAINING
from gr_platform import run_log, settings
from gr_platform.errors import UserError

RUNNING = dg.DefaultSensorStatus.RUNNING
RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"
# What was asked for and did not happen is asked for again after so long.
AGAIN_S = 3600.0
Asked = dg.RunRequest | dg.SkipReason


@dg.sensor(job_name=LANDING_DAY, minimum_interval_seconds=15, default_status=RUNNING)
def inbox(context: dg.SensorEvaluationContext) -> Iterator[Asked]:
    """Files wait in the inbox: a run of `landing_day` for each stretch of days they belong to."""
    from gr_platform.lifecycle import inbox as files
    from gr_platform.lifecycle.days import stretches
    from gr_platform.storage import digest_of

    home, found = settings.home(), dict[str, list[Any]]()
    for ds in files.data_sets(home):
        for date, drops in files.waiting(home, ds).items():
            found.setdefault(date, []).extend([ds, str(each.path), *each.state] for each in drops)
    if not found:
        yield dg.SkipReason("nothing waits in the inbox")
        return
    if runs.under_way(context.instance, LANDING_DAY):
        yield dg.SkipReason("a landing waits or works already")
        return
    for first, last in stretches(found):
        lying = [each for date in sorted(found) if first <= date <= last for each in found[date]]
        key = f"{first}-{digest_of([lying, int(time.time() // AGAIN_S)])[:16]}"
        if first == last:
            yield dg.RunRequest(run_key=key, partition_key=first)
        else:
            yield dg.RunRequest(run_key=key, tags={RANGE_START: first, RANGE_END: last})


@dg.sensor(job_name=DEPLOYING, minimum_interval_seconds=30, default_status=RUNNING)
def champion(context: dg.SensorEvaluationContext) -> Asked:
    """The alias `champion` names another pair than the one that is served: a run of `deploying`.

    Asked for when two looks in a row find the same difference, since a promotion moves the alias after the server.
    """
    from gr_platform.lifecycle import agreement

    home, known = settings.home(), _cursor(context)
    state = agreement.signature(home)
    if state and state == known.get("agreed"):
        return dg.SkipReason("neither the registry nor what is served has changed")
    try:
        difference = agreement.difference(home)
    except UserError as error:
        return dg.SkipReason(str(error))
    if difference is None:
        context.update_cursor(json.dumps({"agreed": state}))
        return dg.SkipReason("what is served is what champion names")
    if (said := difference.text) != known.get("difference"):
        context.update_cursor(json.dumps({"difference": said}))
        return dg.SkipReason(f"{said}; if the next look finds that too, it is deployed")
    if runs.under_way(context.instance, DEPLOYING) or time.time() - known.get("asked_s", 0.0) < AGAIN_S:
        return dg.SkipReason(f"{said}; it was asked for already")
    context.update_cursor(json.dumps(known | {"asked_s": time.time()}))
    return dg.RunRequest(
        run_config=deploying_config(dataset=difference.dataset), tags={runs.REASON: said[: runs.MAX_TAG]}
    )


@dg.sensor(job_name=RETRAINING, minimum_interval_seconds=300, default_status=RUNNING)
def drift(context: dg.SensorEvaluationContext) -> Asked:
    """A bound of `lifecycle.toml` is crossed: a retraining, at most one a day and only if there is new data."""
    from gr_platform.events.landing import active_dataset
    from gr_platform.lifecycle import drift as bounds
    from gr_platform.lifecycle import options

    home, today = settings.home(), time.strftime("%Y-%m-%d", time.gmtime())
    if context.cursor == today:
        return dg.SkipReason("a retraining was asked for today already")
    try:
        if not options.read(home).drift.retrain:
            return dg.SkipReason("drift.retrain is false in lifecycle.toml")
        if why := automation.nothing_to_train(context.instance, home, "warm"):
            return dg.SkipReason(why)
        crossed = bounds.crossed(home, settings.dataset() or active_dataset(home))
        if not crossed:
            return dg.SkipReason("no bound is crossed")
        asked = automation.retraining(home, "warm", "; ".join(crossed)[: runs.MAX_TAG])
    except UserError as error:
        return dg.SkipReason(str(error))
    context.update_cursor(today)
    return asked


@dg.run_failure_sensor(minimum_interval_seconds=15, default_status=RUNNING)
def failures(context: dg.RunFailureSensorContext) -> None:
    """A run failed: the alert hook is told which, why, and which checks failed in it."""
    from gr_platform.lifecycle import alerts

    run = context.dagster_run
    checks = _failed_checks(context)
    why = context.failure_event.message or "no reason was recorded"
    if run.tags.get("dagster/will_retry") == "true":
        why += " It is done again."
    subject = f"run of {run.job_name} failed" + (f" at {', '.join(checks)}" if checks else "")
    with run_log.under(run.run_id):
        alerts.send(settings.home(), "run_failed", subject, "\n".join([f"run {run.run_id}: {why}", *checks.values()]))


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.SUCCESS, minimum_interval_seconds=15, default_status=RUNNING, name="failed_checks"
)
def failed_checks(context: dg.RunStatusSensorContext) -> None:
    """A run ended well, but checks in it warned: the alert hook is told what they say."""
    from gr_platform.lifecycle import alerts

    for name, said in _failed_checks(context).items():
        with run_log.under(context.dagster_run.run_id):
            alerts.send(settings.home(), "check_failed", f"check {name} failed", said)


@dg.sensor(minimum_interval_seconds=60, default_status=RUNNING)
def lost_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """A run's process is gone: the run is marked as failed, so that the next one need not wait for it for ever."""
    closed = runs.close_dead(context.instance)
    return dg.SkipReason(f"closed {', '.join(closed)}" if closed else "no run has lost its process")


def _failed_checks(context: dg.RunStatusSensorContext) -> dict[str, str]:
    """Return asset and name of each failed check of a run -> what it said."""
    events = context.instance.all_logs(context.dagster_run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    found = [each.dagster_event.event_specific_data for each in events if each.dagster_event]
    return {
        f"{each.asset_key.to_user_string()} {each.check_name}": f"{each.check_name}: {each.description or 'no reason'}"
        for each in found
        if isinstance(each, dg.AssetCheckEvaluation) and not each.passed
    }


def _cursor(context: dg.SensorEvaluationContext) -> dict[str, Any]:
    try:
        return dict(json.loads(context.cursor or "{}"))
    except ValueError:
        return {}


sensors = [inbox, champion, drift, failures, failed_checks, lost_runs]

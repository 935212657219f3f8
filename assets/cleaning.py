"""The job that deletes what old trainings left and nobody refers to, and its schedule."""

import dagster as dg

from assets.resources import PIPELINE, Platform
from gr_platform.lifecycle.options import LifecycleOptions

CLEANING = "cleaning"


@dg.op(pool=PIPELINE, description="Deletes what `[retention]` of lifecycle.toml lets go, as `gr clean`.")
def delete_old(context: dg.OpExecutionContext, platform: Platform) -> None:
    """Clean the data set's results and tell of each thing that went."""
    from gr_platform.lifecycle.retention import clean

    found = clean(platform.folder(), platform.dataset_name())
    for each in found.doomed:
        context.log.info("deleted %s, %d bytes", each.what, each.num_bytes)
    for sentence in found.left_alone:
        context.log.warning("left alone: %s", sentence)
    figures = {"num_deleted": len(found.doomed), "num_bytes": found.num_bytes, "num_kept": found.num_kept}
    context.add_output_metadata(figures)


@dg.job(name=CLEANING, description="Frees the disk of old runs, bundles and sequences that no role or pointer names.")
def cleaning() -> None:
    """Delete what is old and unnamed."""
    delete_old()


def schedules(options: LifecycleOptions) -> list[dg.ScheduleDefinition]:
    """Return the schedule of the job, none where its cron line is empty."""
    line = options.schedule.cleaning
    status = dg.DefaultScheduleStatus.RUNNING
    made = dg.ScheduleDefinition(
        name="weekly_cleaning",
        job_name=CLEANING,
        cron_schedule=line or "0 0 * * *",
        execution_timezone="UTC",
        default_status=status,
        description="Deletes old results that nobody refers to.",
    )
    return [made] if line else []

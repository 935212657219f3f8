"""What a run says of itself in its tags, so that runs can be searched and told apart, and which of them are dead.

Invariant: every run of the platform names its process, so one whose process is gone is found, whatever ended it.
"""

import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import dagster as dg
import psutil

from gr_platform import processes, provenance

log = logging.getLogger(__name__)

FULL_PIPELINE, RETRAINING, LANDING_DAY, DEPLOYING = "full_pipeline", "retraining", "landing_day", "deploying"
DATASET, DIGEST, COMMIT, RECIPE = "gr/dataset", "gr/dataset_digest", "gr/commit", "gr/recipe"
# start: warm or scratch; landed: state of the ledger when the run began; reason: why a sensor asked for it.
START, LANDED, REASON, PROCESS = "gr/start", "gr/landed", "gr/reason", "gr/process"
# A started run of these jobs that names no process after so long has none.
DEAD_AFTER_S = 60.0
MAX_TAG = 500
UNDER_WAY = (
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
)


def mark(context: dg.InitResourceContext) -> None:
    """Tag the run with its process and the code's commit."""
    pid = os.getpid()
    process = f"{socket.gethostname()} {pid} {psutil.Process(pid).create_time():.1f}"
    record(context, {"process": process, "commit": provenance.git_commit() or "unknown"})


def record(context: dg.InitResourceContext, facts: Mapping[str, str]) -> None:
    """Tag the run with `gr/<name>` for each fact that is known; without a run nothing happens."""
    if context.instance is not None and context.run_id and context.instance.has_run(context.run_id):
        tags = {f"gr/{name}": value[:MAX_TAG] for name, value in facts.items() if value}
        context.instance.add_run_tags(context.run_id, tags)


def landed(home: Path, ds: str) -> str:
    """Return what tells whether something was landed since: the tag `gr/landed` of a run that begins now."""
    from gr_platform.lifecycle.days import ledger_state

    return ledger_state(home, ds)


def under_way(instance: dg.DagsterInstance, job: str) -> bool:
    """Return whether a run of a job waits or works."""
    return bool(instance.get_run_ids(dg.RunsFilter(job_name=job, statuses=list(UNDER_WAY)), limit=1))


def close_dead(instance: dg.DagsterInstance) -> list[str]:
    """Mark runs as failed whose process was ended from outside and return their ids; else they would stay started."""
    found: Sequence[dg.RunRecord] = instance.get_run_records(
        dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING])
    )
    closed = []
    for each in found:
        if _is_dead(each):
            instance.report_run_failed(each.dagster_run, "the process of this run was ended from outside")
            closed.append(each.dagster_run.run_id)
            log.warning("event=run_closed dagster_run=%s reason=its_process_is_gone", each.dagster_run.run_id)
    return closed


def _is_dead(found: dg.RunRecord) -> bool:
    named, job = found.dagster_run.tags.get(PROCESS), found.dagster_run.job_name
    if named is None:
        ours = job in (FULL_PIPELINE, RETRAINING, LANDING_DAY, DEPLOYING)
        return ours and time.time() - (found.start_time or time.time()) > DEAD_AFTER_S
    host, pid, created = named.split()
    return host == socket.gethostname() and processes.find(int(pid), float(created)) is None

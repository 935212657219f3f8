"""What of a Dagster instance goes to Prometheus: assets, checks, runs, the queue, what starts them, the daemon.

Invariant: reading only, by a dozen queries that do not grow with the history. Timestamps are seconds since the epoch.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from prometheus_client.core import Metric

from gr_platform.lifecycle.platform_figures import Family

SEVERITIES = ("ERROR", "WARN")


class DagsterFigures:
    """Reads one instance; the code location and the instance are loaded when it is first asked."""

    def __init__(self, dagster_home: Path) -> None:
        self._dagster_home = dagster_home

    @cached_property
    def _instance(self) -> Any:
        from dagster import DagsterInstance

        return DagsterInstance.from_config(str(self._dagster_home))

    @cached_property
    def _code(self) -> Any:
        from gr_platform.definitions import defs

        return defs.get_repository_def()

    def read(self) -> Iterator[Metric]:
        """Yield all figures of the instance."""
        yield from self._assets()
        yield from self._checks()
        yield from self._runs()
        yield from self._jobs()
        yield from self._automation()
        yield from self._daemons()

    def _assets(self) -> Iterator[Metric]:
        done = Family("gr_asset_last_success_timestamp_seconds", "When an asset was last there", "asset")
        took = Family("gr_asset_last_duration_seconds", "How long that took, next to nothing if it was reused", "asset")
        for record in self._instance.get_asset_records():
            last = record.asset_entry.last_materialization
            if last is None or last.asset_materialization is None:
                continue
            name = record.asset_entry.asset_key.to_user_string()
            done.put(last.timestamp, asset=name)
            took.put(_figure(last.asset_materialization.metadata, "seconds"), asset=name)
        yield from (done, took)

    def _checks(self) -> Iterator[Metric]:
        ok = Family("gr_check_ok", "Whether a check passed when it last ran", "asset", "check", "severity")
        value = Family("gr_check_value", "What a check measured, where that is one figure", "asset", "check")
        bound = Family("gr_check_bound", "From where on it objects", "asset", "check")
        failed = Family("gr_failed_checks", "Checks that failed when they last ran", "severity")
        keys = list(self._code.asset_graph.asset_check_keys)
        latest = self._instance.event_log_storage.get_latest_asset_check_execution_by_key(keys)
        counts = Counter[str]()
        for key, record in latest.items():
            said = record.evaluation
            if said is None:
                continue
            severity, what = said.severity.value, {"asset": key.asset_key.to_user_string(), "check": key.name}
            counts[severity] += not said.passed
            ok.put(said.passed, **what, severity=severity)
            value.put(_figure(said.metadata, "value"), **what)
            bound.put(_figure(said.metadata, "bound"), **what)
        for severity in SEVERITIES:
            failed.put(counts[severity], severity=severity)
        yield from (ok, value, bound, failed)

    def _runs(self) -> Iterator[Metric]:
        from dagster import DagsterRunStatus, RunsFilter

        runs = Family("gr_runs", "Runs by status", "status")
        queue = Family("gr_queue_runs", "Runs that wait to be started")
        oldest = Family("gr_oldest_run_timestamp_seconds", "When the oldest unfinished run was asked for", "status")
        for status in DagsterRunStatus:
            wanted = RunsFilter(statuses=[status])
            count = self._instance.get_runs_count(wanted)
            runs.put(count, status=status.value.lower())
            if status is DagsterRunStatus.QUEUED:
                queue.put(count)
            if count and status in (DagsterRunStatus.QUEUED, DagsterRunStatus.STARTED):
                first = self._instance.get_run_records(wanted, limit=1, ascending=True)
                oldest.put(first[0].create_timestamp.timestamp() if first else None, status=status.value.lower())
        yield from (runs, queue, oldest)

    def _jobs(self) -> Iterator[Metric]:
        from dagster import DagsterRunStatus, RunsFilter

        # Not `job`: that is what Prometheus calls the target itself.
        ended = Family("gr_job_last_end_timestamp_seconds", "When a job last ended so", "dagster_job", "status")
        for job in self._code.job_names:
            if job.startswith("__"):
                continue
            for status in (DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE):
                wanted = RunsFilter(job_name=job, statuses=[status])
                for record in self._instance.get_run_records(wanted, limit=1):
                    ended.put(record.end_time, dagster_job=job, status=status.value.lower())
        yield ended

    def _automation(self) -> Iterator[Metric]:
        labels = ("name", "kind")
        running = Family("gr_automation_running", "Whether a schedule or sensor is switched on", *labels)
        ticked = Family("gr_automation_last_tick_timestamp_seconds", "When it last looked", *labels)
        status = Family("gr_automation_last_tick_status", "How that ended: the status that is 1", *labels, "status")
        states = {(each.name, each.instigator_type.value): each for each in self._instance.all_instigator_state()}
        for name, kind, is_default in self._declared():
            who, state = {"name": name, "kind": kind.lower()}, states.get((name, kind))
            # One that nobody touched has no state yet.
            running.put(is_default if state is None else state.is_running, **who)
            if state is None:
                continue
            for tick in self._instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=1):
                ticked.put(tick.timestamp, **who)
                status.put(1, **who, status=tick.status.value.lower())
        yield from (running, ticked, status)

    def _declared(self) -> Iterator[tuple[str, str, bool]]:
        """Yield each schedule and sensor of the code: name, kind, whether it is on unless somebody switches it off."""
        for kind, declared in (("SCHEDULE", self._code.schedule_defs), ("SENSOR", self._code.sensor_defs)):
            for each in declared:
                yield each.name, kind, each.default_status.value == "RUNNING"

    def _daemons(self) -> Iterator[Metric]:
        beat = Family("gr_daemon_heartbeat_timestamp_seconds", "When a part of the daemon was last alive", "daemon")
        for kind, heartbeat in self._instance.get_daemon_heartbeats().items():
            beat.put(heartbeat.timestamp, daemon=kind.lower())
        yield beat


def _figure(metadata: Mapping[str, Any], name: str) -> Any:
    """Return the value of an entry of metadata, None if there is none."""
    return metadata[name].value if name in metadata else None

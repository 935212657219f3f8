"""Running the asset graph from the command line: the same job, on the same instance, that the UI shows.

Invariant: a stage that fails by the user's data or machine ends in that stage's own UserError, and a failed blocking
check in one that names it; whatever was current before stays current.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from gr_platform import databases, settings, storage
from gr_platform.errors import UserError
from gr_platform.models import recipe_files

StageListener = Callable[[Mapping[str, Any]], None]

LOG_FILE = "pipeline.log"
# Steps write to the terminal itself: Dagster's capture would show a progress bar through `tail`, late and in pieces.
TO_TERMINAL: Any = {
    "compute_logs": {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager"}
}


def materialize(
    home: Path,
    dagster_home: Path,
    *,
    dataset: str = "",
    recipe: str = "auto",
    select: Sequence[str] = (),
    on_stage: StageListener | None = None,
) -> dict[str, dict[str, Any]]:
    """Run the whole graph, or the selected assets, and return what each stage reported: name -> stage fields.

    `dataset` empty means the data set imported last. `dagster_home` holds a dagster.yaml: the instance that the
    UI opens too. Dagster's own log goes to `home/logs/pipeline.log`. `on_stage` is called as stages start and finish.
    recipe: a name, `auto` or the path of a TOML file. Raises UserError.
    """
    # Asked before Dagster is loaded: the most common mistakes are answered at once.
    recipe_files.require_known(recipe)
    ds = _dataset(home, dataset)
    from assets import jobs, runs
    from gr_platform.definitions import defs

    graph = defs.resolve_job_def(runs.FULL_PIPELINE).asset_layer
    known = sorted(key.to_user_string() for key in graph.selected_asset_keys)
    if unknown := [name for name in select if name not in known]:
        raise UserError(f"there is no asset {', '.join(unknown)}; choose among {', '.join(known)}")
    if recipe_files.is_file(recipe):
        recipe = str(Path(recipe).absolute())
    config = jobs.pipeline_config(recipe, list(select) or known, home=str(home), dataset=ds)
    tags = {runs.RECIPE: recipe}
    with storage.exclusive(home, "stages"):
        return _execute(home, dagster_home, runs.FULL_PIPELINE, config, tags, select or known, on_stage)


def retrain(
    home: Path,
    dagster_home: Path,
    *,
    dataset: str = "",
    start: Literal["warm", "scratch"] = "warm",
    reason: str = "by hand",
    on_stage: StageListener | None = None,
) -> dict[str, dict[str, Any]]:
    """Run the job `retraining`, as the schedules do and with the options of `lifecycle.toml`; otherwise as above."""
    from gr_platform.lifecycle import options

    chosen, ds = options.read(home), _dataset(home, dataset)
    recipe_files.require_known(chosen.retraining.recipe)
    from assets import jobs, runs

    config = jobs.retraining_config(chosen, start, home=str(home), dataset=ds)
    tags = jobs.retraining_tags(chosen, start, reason)
    with storage.exclusive(home, "stages"):
        return _execute(home, dagster_home, runs.RETRAINING, config, tags, (), on_stage)


def land(
    home: Path, dagster_home: Path, first: str, last: str, *, dataset: str = "", on_stage: StageListener | None = None
) -> dict[str, dict[str, Any]]:
    """Run the job `landing_day` over the days from `first` to `last` (YYYY-MM-DD), all in one run.

    `dataset` empty means every one that has an inbox. Raises UserError if a day is no partition.
    """
    from assets import inbox, runs
    from assets.sensors import RANGE_END, RANGE_START

    for day in (first, last):
        if not inbox.partitions.has_partition_key(day):
            known = f"{inbox.partitions.get_first_partition_key()} to {inbox.partitions.get_last_partition_key()}"
            raise UserError(f"{day} is no day that files can belong to ({known}); write YYYY-MM-DD")
    if first > last:
        raise UserError(f"the days from {first} to {last} are none; name the earlier one first")
    place = {"home": str(home)} | ({"dataset": dataset} if dataset else {})
    config = {"resources": {"state_folder": {"config": place}}}
    return _execute(home, dagster_home, runs.LANDING_DAY, config, {RANGE_START: first, RANGE_END: last}, (), on_stage)


def make_instance(dagster_home: Path) -> None:
    """Make the tables of a Dagster instance unless they are there.

    Two programs of Dagster that begin at once would both make them, and one of them would end.
    """
    from dagster import DagsterInstance

    with DagsterInstance.from_config(str(dagster_home)) as instance:
        instance.get_runs_count()
        instance.all_instigator_state()
        instance.event_log_storage.get_maximum_record_id()


def _dataset(home: Path, named: str) -> str:
    from gr_platform.events.landing import active_dataset, load_declaration

    ds = named or settings.dataset() or active_dataset(home)
    load_declaration(home, ds)
    return ds


def _execute(
    home: Path,
    dagster_home: Path,
    job: str,
    config: dict[str, Any],
    tags: Mapping[str, str],
    select: Sequence[str],
    on_stage: StageListener | None,
) -> dict[str, dict[str, Any]]:
    """Run a job in this process, on the instance of the UI."""
    from dagster import AssetKey, DagsterInstance

    from assets import runs
    from gr_platform.definitions import defs

    (home / "logs").mkdir(parents=True, exist_ok=True)
    run_config = config | {"loggers": {"file": {"config": {"path": str(home / "logs" / LOG_FILE)}}}}
    databases.require_instance(dagster_home)
    opened = DagsterInstance.local_temp(str(dagster_home), overrides=TO_TERMINAL)
    with opened as instance, _listening(on_stage) as finished:
        runs.close_dead(instance)
        defs.resolve_job_def(job).execute_in_process(
            run_config=run_config,
            instance=instance,
            asset_selection=[AssetKey(name) for name in select] or None,
            tags=dict(tags),
        )
    return finished


@contextmanager
def _listening(on_stage: StageListener | None) -> Iterator[dict[str, dict[str, Any]]]:
    """Yield a dict that fills as stages finish; turn the failure of a blocking check into a UserError naming it."""
    from dagster import DagsterError, DagsterExecutionInterruptedError

    from assets.materialization import STAGES

    listener = _Listener(on_stage)
    level = STAGES.level
    STAGES.addHandler(listener)
    STAGES.setLevel(logging.INFO)
    try:
        yield listener.finished
    except DagsterExecutionInterruptedError:
        # Dagster's own name for Ctrl-C and SIGTERM: nobody else knows it.
        raise KeyboardInterrupt from None
    except DagsterError:
        if not listener.failed:
            raise
        raise UserError(
            f"the check {', '.join(listener.failed)} failed, so no later stage ran; what was current stays current"
        ) from None
    finally:
        STAGES.removeHandler(listener)
        STAGES.setLevel(level)


class _Listener(logging.Handler):
    """Collects the stage records that assets and checks log; a `check_warned` is shown and is no failure."""

    def __init__(self, on_stage: StageListener | None) -> None:
        super().__init__()
        self.on_stage = on_stage
        self.finished: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "stage", None)
        if fields is None:
            return
        if fields["event"] == "finished":
            self.finished[fields["name"]] = fields
        if fields["event"] == "check_failed":
            self.failed.append(f"{fields['name']} ({fields['reason']})")
        if self.on_stage is not None:
            self.on_stage(fields)

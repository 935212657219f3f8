"""Running the asset graph from the command line: the same job, on the same instance, that the UI shows.

Invariant: a stage that fails by the user's data or machine ends in that stage's own UserError, and a failed blocking
check in one that names it; whatever was current before stays current.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gr_platform import settings, storage
from gr_platform.errors import UserError
from gr_platform.models import recipe_files

StageListener = Callable[[Mapping[str, Any]], None]

TRAINED = ("retrieval_model", "ranking_model")
LOG_FILE = "pipeline.log"
DEAD_AFTER_S = 60.0
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
    from gr_platform.events.landing import active_dataset, load_declaration

    # Asked before Dagster is loaded: the most common mistakes are answered at once.
    recipe_files.require_known(recipe)
    ds = dataset or settings.dataset() or active_dataset(home)
    load_declaration(home, ds)

    from dagster import AssetKey, DagsterInstance

    from gr_platform.definitions import FULL_PIPELINE, defs

    job = defs.resolve_job_def(FULL_PIPELINE)
    known = sorted(key.to_user_string() for key in job.asset_layer.selected_asset_keys)
    if unknown := [name for name in select if name not in known]:
        raise UserError(f"there is no asset {', '.join(unknown)}; choose among {', '.join(known)}")
    chosen = list(select) or known
    (home / "logs").mkdir(parents=True, exist_ok=True)
    if recipe_files.is_file(recipe):
        recipe = str(Path(recipe).absolute())
    run_config = {
        "resources": {"platform": {"config": {"home": str(home), "dataset": ds}}},
        "ops": {name: {"config": {"recipe": recipe}} for name in TRAINED if name in chosen},
        "loggers": {"file": {"config": {"path": str(home / "logs" / LOG_FILE)}}},
    }
    keys = [AssetKey(name) for name in chosen]
    opened = DagsterInstance.local_temp(str(dagster_home), overrides=TO_TERMINAL)
    with storage.exclusive(home, "stages"), opened as instance, _listening(on_stage) as finished:
        _close_dead_runs(instance)
        job.execute_in_process(run_config=run_config, instance=instance, asset_selection=keys)
    return finished


def _close_dead_runs(instance: Any) -> None:
    """Mark runs as failed whose process was killed: they hold the state folder no more, or we would not."""
    from dagster import DagsterRunStatus, RunsFilter

    for record in instance.get_run_records(RunsFilter(statuses=[DagsterRunStatus.STARTED])):
        # A run of the UI that began this very moment has not asked for the folder yet.
        if time.time() - record.create_timestamp.timestamp() > DEAD_AFTER_S:
            instance.report_run_failed(record.dagster_run, "the process of this run was ended from outside")


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

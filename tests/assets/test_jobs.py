"""The jobs run for real: what a landing leaves behind, what a run is tagged with, what may pass a training."""

import errno
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets import jobs, runs
from gr_platform.commands import pipeline
from gr_platform.commands.landing import report
from gr_platform.definitions import defs
from gr_platform.errors import UserError, sentence_for
from gr_platform.events import landing
from gr_platform.lifecycle import agreement, days, inbox

DAY = 1_780_272_000  # 2026-06-01 00:00 UTC
TODAY = time.strftime("%Y-%m-%d", time.gmtime())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder with its Dagster instance; files in its inbox need no time to settle."""
    monkeypatch.setenv("GR_HOME", str(tmp_path))
    monkeypatch.setattr(inbox, "SETTLED_S", 0.0)
    (tmp_path / "dagster_home").mkdir()
    (tmp_path / "dagster_home" / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    return tmp_path


def _drop(home: Path, name: str, *, ds: str = "shop", offset: int = 0) -> None:
    path = home / "inbox" / ds / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{user},{item},view,{DAY + offset + 60 * user + item}" for user in range(12) for item in (1, 2)]
    path.write_text("\n".join(["user_id,item_id,action,timestamp", *rows]) + "\n")


def _instance(home: Path) -> dg.DagsterInstance:
    return dg.DagsterInstance.from_config(str(home / "dagster_home"))


def _figures(home: Path, day: str) -> dict[str, Any]:
    with _instance(home) as instance:
        found = instance.fetch_materializations(
            dg.AssetRecordsFilter(dg.AssetKey("landed_day"), asset_partitions=[day]), limit=1
        )
        materialization = found.records[0].asset_materialization
        assert materialization is not None
        names = ("files", "rows", "new_files", "refused_files")
        return {name: materialization.metadata[name].value for name in names}


def test_one_command_lands_a_month_in_one_run_and_says_the_rows_of_each_day(home: Path) -> None:
    _drop(home, "2026-06-01.csv")
    _drop(home, "date=2026-06-03/a.csv", offset=2 * 86_400)
    _drop(home, "2026-06-03.csv", ds="other", offset=9)
    (home / "inbox" / "shop" / "2026-06-03-bad.csv").write_text("nonsense\n")
    _drop(home, "2026-07-01.csv", offset=30 * 86_400)
    said = list(report(home, home / "dagster_home", "2026-06-01", "2026-06-30", None))
    assert [line.split() for line in said if line.startswith("2026")] == [
        ["2026-06-03", "other", "1", "file(s)", "24", "rows"],
        ["2026-06-01", "shop", "1", "file(s)", "24", "rows"],
        ["2026-06-03", "shop", "1", "file(s)", "24", "rows"],
    ]
    assert any(line.startswith("  refused 2026-06-03-bad.csv:") for line in said)
    assert "! shop has no data of 2026-06-02 and 27 more day(s)" in said
    assert _figures(home, "2026-06-03") == {"files": 2, "rows": 48, "new_files": 2, "refused_files": 1}
    assert _figures(home, "2026-06-02") == {"files": 0, "rows": 0, "new_files": 0, "refused_files": 0}
    with _instance(home) as instance:
        (run,) = instance.get_runs()
        events = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
        (check,) = [each.dagster_event.event_specific_data for each in events if each.dagster_event]
    assert run.job_name == runs.LANDING_DAY
    assert {"gr/commit", "gr/process"} <= set(run.tags)
    assert not check.passed
    assert check.severity is dg.AssetCheckSeverity.WARN
    assert "2026-06-03-bad.csv" in (check.description or "")
    # What lies there for later days was left; without days all that waits is landed.
    said = list(report(home, home / "dagster_home", None, None, None))
    assert said[0].split() == ["2026-07-01", "shop", "1", "file(s)", "24", "rows"]
    assert list(report(home, home / "dagster_home", None, None, None))[-1].startswith("nothing landed")


def test_days_that_are_none_are_refused_by_name(home: Path) -> None:
    for first, last, fault in [
        ("2026-06-31", "2026-07-01", "2026-06-31 is no day that files can belong to"),
        ("1999-01-01", "2026-07-01", "2000-01-01 to"),
        ("2026-06-02", "2026-06-01", "name the earlier one first"),
        (None, "2026-06-01", "--to was given without --from"),
    ]:
        with pytest.raises(UserError, match=fault):
            list(report(home, home / "dagster_home", first, last, None))


def test_input_and_output_is_tried_again_and_nothing_else_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from assets import inbox as stage

    monkeypatch.setattr(stage, "RETRY_AFTER_S", 0.0)
    real, tries = landing.import_file, list[str]()

    def failing(times: int, fault: BaseException) -> Any:
        def import_file(source: Path, **named: Any) -> Any:
            tries.append(source.name)
            if len(tries) <= times:
                raise fault
            return real(source, **named)

        tries.clear()
        return import_file

    _drop(home, "2026-06-01.csv")
    monkeypatch.setattr(landing, "import_file", failing(1, OSError(errno.EIO, "I/O error")))
    pipeline.land(home, home / "dagster_home", "2026-06-01", "2026-06-01")
    assert len(tries) == 2
    assert days.landed(home, "shop")["2026-06-01"].files == 1

    _drop(home, "2026-06-02.csv", offset=86_400)
    monkeypatch.setattr(landing, "import_file", failing(99, OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(dg.DagsterError) as failed:
        pipeline.land(home, home / "dagster_home", "2026-06-02", "2026-06-02")
    assert len(tries) == 1 + stage.RETRIES
    assert "disk of the state folder is full" in (sentence_for(failed.value) or "")
    assert [path.name for path in (home / "inbox" / "shop").glob("*.csv")] == ["2026-06-02.csv"]

    monkeypatch.setattr(landing, "import_file", failing(99, ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        pipeline.land(home, home / "dagster_home", "2026-06-02", "2026-06-02")
    assert len(tries) == 1


def test_a_damaged_data_set_stops_no_other(home: Path) -> None:
    _drop(home, "2026-06-01.csv", ds="a")
    pipeline.land(home, home / "dagster_home", "2026-06-01", "2026-06-01")
    next((home / "landing" / "a").glob("*.json")).write_text("{")
    _drop(home, "2026-06-02.csv", ds="a", offset=86_400)
    _drop(home, "2026-06-02.csv", ds="b", offset=5)
    with pytest.raises(UserError, match="is damaged"):
        pipeline.land(home, home / "dagster_home", "2026-06-02", "2026-06-02")
    assert days.landed(home, "b")["2026-06-02"].files == 1
    assert (home / "inbox" / "a" / "2026-06-02.csv").is_file()


def test_a_run_of_the_pipeline_says_on_what_and_by_which_code_it_worked(pipeline_home: Path) -> None:
    with _instance(pipeline_home) as instance:
        (run,) = instance.get_runs(dg.RunsFilter(job_name=runs.FULL_PIPELINE))
    assert run.tags["gr/dataset"] == "simulated"
    assert run.tags["gr/recipe"] == "tiny"
    assert run.tags["gr/landed"] == days.ledger_state(pipeline_home, "simulated")
    assert len(run.tags["gr/commit"]) == 40
    from gr_platform import storage

    sequences = storage.current(pipeline_home / "sequences" / "simulated", "sequences")
    assert run.tags["gr/dataset_digest"] == storage.read_manifest(sequences).digest


@contextmanager
def _training(home: Path) -> Iterator[None]:
    """Hold the state folder as a training in another process does."""
    code = "import sys, pathlib; from gr_platform import storage\n"
    code += "with storage.exclusive(pathlib.Path(sys.argv[1]), 'stages'): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        yield
    finally:
        holder.communicate("")


def test_the_champion_is_deployed_and_a_day_landed_while_a_training_works(
    pipeline_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    shutil.copytree(pipeline_home, home, symlinks=True)
    monkeypatch.setenv("GR_HOME", str(home))
    monkeypatch.setattr(inbox, "SETTLED_S", 0.0)
    assert agreement.difference(home) is None
    agreed = agreement.signature(home)
    served = (home / "model_repository").readlink()
    (home / "model_repository").unlink()
    assert agreement.signature(home) != agreed
    found = agreement.difference(home)
    assert found is not None
    assert found.dataset == "simulated"
    assert found.text == "champion is simulated-retrieval 1 and simulated-ranking 1, served is nothing"
    _drop(home, f"{TODAY}.csv")
    with _training(home), _instance(home) as instance:
        config = jobs.deploying_config(dataset=found.dataset)
        assert defs.resolve_job_def(runs.DEPLOYING).execute_in_process(run_config=config, instance=instance).success
        pipeline.land(home, home / "dagster_home", TODAY, TODAY)
        with pytest.raises(UserError, match="another program works on the stages"):
            pipeline.materialize(home, home / "dagster_home", select=["events"])
    assert (home / "model_repository").readlink() == served
    assert agreement.difference(home) is None
    assert days.landed(home, "shop")[TODAY].files == 1

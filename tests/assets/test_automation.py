"""Schedules and sensors on real folders: what each asks for, when it skips, and that it never fails."""

import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterInstance

from assets import automation, jobs, runs, sensors
from gr_platform.commands import demo
from gr_platform.definitions import defs
from gr_platform.errors import UserError
from gr_platform.events.landing import import_file
from gr_platform.lifecycle import agreement, alerts, drift, inbox
from gr_platform.lifecycle.agreement import Difference
from gr_platform.lifecycle.options import LifecycleOptions

SCHEDULES = {each.name: each for each in automation.schedules(LifecycleOptions())}
SATURDAY = datetime.datetime(2026, 11, 28, 2, tzinfo=datetime.UTC)
SUNDAY = SATURDAY + datetime.timedelta(days=1)
Said = list[dg.RunRequest] | str


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty state folder that everything takes for its own."""
    monkeypatch.setenv("GR_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("GR_DATASET", raising=False)
    return tmp_path / "home"


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with dg.instance_for_test() as made:
        yield made


@pytest.fixture
def shop(home: Path) -> Path:
    """A state folder with a data set."""
    import_file(demo.simulated(home, 2_000), home=home, dataset="shop")
    return home


def _looked(sensor: dg.SensorDefinition, instance: DagsterInstance, cursor: str | None = None) -> tuple[Said, Any]:
    """Return what a sensor asks for, or why for nothing, and its cursor then."""
    context = dg.build_sensor_context(instance, cursor=cursor, definitions=defs)
    data = sensor.evaluate_tick(context)
    return (list(data.run_requests or ()) or data.skip_message or "", data.cursor)


def _fired(name: str, instance: DagsterInstance, moment: datetime.datetime = SATURDAY) -> Said:
    repository = defs.get_repository_def()
    context = dg.build_schedule_context(instance, scheduled_execution_time=moment, repository_def=repository)
    data = SCHEDULES[name].evaluate_tick(context)
    return list(data.run_requests or ()) or data.skip_message or ""


def _ran(instance: DagsterInstance, job: str, status: dg.DagsterRunStatus, **tags: str) -> str:
    """Record a run of a job of that name without running it; return its id."""

    @dg.op
    def nothing() -> None: ...

    @dg.job(name=job)
    def made() -> None:
        nothing()

    named = {f"gr/{name}": value for name, value in tags.items()}
    return instance.create_run_for_job(made, status=status, tags=named).run_id


def _drop(home: Path, *names: str) -> None:
    for name in names:
        path = home / "inbox" / "shop" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("user_id,item_id,action,timestamp\n")


def test_nothing_fails_in_an_empty_or_a_damaged_state_folder(home: Path, instance: DagsterInstance) -> None:
    plain = [sensors.inbox, sensors.champion, sensors.drift, sensors.lost_runs]
    retraining = ["daily_retraining", "weekly_retraining"]
    for _ in range(2):
        for sensor in plain:
            said, _ = _looked(sensor, instance)
            assert isinstance(said, str)
            assert said, sensor.name
        for name in retraining:
            assert isinstance(_fired(name, instance), str)
        home.mkdir(exist_ok=True)
        (home / "lifecycle.toml").write_text("[drift]\nretrain = 7\n")
        (home / "landing").mkdir(exist_ok=True)
        (home / "landing" / "active").write_text("No Name\n")
        (home / "model_repository").mkdir(exist_ok=True)
    assert {each.subject for each in alerts.read(home)} == {
        "the daily retraining was not asked for",
        "the weekly retraining was not asked for",
    }


def test_files_are_asked_for_once_in_a_run_for_each_stretch_of_days(
    home: Path, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    _drop(home, "2026-06-01.csv", "2026-06-02.csv", "2026-06-09.csv", "x.csv.part")
    assert _looked(sensors.inbox, instance)[0] == "nothing waits in the inbox"
    monkeypatch.setattr(inbox, "SETTLED_S", 0.0)
    asked, _ = _looked(sensors.inbox, instance)
    assert isinstance(asked, list)
    first, second = asked
    assert (first.tags[sensors.RANGE_START], first.tags[sensors.RANGE_END]) == ("2026-06-01", "2026-06-02")
    assert second.partition_key == "2026-06-09"
    again, _ = _looked(sensors.inbox, instance)
    assert [each.run_key for each in again] == [each.run_key for each in asked]
    _drop(home, "2026-06-09-b.csv")
    later, _ = _looked(sensors.inbox, instance)
    assert later[0].run_key == first.run_key
    assert later[1].run_key != second.run_key
    _ran(instance, runs.LANDING_DAY, dg.DagsterRunStatus.NOT_STARTED)
    assert _looked(sensors.inbox, instance)[0] == "a landing waits or works already"


def test_what_was_asked_for_and_still_lies_there_is_asked_for_again_an_hour_later(
    home: Path, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "SETTLED_S", 0.0)
    _drop(home, "2026-06-01.csv")
    now = time.time()
    keys = []
    for seconds in (0, 3600):
        monkeypatch.setattr(time, "time", lambda seconds=seconds: now + seconds)
        keys.append(_looked(sensors.inbox, instance)[0][0].run_key)
    assert keys[0] != keys[1]


def test_the_landing_schedule_asks_for_the_day_before(home: Path, instance: DagsterInstance) -> None:
    assert _fired("daily_landing", instance) == "no data set has a folder in the inbox"
    _drop(home, "x.csv")
    asked = _fired("daily_landing", instance, SATURDAY)
    assert [each.partition_key for each in asked] == ["2026-11-27"]


def test_a_retraining_is_asked_for_as_the_options_want_it(shop: Path, instance: DagsterInstance) -> None:
    (shop / "lifecycle.toml").write_text('[retraining]\nrecipe = "tiny"\nnum_processes = 2\n')
    for name, start in (("daily_retraining", "warm"), ("weekly_retraining", "scratch")):
        (asked,) = _fired(name, instance)
        trained = {"recipe": "tiny", "num_processes": 2, "split": "time", "start": start}
        assert asked.run_config["ops"] == {model: {"config": trained} for model in jobs.TRAINED}
        assert asked.run_config["resources"]["platform"]["config"] == {"wait_s": jobs.WAIT_S}
        assert (asked.tags["gr/start"], asked.tags["gr/recipe"]) == (start, "tiny")
        assert dg.validate_run_config(defs.resolve_job_def(runs.RETRAINING), asked.run_config)


def test_on_the_day_of_the_weekly_one_there_is_no_daily_retraining(shop: Path, instance: DagsterInstance) -> None:
    assert _fired("daily_retraining", instance, SUNDAY) == "today it is trained from scratch"
    assert isinstance(_fired("weekly_retraining", instance, SUNDAY), list)
    (shop / "lifecycle.toml").write_text('[schedule]\nweekly = ""\n')
    assert isinstance(_fired("daily_retraining", instance, SUNDAY), list)


def test_nothing_is_retrained_without_new_data_or_beside_another_retraining(
    shop: Path, instance: DagsterInstance
) -> None:
    done, landed = dg.DagsterRunStatus.SUCCESS, runs.landed(shop, "shop")
    nothing = "nothing of shop was landed since the last retraining"
    _ran(instance, runs.RETRAINING, dg.DagsterRunStatus.FAILURE, dataset="shop", landed=landed, start="warm")
    _ran(instance, runs.RETRAINING, done, dataset="other", landed=landed, start="warm")
    _ran(instance, runs.FULL_PIPELINE, done, dataset="shop", landed=landed)
    assert isinstance(_fired("daily_retraining", instance), list)
    _ran(instance, runs.RETRAINING, done, dataset="shop", landed=landed, start="warm")
    assert _fired("daily_retraining", instance) == nothing
    # What was trained on from yesterday's weights can still be trained from scratch.
    assert isinstance(_fired("weekly_retraining", instance), list)
    _ran(instance, runs.RETRAINING, done, dataset="shop", landed=landed, start="scratch")
    assert _fired("weekly_retraining", instance) == nothing
    import_file(demo.simulated(shop, 3_000), home=shop, dataset="shop")
    assert isinstance(_fired("daily_retraining", instance), list)
    _ran(instance, runs.RETRAINING, dg.DagsterRunStatus.NOT_STARTED)
    for name in ("daily_retraining", "weekly_retraining"):
        assert _fired(name, instance) == "a retraining waits or works already"


def test_a_crossed_bound_asks_for_a_retraining_once_a_day_and_only_if_wanted(
    shop: Path, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift, "crossed", lambda *_: [])
    assert _looked(sensors.drift, instance)[0] == "no bound is crossed"
    monkeypatch.setattr(drift, "crossed", lambda *_: ["items drifted", "the model is old"])
    asked, cursor = _looked(sensors.drift, instance)
    assert [each.tags["gr/reason"] for each in asked] == ["items drifted; the model is old"]
    assert asked[0].run_config["ops"]["ranking_model"]["config"]["start"] == "warm"
    assert _looked(sensors.drift, instance, cursor)[0] == "a retraining was asked for today already"
    assert isinstance(_looked(sensors.drift, instance, "2026-01-01")[0], list)
    (shop / "lifecycle.toml").write_text("[drift]\nretrain = false\n")
    assert "drift.retrain is false" in _looked(sensors.drift, instance)[0]


def test_a_served_pair_that_is_not_the_champion_is_deployed_after_a_second_look(
    home: Path, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Difference | None = Difference(dataset="shop", text="champion is 2, served is pair-1")
    monkeypatch.setattr(agreement, "difference", lambda _: found)
    said, cursor = _looked(sensors.champion, instance)
    assert "if the next look finds that too" in said
    asked, cursor = _looked(sensors.champion, instance, cursor)
    config = asked[0].run_config
    assert config["resources"]["platform"]["config"] == {"alone": False, "dataset": "shop"}
    assert config["ops"]["deployment"]["config"] == {"champion_only": True}
    assert dg.validate_run_config(defs.resolve_job_def(runs.DEPLOYING), config)
    assert "asked for already" in _looked(sensors.champion, instance, cursor)[0]
    hour_ago = json.dumps(json.loads(cursor) | {"asked_s": time.time() - sensors.AGAIN_S - 1})
    assert isinstance(_looked(sensors.champion, instance, hour_ago)[0], list)
    found = None
    said, cursor = _looked(sensors.champion, instance, cursor)
    assert said == "what is served is what champion names"
    # As long as no file changes, nothing is opened to find that out.
    monkeypatch.setattr(agreement, "difference", lambda _: pytest.fail("it was looked up"))
    assert "has changed" in _looked(sensors.champion, instance, cursor)[0]
    home.mkdir(exist_ok=True)
    (home / "mlflow.db").touch()
    monkeypatch.setattr(agreement, "difference", lambda _: found)
    assert _looked(sensors.champion, instance, cursor)[0] == "what is served is what champion names"


@dg.asset
def broken() -> None:
    raise ValueError("no such thing")


@dg.asset(check_specs=[dg.AssetCheckSpec("doubted", asset="doubtful")])
def doubtful() -> dg.MaterializeResult:
    doubt = dg.AssetCheckResult(
        passed=False, check_name="doubted", severity=dg.AssetCheckSeverity.WARN, description="one item is all"
    )
    return dg.MaterializeResult(check_results=[doubt])


def test_a_failed_run_and_a_failed_check_reach_the_alert_hook(home: Path, instance: DagsterInstance) -> None:
    home.mkdir()
    failed = dg.materialize([broken, doubtful], instance=instance, raise_on_error=False)
    context = dg.build_run_status_sensor_context(
        sensor_name="failures",
        dagster_event=failed.get_run_failure_event(),
        dagster_instance=instance,
        dagster_run=failed.dagster_run,
    )
    sensors.failures(context.for_run_failure())
    done = dg.materialize([doubtful], instance=instance)
    context = dg.build_run_status_sensor_context(
        sensor_name="failed_checks",
        dagster_event=done.get_run_success_event(),
        dagster_instance=instance,
        dagster_run=done.dagster_run,
    )
    sensors.failed_checks(context)
    told = alerts.read(home)
    assert [each.kind for each in told] == ["run_failed", "check_failed"]
    assert failed.run_id in told[0].text
    assert "doubtful doubted" in told[0].subject
    assert told[1].subject == "check doubtful doubted failed"
    assert "one item is all" in told[1].text


def test_a_run_whose_process_is_gone_is_closed_and_no_other(home: Path, instance: DagsterInstance) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    started = dg.DagsterRunStatus.STARTED
    import psutil

    me = f"{os.uname().nodename} {os.getpid()} {psutil.Process().create_time():.1f}"
    lost = _ran(instance, runs.RETRAINING, started, process=f"{os.uname().nodename} {gone.pid} {time.time():.1f}")
    mine = _ran(instance, runs.RETRAINING, started, process=me)
    elsewhere = _ran(instance, runs.RETRAINING, started, process=f"another-host {gone.pid} 1.0")
    fresh = _ran(instance, runs.RETRAINING, started)
    assert lost in _looked(sensors.lost_runs, instance)[0]
    statuses = {
        name: instance.get_run_by_id(run).status
        for name, run in zip("lmef", (lost, mine, elsewhere, fresh), strict=True)
    }
    assert statuses == {"l": dg.DagsterRunStatus.FAILURE, "m": started, "e": started, "f": started}


def test_an_unreadable_bundle_is_a_reason_to_skip(
    home: Path, instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise UserError("the bundle is gone")

    monkeypatch.setattr(agreement, "difference", fail)
    assert _looked(sensors.champion, instance)[0] == "the bundle is gone"

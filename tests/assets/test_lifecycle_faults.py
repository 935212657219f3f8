"""A retraining that is killed, without MLflow or of a strange day: what served serves on, the next one ends well.

The poisoned day and the refused challenger are in tests/gr_platform/replay/test_replay.py.
"""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets import automation, runs
from assets.materialization import UNTRACKED
from gr_platform.commands import pipeline
from gr_platform.errors import sentence_for
from gr_platform.events.landing import import_file
from gr_platform.lifecycle import agreement, release
from gr_platform.registry import promotion, versions
from gr_platform.replay.faults import tenfold
from gr_platform.replay.stream import Stream, StreamOptions, simulated

DS = "simulated"
KILLED = (
    "event=started stage=events",
    "phase=validation epoch=1",
    "event=started stage=bundle",
    "event=started stage=judgement",
    "event=started stage=deployment",
)


@dataclass(frozen=True)
class Base:
    """A platform whose first pair serves, and the stream whose next days have not come in."""

    home: Path
    stream: Stream


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    folder = tmp_path_factory.mktemp("base")
    stream = simulated(folder / "stream", StreamOptions(days=2, num_events=20_000))
    home = folder / "home"
    (home / "dagster_home").mkdir(parents=True)
    (home / "dagster_home" / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    (home / "lifecycle.toml").write_text('[retraining]\nrecipe = "tiny"\n')
    import_file(stream.history, home=home, dataset=DS, ingest_date=stream.history_date)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GR_THREADS", "1")
        patched.setenv("GR_DEVICE", "cpu")
        retrain(home, start="scratch")
        assert champion(home) == "1"
        yield Base(home, stream)


@pytest.fixture
def home(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the platform, into which the stream's next day has come."""
    home = tmp_path / "home"
    monkeypatch.setenv("GR_HOME", str(home))
    shutil.copytree(base.home, home, symlinks=True)
    land(home, base.stream, 1)
    return home


def land(home: Path, stream: Stream, number: int) -> None:
    day = stream.days[number - 1]
    assert day.path is not None
    import_file(day.path, home=home, dataset=DS, ingest_date=day.date)


def retrain(
    home: Path, on_stage: Callable[[Mapping[str, Any]], None] | None = None, **named: Any
) -> dict[str, dict[str, Any]]:
    return pipeline.retrain(home, home / "dagster_home", on_stage=on_stage, **named)


def champion(home: Path) -> str:
    """Return the version that both champions have and the model repository holds."""
    champions = promotion.champions(home, DS)
    assert set(champions) == {"retrieval", "ranking"}
    assert agreement.difference(home) is None
    (number,) = {version.version for version in champions.values()}
    return number


def folders(home: Path, kind: str) -> set[str]:
    return {folder.name for folder in (home / "runs" / DS).glob(f"{kind}_model-*")}


def assert_decided(home: Path, done: dict[str, dict[str, Any]]) -> None:
    """A run that ended well has promoted its pair, or says why not."""
    outcome = done["deployment"]["figures"]["outcome"]
    contest = promotion.contest(home, DS)
    if outcome == "promoted":
        assert champion(home) == "2"
        assert not contest.is_new
    else:
        assert outcome.startswith("challenger refused: ")
        assert champion(home) == "1"
        assert all(version.tags[promotion.REASONS] for version in contest.pair.values())


def _instance(home: Path) -> dg.DagsterInstance:
    return dg.DagsterInstance.from_config(str(home / "dagster_home"))


def _killed_at(home: Path, line: str, within_s: float = 300.0) -> None:
    """Run `gr retrain` in a process and kill it when the state folder's log has a new line with this in it."""
    log = home / "logs" / "gr.log"
    begin = log.stat().st_size if log.exists() else 0
    environment = os.environ | {"GR_HOME": str(home), "DAGSTER_HOME": str(home / "dagster_home")}
    process = subprocess.Popen(
        [sys.executable, "-m", "gr_platform.cli", "retrain"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + within_s
    while not (log.exists() and line in log.read_text()[begin:]):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{line} did not come"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_retraining_killed_in_each_stage_leaves_what_served_and_the_next_one_goes_on(home: Path) -> None:
    for line in KILLED:
        _killed_at(home, line)
        # As the sensor does that looks whether what serves is what the alias names.
        release.reconcile(home, DS)
        assert champion(home) == "1", line
    done = retrain(home)
    assert_decided(home, done)
    # What the killed ones had finished was taken up.
    assert done["retrieval_model"]["reused"]
    assert done["bundle"]["reused"]
    with _instance(home) as instance:
        ended = [run.status for run in instance.get_runs(dg.RunsFilter(job_name=runs.RETRAINING))]
    assert ended.count(dg.DagsterRunStatus.FAILURE) == len(KILLED)
    assert set(ended) == {dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS}
    assert not list((home / "runs" / DS).glob(".checkpoint-*"))


def _without_mlflow(home: Path, cut: Callable[[], None], mend: Callable[[], None]) -> None:
    """Retrain with MLflow gone from the training on: the models are kept, and the next run logs and judges them."""
    before = {kind: folders(home, kind) for kind in versions.KINDS}
    trained = {}

    def listen(fields: Mapping[str, Any]) -> None:
        if fields["name"] == "ranking_model" and fields["event"] == "started":
            cut()
        if fields["event"] == "finished":
            trained[fields["name"]] = fields["figures"]

    try:
        with pytest.raises(Exception) as failed:  # noqa: PT011 - of whom is told below
            retrain(home, listen)
    finally:
        mend()
    said = sentence_for(failed.value) or ""
    assert "MLflow" in said or "GR_MLFLOW_DB" in said
    assert "run the same command again" in said
    assert trained["ranking_model"]["mlflow_run"] == UNTRACKED
    assert trained["ranking_model"]["start"] == "from scratch: no champion is known to start from"
    assert champion(home) == "1"
    made = {kind: folders(home, kind) - before[kind] for kind in versions.KINDS}
    assert [len(each) for each in made.values()] == [1, 1]
    done = retrain(home)
    assert {kind: folders(home, kind) - before[kind] for kind in versions.KINDS} == made
    assert done["ranking_model"]["figures"]["start"] == "nothing new to learn"
    assert done["ranking_model"]["figures"]["mlflow_run"].startswith("ranking-tiny-")
    assert_decided(home, done)
    for kind in versions.KINDS:
        assert len(versions.versions(home, DS, kind)) == 2


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_training_outlives_a_registry_that_another_program_keeps_locked(home: Path) -> None:
    holders: list[sqlite3.Connection] = []

    def cut() -> None:
        holders.append(sqlite3.connect(home / "mlflow.db", isolation_level=None, check_same_thread=False))
        holders[0].execute("BEGIN EXCLUSIVE")

    def mend() -> None:
        for holder in holders:
            holder.rollback()
            holder.close()

    _without_mlflow(home, cut, mend)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_training_outlives_a_registry_whose_server_is_gone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_mlflow(
        home,
        lambda: monkeypatch.setenv("GR_MLFLOW_DB", "postgresql://nobody:secret@127.0.0.1:9/none"),
        lambda: monkeypatch.delenv("GR_MLFLOW_DB", raising=False),
    )


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_day_of_ten_times_the_events_is_learned_or_refused_with_a_reason(base: Base, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    home, day = tmp_path / "home", base.stream.days[0]
    shutil.copytree(base.home, home, symlinks=True)
    table = pq.read_table(day.true_path)
    pq.write_table(tenfold(table), tmp_path / "tenfold.parquet")
    import_file(tmp_path / "tenfold.parquet", home=home, dataset=DS, ingest_date=day.date)
    done = retrain(home)
    assert done["events"]["figures"]["rows_kept"] > 9 * len(table)
    assert_decided(home, done)
    # The day after is an ordinary one again.
    land(home, base.stream, 2)
    outcome = retrain(home)["deployment"]["figures"]["outcome"]
    assert outcome == "promoted" or outcome.startswith("challenger refused: ")
    assert champion(home) in ("1", "2", "3")


def test_after_a_day_without_data_nothing_is_trained_and_nothing_changes(
    replayed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    shutil.copytree(replayed / "home", home, symlinks=True)
    monkeypatch.setenv("GR_THREADS", "1")
    with _instance(home) as instance:
        for start in ("warm", "scratch"):
            why = automation.nothing_to_train(instance, home, start)
            assert why == ("nothing of simulated was landed since the last retraining" if start == "warm" else None)
    before = {kind: folders(home, kind) for kind in versions.KINDS}
    roles = {alias: _held(home, alias) for alias in ("champion", "previous", "challenger")}
    done = retrain(home)
    assert {kind: folders(home, kind) for kind in versions.KINDS} == before
    assert {alias: _held(home, alias) for alias in roles} == roles
    assert champion(home) == "2"
    for kind in versions.KINDS:
        assert done[f"{kind}_model"]["figures"]["start"] == "nothing new to learn"
    assert all(done[name]["reused"] for name in ("events", "sequences", "bundle", "judgement"))
    assert done["deployment"]["figures"]["outcome"].startswith("challenger refused: window: ")


def _held(home: Path, alias: str) -> list[str]:
    found = [versions.by_alias(home, DS, kind, alias) for kind in versions.KINDS]
    return [each.version if each else "-" for each in found]

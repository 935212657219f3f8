"""Dagster and MLflow on a real PostgreSQL, which the tests start; skipped where it is not installed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest

from gr_platform import settings
from gr_platform.commands import services
from gr_platform.errors import sentence_for
from gr_platform.registry import names, relocation, tracking, versions
from tests.postgres_server import PostgresServer, programs
from tests.stand_in_models import DS, register

pytestmark = pytest.mark.skipif(programs() is None, reason="PostgreSQL is not installed (Debian: postgresql)")


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    started = PostgresServer()
    yield started
    started.close()


# Begins on empty databases: makes MLflow's and Dagster's tables, then writes five runs and three materialisations.
WRITER = """
import pathlib, sys
import dagster as dg
from gr_platform import settings
from gr_platform.registry import tracking
home, name = settings.home(), sys.argv[1]
client = tracking.connect(home)
for _ in range(5):
    client.create_run(tracking.experiment_id(client, home, name))
instance = dg.DagsterInstance.from_config(str(settings.dagster_home()))
assert all(dg.materialize([dg.asset(name=name)(lambda: None)], instance=instance).success for _ in range(3))
"""


@dataclass(frozen=True)
class Begun:
    """Databases that two programs began to use at the same moment, and how that ended."""

    home: Path
    environment: dict[str, str]
    returncodes: list[int]
    errors: list[str]


@pytest.fixture(scope="module")
def begun(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Begun:
    home = tmp_path_factory.mktemp("begun")
    named = {
        "GR_HOME": str(home),
        settings.MLFLOW_DB: server.database("mlflow", over="socket"),
        settings.DAGSTER_DB: server.database("dagster"),
    }
    environment = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"} | named
    programs = [
        subprocess.Popen([sys.executable, "-c", WRITER, name], stderr=subprocess.PIPE, text=True, env=environment)
        for name in ("left", "right")
    ]
    errors = [program.communicate(timeout=300)[1] for program in programs]
    return Begun(home, named, [program.returncode for program in programs], errors)


@pytest.fixture
def home(begun: Begun, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of the databases that were begun, with the environment that names them."""
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    for name, value in begun.environment.items():
        monkeypatch.setenv(name, value)
    return begun.home


@dg.asset
def small() -> dg.MaterializeResult:
    return dg.MaterializeResult(metadata={"rows": 3})


def _materialise(instance: dg.DagsterInstance) -> None:
    assert dg.materialize([small], instance=instance).success


def test_two_programs_that_begin_on_empty_databases_at_once_both_write(begun: Begun, home: Path) -> None:
    assert begun.returncodes == [0, 0], begun.errors
    client = tracking.connect(home)
    for name in ("left", "right"):
        assert len(client.search_runs([tracking.experiment_id(client, home, name)])) == 5
    with dg.DagsterInstance.from_config(str(settings.dagster_home())) as instance:
        records = instance.get_run_records()
    assert [record.dagster_run.status for record in records] == [dg.DagsterRunStatus.SUCCESS] * 6


def test_versions_and_aliases_are_found_again_from_another_process(home: Path) -> None:
    assert tracking.exists(home)
    first, second = register(home, "a"), register(home, "b")
    assert int(second.version) == int(first.version) + 1
    assert register(home, "b").reused
    versions.move_alias(home, first, versions.CHAMPION)
    code = (
        "import pathlib, sys; from gr_platform.registry import versions; home = pathlib.Path(sys.argv[1]);"
        f"print(*(versions.by_alias(home, {DS!r}, 'retrieval', alias).version for alias in ('champion', 'challenger')))"
    )
    read = [sys.executable, "-c", code, str(home)]
    done = subprocess.run(read, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [first.version, second.version]
    assert not (home / "mlflow.db").exists()
    run = tracking.connect(home).get_run(second.run_id)
    assert names.run_folder(home, DS, run.info.run_name).name == second.tags["gr.run_folder"]


def test_an_asset_is_materialised_and_its_event_read_over_a_second_connection(
    home: Path, server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = settings.dagster_home()
    with dg.DagsterInstance.from_config(str(folder)) as instance:
        _materialise(instance)
    with dg.DagsterInstance.from_config(str(folder)) as other:
        event = other.get_latest_materialization_event(small.key)
        assert event is not None
        assert event.asset_materialization.metadata["rows"].value == 3
        assert "PostgresRunStorage" in other.info_str()
        assert server.password not in other.info_str()
        assert server.password not in json.dumps(dict(other.get_ref().to_dict()), default=str)
    assert not list(folder.rglob("*.db"))
    assert server.password not in (folder / "dagster.yaml").read_text()
    # Without the variable the same folder is SQLite's again.
    monkeypatch.delenv(settings.DAGSTER_DB)
    assert "postgres" not in (settings.dagster_home() / "dagster.yaml").read_text()


def test_a_server_that_stops_in_the_middle_is_named_and_the_same_call_goes_on_after_its_restart(
    home: Path, server: PostgresServer
) -> None:
    first = register(home, "c")
    with dg.DagsterInstance.from_config(str(settings.dagster_home())) as instance:
        _materialise(instance)
        server.stop()
        try:
            with pytest.raises(Exception) as of_mlflow:  # noqa: PT011
                register(home, "d")
            with pytest.raises(Exception) as of_dagster:  # noqa: PT011
                instance.get_run_records()
        finally:
            server.start()
        for fault, name in ((of_mlflow, settings.MLFLOW_DB), (of_dagster, settings.DAGSTER_DB)):
            sentence = sentence_for(fault.value)
            assert sentence is not None
            assert sentence.startswith(f"the PostgreSQL database of {name} does not answer"), sentence
        _materialise(instance)
    assert int(register(home, "d").version) == int(first.version) + 1


def test_the_registry_of_a_moved_state_folder_names_the_files_in_it(home: Path, tmp_path: Path) -> None:
    version = register(home, "a")
    addresses = []
    rewritten = [relocation.relocate(tracking.tracking_uri(home), tmp_path) for _ in range(2)]
    addresses.append(tracking.connect(home).get_model_version_download_uri(version.name, version.version))
    rewritten.append(relocation.relocate(tracking.tracking_uri(home), home))
    addresses.append(tracking.connect(home).get_model_version_download_uri(version.name, version.version))
    assert rewritten[0] >= 4
    assert rewritten == [rewritten[0], 0, rewritten[0]]
    assert addresses[0].startswith(f"{tmp_path.as_uri()}/")
    assert addresses[1].startswith(f"{home.as_uri()}/")


def test_no_address_stands_in_the_commands_of_the_services_nor_in_what_they_record(
    home: Path, server: PostgresServer
) -> None:
    programs = services.platform_services(home, settings.dagster_home(), services.Ports())
    assert all(server.password not in " ".join(program.command) for program in programs)
    mlflow = next(program for program in programs if program.name == "mlflow")
    assert server.password in mlflow.environment["MLFLOW_BACKEND_STORE_URI"]
    written = [path for path in home.rglob("*") if path.is_file() and server.password.encode() in path.read_bytes()]
    assert written == []


@pytest.mark.parametrize("variable", [settings.MLFLOW_DB, settings.DAGSTER_DB])
def test_a_database_that_is_gone_at_the_start_is_one_sentence(
    tmp_path: Path, server: PostgresServer, variable: str
) -> None:
    for address, expected in (
        (server.address("none"), "has no such database"),
        (server.address("mlflow", password="wrong"), "refuses the user or the password"),
        (f"postgresql://gr:{server.password}@127.0.0.1:1/none", "does not answer"),
        (f"postgresql://gr:@{server.password}@127.0.0.1/none", "is no address of a PostgreSQL database"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "gr_platform.cli", "up"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=os.environ | {"GR_HOME": str(tmp_path), variable: address},
        )
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert expected in done.stderr
        assert variable in done.stderr
        assert server.password not in done.stderr + (tmp_path / "logs" / "gr.log").read_text()


def test_another_state_folder_keeps_its_registry_in_itself(home: Path, tmp_path: Path) -> None:
    assert tracking.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert not tracking.exists(tmp_path)
    assert tracking.tracking_uri(home) == settings.mlflow_db()

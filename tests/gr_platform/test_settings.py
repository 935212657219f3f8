"""What the environment names is taken or refused in a sentence, and the Dagster instance follows it."""

import os
from pathlib import Path

import pytest
import yaml

from gr_platform import settings
from gr_platform.errors import UserError, sentence_for

COMMITTED = settings.PROJECT_ROOT / "dagster_home" / "dagster.yaml"
ADDRESS = "postgresql://gr:se%40cret@db.example:5433/dagster?sslmode=require"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GR_HOME", str(tmp_path))
    for name in ("DAGSTER_HOME", settings.MLFLOW_DB):
        monkeypatch.delenv(name, raising=False)
    # Set first, so that what dagster_home makes of it is undone too.
    monkeypatch.setenv(settings.DAGSTER_DB, "")


def _instance() -> dict[str, object]:
    return yaml.safe_load((settings.dagster_home() / "dagster.yaml").read_text())


def test_the_instance_is_the_committed_one_with_postgresql_only_where_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed = yaml.safe_load(COMMITTED.read_text())
    assert _instance() == committed
    monkeypatch.setenv(settings.DAGSTER_DB, ADDRESS)
    assert _instance() == committed | {"storage": {"postgres": {"postgres_url": {"env": settings.DAGSTER_DB}}}}
    assert os.environ[settings.DAGSTER_DB] == ADDRESS.replace("postgresql:", "postgresql+psycopg2:")
    assert "cret" not in (tmp_path / "dagster_home" / "dagster.yaml").read_text()
    monkeypatch.setenv(settings.DAGSTER_DB, "")
    assert _instance() == committed
    assert yaml.safe_load(COMMITTED.read_text()) == committed


def test_an_instance_of_an_earlier_release_is_brought_up_to_date_and_then_left_alone(tmp_path: Path) -> None:
    (tmp_path / "dagster_home").mkdir()
    written = tmp_path / "dagster_home" / "dagster.yaml"
    written.write_text("telemetry: {enabled: true}\n")
    assert _instance() == yaml.safe_load(COMMITTED.read_text())
    os.utime(written, (1e9, 1e9))
    settings.dagster_home()
    assert written.stat().st_mtime == 1e9
    assert [path.name for path in written.parent.iterdir()] == ["dagster.yaml"]


def test_an_instance_of_the_users_own_is_never_written_and_must_name_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    monkeypatch.setenv("DAGSTER_HOME", str(own))
    assert settings.dagster_home() == own
    monkeypatch.setenv(settings.DAGSTER_DB, ADDRESS)
    with pytest.raises(UserError, match="does not use it"):
        settings.dagster_home()
    own.mkdir()
    (own / "dagster.yaml").write_text("storage: {postgres: {postgres_url: {env: GR_DAGSTER_DB}}}\n")
    assert settings.dagster_home() == own


def test_the_project_folder_is_the_instance_of_the_default_state_folder_unless_postgresql_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GR_HOME")
    monkeypatch.setattr(settings, "home", lambda: tmp_path)
    assert settings.dagster_home() == COMMITTED.parent
    monkeypatch.setenv(settings.DAGSTER_DB, ADDRESS)
    assert settings.dagster_home() == tmp_path / "dagster_home"


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://gr:secret@@host/db",
        "postgresql://gr:se/cret@host/db",
        "postgresql://gr:se:cret@host/db",
        "postgresql://host",
        "postgres://gr:secret@host/db",
        "mysql://gr:secret@host/db",
        "sqlite:////tmp/secret.db",
        "secret",
    ],
)
def test_an_address_that_is_none_is_refused_without_being_shown(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.MLFLOW_DB, address)
    with pytest.raises(UserError, match="is no address") as refused:
        settings.mlflow_db()
    assert "cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("module", "text", "expected"),
    [
        ("mlflow.store", "password authentication failed for user", "GR_MLFLOW_DB refuses the user or the password"),
        ("dagster_postgres.utils", "connection refused", "GR_DAGSTER_DB does not answer"),
        ("dagster._core", "could not extend file: No space left on device", "GR_DAGSTER_DB has a full disk"),
        ("elsewhere", "server closed the connection", "GR_MLFLOW_DB or GR_DAGSTER_DB does not answer"),
    ],
)
def test_a_fault_of_a_database_names_the_variable_of_whose_code_asked(module: str, text: str, expected: str) -> None:
    import psycopg2

    frame = {"__name__": module, "fault": psycopg2.OperationalError(f'host "secret": {text}')}
    with pytest.raises(RuntimeError) as wrapped:
        exec("try:\n    raise fault\nexcept Exception as error:\n    raise RuntimeError('wrapped') from error", frame)
    sentence = sentence_for(wrapped.value)
    assert sentence is not None
    assert sentence.startswith(f"the PostgreSQL database of {expected}")
    assert "secret" not in sentence


def test_a_defect_of_ours_in_sql_is_no_fault_of_the_database() -> None:
    import psycopg2

    assert sentence_for(psycopg2.ProgrammingError("syntax error")) is None

"""The doctor says what is wrong and what to do about it."""

from pathlib import Path

import pytest

from gr_platform.commands import doctor


def test_a_missing_serving_environment_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GR_SERVING_VENV", str(tmp_path / "none"))
    for check in (doctor._serving_environment(), doctor._server_binary()):
        assert not check.ok
        assert check.needed
        assert "make setup" in check.advice


def test_a_state_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = doctor._writable("GR_HOME writable", tmp_path / "file" / "home")
    assert not check.ok
    assert check.advice


def test_an_import_that_fails_gives_its_reason(tmp_path: Path) -> None:
    import sys

    assert doctor._imports(Path(sys.executable), "json") == ""
    assert "no_such_module" in doctor._imports(Path(sys.executable), "no_such_module")
    assert doctor._imports(tmp_path / "python", "json") == "FileNotFoundError"


def test_a_healthy_machine_passes_everything_that_needs_no_import(tmp_path: Path) -> None:
    checks = [doctor._python(), doctor._system(), doctor._disk(tmp_path), doctor._memory(), doctor._shared_memory()]
    assert all(check.ok or not check.needed for check in checks)
    assert all(check.ok == (not check.advice) for check in checks)

"""State of an earlier layout becomes what this release reads, whenever it was killed; newer state is refused."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gr_platform import storage
from gr_platform.bundle.load import EXPORT_VERSION, load
from gr_platform.bundle.verify import parity
from gr_platform.errors import UserError
from gr_platform.events.landing import active_dataset
from gr_platform.lifecycle import backup, migration

DATED = "runs that now say until when they learned: 2"
EXPORTED = "bundles exported again: 2; let them serve with gr promote"


@pytest.fixture(scope="module")
def saved(pipeline_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "saved.tar.gz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GR_HOME", str(pipeline_home))
        backup.backup(pipeline_home, path, progress=False)
    return path


@pytest.fixture
def old(saved: Path, tmp_path: Path) -> Path:
    """A state folder as releases left it before there was a layout: undated runs, bundles of an earlier format."""
    home = tmp_path / "home"
    backup.restore(home, saved, progress=False)
    (home / migration.STATE).unlink(missing_ok=True)
    for manifest in home.glob("runs/*/*_model-*/manifest.json"):
        fields = json.loads(manifest.read_text())
        del fields["facts"]["trained_until_ms"]
        manifest.write_text(json.dumps(fields))
    for pointer in home.glob("bundles/*/*.current"):
        folder = pointer.parent / pointer.read_text().strip()
        fields = json.loads((folder / "manifest.json").read_text())
        fields["spec"]["export_version"] = EXPORT_VERSION - 1
        del fields["facts"]["export_version"]
        (folder / "manifest.json").write_text(json.dumps(fields))
        earlier = folder.rename(f"{folder}0")
        storage.point(pointer.parent, pointer.stem, earlier)
    return home


def _bundles(home: Path) -> list[Path]:
    parent = home / "bundles" / active_dataset(home)
    return [storage.current(parent, kind) for kind in ("retrieval", "ranking")]


def _dates(home: Path) -> dict[str, int]:
    found = home.glob("runs/*/*_model-*")
    return {folder.name: storage.read_manifest(folder).facts.get("trained_until_ms") for folder in found}


@pytest.mark.slow
def test_runs_are_dated_and_bundles_exported_again(old: Path, pipeline_home: Path) -> None:
    with pytest.raises(UserError, match="gr materialize"):
        load(_bundles(old)[0])
    assert set(_dates(old).values()) == {None}
    assert list(migration.migrate(old)) == [
        DATED,
        EXPORTED,
        f"the state folder has layout {migration.LAYOUT}, before: 0",
    ]
    assert _dates(old) == _dates(pipeline_home)
    for made, original in zip(_bundles(old), _bundles(pipeline_home), strict=True):
        assert parity(load(made)).ok
        assert load(made).digest == load(original).digest
    assert list(migration.migrate(old)) == [f"the state folder has layout {migration.LAYOUT}, as before"]


def _exported_quickly(folder: Path, manifest: storage.Manifest, run: Path) -> Path:
    """Do as the real export does, with the files that it would make."""

    def build(target: Path) -> dict[str, object]:
        shutil.copytree(folder, target, dirs_exist_ok=True)
        return manifest.facts | {"export_version": EXPORT_VERSION}

    spec = manifest.spec | {"export_version": EXPORT_VERSION}
    return storage.ensure(folder.parent, manifest.kind, spec, build).folder


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
def test_one_killed_at_any_step_is_finished_by_the_next(
    old: Path, pipeline_home: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(migration, "_export", _exported_quickly)
    done: list[str] = []
    with monkeypatch.context() as killing:
        for name in ("add_facts", "ensure", "point"):

            def until_killed(*arguments: object, real: Callable[..., object] = getattr(storage, name)) -> object:
                if len(done) == steps:
                    raise KeyboardInterrupt
                done.append("step")
                return real(*arguments)

            killing.setattr(storage, name, until_killed)
        with pytest.raises(KeyboardInterrupt):
            list(migration.migrate(old))
    assert migration.layout(old) == 0
    list(migration.migrate(old))
    assert migration.layout(old) == migration.LAYOUT
    assert _dates(old) == _dates(pipeline_home)
    made = [storage.read_manifest(bundle) for bundle in _bundles(old)]
    assert [each.facts["export_version"] for each in made] == [EXPORT_VERSION] * 2
    assert len({each.spec["run"] for each in made}) == 2


def test_a_run_without_its_sequences_or_its_files_is_named_and_the_rest_is_done(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = migration._export
    quick = {"retrieval": _exported_quickly}
    monkeypatch.setattr(migration, "_export", lambda *made_of: quick.get(made_of[1].kind, real)(*made_of))
    ds = active_dataset(old)
    (storage.current(old / "sequences" / ds, "sequences") / storage.MANIFEST).unlink()
    run = storage.current(old / "runs" / ds, "ranking_model")
    (run / "model.safetensors").unlink()
    said = list(migration.migrate(old))
    assert said[0].startswith("runs whose sequences are gone")
    assert run.name in said[0]
    assert any("cannot be exported again (cannot use" in line for line in said)
    assert any(line.startswith("bundles exported again: 1") for line in said)


def _gr(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "gr_platform.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"GR_HOME": str(home), "COLUMNS": "300"},
    )


def test_commands_refuse_newer_state_in_one_sentence_and_leave_it_alone(tmp_path: Path) -> None:
    text = json.dumps({"layout": migration.LAYOUT + 1})
    (tmp_path / migration.STATE).write_text(text)
    for command in ("status", "migrate", "materialize", "gates"):
        done = _gr(tmp_path, command)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert "made by a newer release" in done.stderr
    assert _gr(tmp_path, "status", "--help").returncode == 0
    assert (tmp_path / migration.STATE).read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", migration.STATE]


def test_a_new_state_folder_begins_with_this_releases_layout_and_an_old_one_does_not(tmp_path: Path) -> None:
    assert _gr(tmp_path / "new", "status").returncode == 0
    assert migration.layout(tmp_path / "new") == migration.LAYOUT
    (tmp_path / "old" / "landing").mkdir(parents=True)
    assert _gr(tmp_path / "old", "status").returncode == 0
    assert migration.layout(tmp_path / "old") == 0


def test_a_folder_that_a_command_began_takes_the_layout_of_what_is_restored_into_it(old: Path, tmp_path: Path) -> None:
    backup.backup(old, tmp_path / "saved.tar.gz", progress=False)
    migration.begin(tmp_path / "begun")
    assert migration.layout(tmp_path / "begun") == migration.LAYOUT
    backup.restore(tmp_path / "begun", tmp_path / "saved.tar.gz", progress=False)
    assert migration.layout(tmp_path / "begun") == 0


def test_a_damaged_layout_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / migration.STATE).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        migration.require_readable(tmp_path)

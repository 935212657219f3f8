"""What a state folder lets go. On a copy of a whole pipeline's folder, with an older generation of stand-ins in it."""

import json
import os
import shutil
import sqlite3
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from mlflow.exceptions import MlflowException

from gr_platform import storage
from gr_platform.commands import cleaning, status
from gr_platform.errors import UserError
from gr_platform.lifecycle import retention
from gr_platform.registry import expiry, tracking, versions
from serving import repository

DS = "simulated"
DAY_S = 86_400
NOTHING_KEPT = "[retention]\nkeep_days = 0\nkeep_mlflow_days = 0\n"
# MLflow writes down where its files lie.
MOVED = (
    "UPDATE experiments SET artifact_location = replace(artifact_location, ?, ?)",
    "UPDATE runs SET artifact_uri = replace(artifact_uri, ?, ?)",
    "UPDATE logged_models SET artifact_location = replace(artifact_location, ?, ?)",
)


FALLBACK = {"retrieval_bundle", "ranking_bundle", "retrieval_model", "ranking_model"}


@dataclass
class Generation:
    """Stand-ins of an older training, as a retraining leaves them: folders by name, entries by kind."""

    folders: dict[str, Path] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    models: dict[str, Path] = field(default_factory=dict)


@pytest.fixture
def home(pipeline_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pipeline's state folder that keeps nothing which nobody refers to."""
    copied = tmp_path / "home"
    shutil.copytree(pipeline_home, copied, symlinks=True)
    with sqlite3.connect(copied / tracking.DATABASE) as database:
        for moved in MOVED:
            database.execute(moved, (str(pipeline_home), str(copied)))
    (copied / "lifecycle.toml").write_text(NOTHING_KEPT)
    monkeypatch.setenv("GR_HOME", str(copied))
    return copied


def _made(parent: Path, kind: str, spec: dict[str, Any], facts: dict[str, Any] | None = None) -> storage.Result:
    def build(folder: Path) -> dict[str, Any]:
        (folder / "content").write_bytes(b"x" * 1000)
        return facts or {}

    return storage.ensure(parent, kind, spec, build)


@pytest.fixture
def older(home: Path) -> Generation:
    """The older generation, put beside what the pipeline left."""
    found, runs, data = Generation(), home / "runs" / DS, home / "sequences" / DS
    vocabulary = _made(data, "vocabulary", {"old": True}).folder
    segment = _made(data, "segment", {"old": True}).folder
    spec = {"old": True, "vocabulary_folder": vocabulary.name}
    sequences = _made(data, "sequences", spec, {"segments": [segment.name]})
    found.folders |= {"vocabulary": vocabulary, "segment": segment, "sequences": sequences.folder}
    client = tracking.connect(home)
    experiment = tracking.experiment_id(client, home, DS)
    for kind in versions.KINDS:
        model = _made(runs, f"{kind}_model", {"old": True, "sequences": sequences.manifest.digest})
        bundle = _made(home / "bundles" / DS, kind, {"run": model.manifest.digest})
        found.folders |= {f"{kind}_model": model.folder, f"{kind}_bundle": bundle.folder}
        run_id = client.create_run(experiment, tags={tracking.RUN_DIGEST: model.manifest.digest}).info.run_id
        client.log_text(run_id, "a plot", "plots/plot.txt")
        client.set_terminated(run_id)
        logged = client.create_logged_model(experiment, source_run_id=run_id)
        found.models[kind] = home / "mlartifacts" / DS / "models" / logged.model_id
        (found.models[kind] / "artifacts").mkdir(parents=True)
        (found.models[kind] / "artifacts" / "weights").write_bytes(b"x" * 5000)
        tags = {tracking.RUN_DIGEST: model.manifest.digest, "gr.run_folder": model.folder.name}
        created = client.create_model_version(
            versions.model_name(DS, kind), f"models:/{logged.model_id}", run_id, tags=tags, model_id=logged.model_id
        )
        found.runs[kind], found.versions[kind] = run_id, str(created.version)
    for kind in ("evaluation", "judgement"):
        models = {"retrieval": storage.read_manifest(found.folders["retrieval_model"]).digest}
        spec = {"sequences": sequences.manifest.digest, "models": models}
        found.folders[kind] = _made(runs, kind, spec).folder
    found.folders["card"] = _made(home / "cards" / DS, "data_card", {"old": True}).folder
    found.folders["checkpoint"] = runs / ".checkpoint-0123456789abcdef"
    found.folders["checkpoint"].mkdir()
    (found.folders["checkpoint"] / "checkpoint.safetensors").write_bytes(b"x")
    return found


def _pair(home: Path, older: Generation, age_s: float) -> Path:
    """Put a repository of the older bundles in place."""
    digests = {kind: storage.read_manifest(older.folders[f"{kind}_bundle"]).digest for kind in versions.KINDS}
    pair = _made(home / "model_repositories", "pair", digests | {"age": age_s}, {"dataset": DS}).folder
    os.utime(pair / storage.MANIFEST, (time.time() - age_s, time.time() - age_s))
    return pair


def _folders(home: Path) -> set[str]:
    places = [home / place / DS for place in retention.PLACES] + [home / "model_repositories"]
    return {str(each.relative_to(home)) for place in places for each in place.iterdir() if each.is_dir()}


def _is_whole(home: Path) -> None:
    """Assert that what the platform needs loads: current results, the champions' files, the served repository."""
    for name in ("retrieval_model", "ranking_model", "evaluation"):
        storage.read_manifest(storage.current(home / "runs" / DS, name), verify=True)
    sequences = storage.read_manifest(storage.current(home / "sequences" / DS, "sequences"))
    for name in (*sequences.facts["segments"], sequences.spec["vocabulary_folder"]):
        storage.read_manifest(home / "sequences" / DS / name, verify=True)
    champions = [versions.by_alias(home, DS, kind, versions.CHAMPION) for kind in versions.KINDS]
    assert all(champions)
    for version in champions:
        assert version is not None
        storage.read_manifest(home / "runs" / DS / version.tags["gr.run_folder"], verify=True)
        assert tracking.connect(home).get_run(version.run_id).info.lifecycle_stage == "active"
    served = repository.current(home)
    assert served is not None
    storage.read_manifest(served, verify=True)
    assert [line for line in status.report(home) if "champion" in line]


def test_nothing_goes_that_is_current_served_or_has_a_role(home: Path) -> None:
    before = _folders(home)
    done = retention.clean(home, DS)
    assert done.doomed == ()
    assert _folders(home) == before
    _is_whole(home)


def test_an_older_generation_goes_whole_and_what_serves_stays(home: Path, older: Generation) -> None:
    older_pair, predecessor = _pair(home, older, 2000), _pair(home, older, 1000)
    planned = retention.clean(home, DS, dry_run=True)
    assert all(folder.is_dir() for folder in (*older.folders.values(), *older.models.values()))
    done = retention.clean(home, DS)
    assert [each.what for each in done.doomed] == [each.what for each in planned.doomed]
    # The repository before the served one is what a deployment goes back to, and its bundles and runs with it.
    assert not older_pair.exists()
    assert predecessor.is_dir()
    assert {name for name, folder in older.folders.items() if folder.exists()} == FALLBACK
    shutil.rmtree(predecessor)
    retention.clean(home, DS)
    assert not any(folder.exists() for folder in (*older.folders.values(), *older.models.values()))
    client = tracking.connect(home)
    for kind in versions.KINDS:
        assert [version.version for version in versions.versions(home, DS, kind)] == ["1"]
        assert client.get_run(older.runs[kind]).info.lifecycle_stage == "deleted"
        assert not (home / "mlartifacts" / DS / older.runs[kind]).exists()
    _is_whole(home)
    assert retention.clean(home, DS).doomed == ()


def test_a_version_that_may_come_back_keeps_its_run_its_bundle_and_its_mlflow_run(
    home: Path, older: Generation
) -> None:
    client = tracking.connect(home)
    for kind in versions.KINDS:
        client.set_registered_model_alias(versions.model_name(DS, kind), versions.PREVIOUS, older.versions[kind])
    parent = client.create_run(tracking.experiment_id(client, home, DS)).info.run_id
    client.set_tag(older.runs["retrieval"], tracking.PARENT, parent)
    retention.clean(home, DS)
    # Its sequences go: nothing asks an older model for them, a rollback serves from the bundle.
    assert {name for name, folder in older.folders.items() if folder.exists()} == FALLBACK
    assert all(folder.is_dir() for folder in older.models.values())
    stages = {run: client.get_run(run).info.lifecycle_stage for run in (*older.runs.values(), parent)}
    assert set(stages.values()) == {"active"}


def test_the_young_stay_until_they_are_as_old_as_the_options_say(home: Path, older: Generation) -> None:
    (home / "lifecycle.toml").write_text("[retention]\nkeep_days = 2\nkeep_mlflow_days = 5\n")
    assert retention.clean(home, DS, now=time.time() + DAY_S).doomed == ()
    old = older.folders["evaluation"]
    os.utime(old / storage.MANIFEST, (0, 0))
    assert [each.what for each in retention.clean(home, DS).doomed] == [f"runs/{DS}/{old.name}"]
    client = tracking.connect(home)
    for days, stage in ((4, "active"), (6, "deleted")):
        retention.clean(home, DS, now=time.time() + days * DAY_S)
        assert not older.folders["retrieval_model"].exists()
        # Its weights went with the version; its figures stay as long as those of runs do.
        assert [version.version for version in versions.versions(home, DS, "retrieval")] == ["1"]
        assert client.get_run(older.runs["retrieval"]).info.lifecycle_stage == stage
    _is_whole(home)


@pytest.mark.parametrize("survived", [0, 1, 2, 4, 7, 10, 13])
def test_a_deletion_that_was_killed_is_finished_by_the_next(
    home: Path, older: Generation, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    real, done = shutil.rmtree, list[Path]()

    def until_killed(folder: Path, ignore_errors: bool = False) -> None:
        if ignore_errors:
            return real(folder, ignore_errors=True)
        if len(done) == survived:
            # Half of it is gone by then.
            next(path for path in sorted(folder.rglob("*")) if path.is_file()).unlink()
            raise KeyboardInterrupt
        done.append(folder)
        return real(folder)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", until_killed)
        with pytest.raises(KeyboardInterrupt):
            retention.clean(home, DS)
    _is_whole(home)
    retention.clean(home, DS)
    assert not any(folder.exists() for folder in (*older.folders.values(), *older.models.values()))
    assert not [name for name in _folders(home) if retention.RETIRED in name]
    assert retention.clean(home, DS).doomed == ()
    _is_whole(home)


def test_nothing_behind_a_link_is_deleted(home: Path, older: Generation, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    moved = outside / older.folders["evaluation"].name
    outside.mkdir()
    shutil.move(older.folders["evaluation"], moved)
    older.folders["evaluation"].symlink_to(moved)
    shutil.move(home / "cards" / DS, outside / "cards")
    (home / "cards" / DS).symlink_to(outside / "cards")
    target = outside / "precious"
    target.write_text("precious")
    (older.folders["judgement"] / "link").symlink_to(target)
    done = retention.clean(home, DS)
    assert (moved / storage.MANIFEST).is_file()
    assert (outside / "cards" / older.folders["card"].name / storage.MANIFEST).is_file()
    assert target.read_text() == "precious"
    assert not older.folders["judgement"].exists()
    assert {"is a link" in line or "leads out of" in line for line in done.left_alone} == {True}
    assert len(done.left_alone) == 2


def test_artifacts_that_lie_elsewhere_are_no_business_of_the_cleaning(
    home: Path, older: Generation, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere" / older.runs["retrieval"] / "artifacts"
    elsewhere.mkdir(parents=True)
    with sqlite3.connect(home / tracking.DATABASE) as database:
        database.execute("UPDATE runs SET artifact_uri = ?", (elsewhere.as_uri(),))
    retention.clean(home, DS)
    assert elsewhere.is_dir()


@pytest.mark.parametrize("reader", ["roles", "old_versions", "old_runs"])
def test_without_the_registry_nothing_is_deleted(
    home: Path, older: Generation, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    def down(*_: object) -> None:
        raise MlflowException("the database is gone")

    before = _folders(home)
    monkeypatch.setattr(expiry, reader, down)
    with pytest.raises(MlflowException):
        retention.clean(home, DS)
    assert _folders(home) == before


def test_a_registry_that_does_not_know_who_serves_deletes_nothing(home: Path, older: Generation) -> None:
    before = _folders(home)
    (home / tracking.DATABASE).unlink()
    with pytest.raises(UserError, match="the registry names no champion"):
        retention.clean(home, DS)
    assert _folders(home) == before


def test_while_a_stage_runs_nothing_is_deleted(home: Path, older: Generation) -> None:
    before = _folders(home)
    with FileLock(home / ".stages.lock"), pytest.raises(UserError, match="another program works on the stages"):
        retention.clean(home, DS)
    assert _folders(home) == before


def test_an_unreadable_manifest_is_left_alone_and_one_that_is_missing_goes(home: Path, older: Generation) -> None:
    damaged = older.folders["judgement"] / storage.MANIFEST
    damaged.write_text(json.dumps(storage.read_object(damaged) | {"schema_version": 9}))
    (older.folders["evaluation"] / storage.MANIFEST).unlink()
    done = retention.clean(home, DS)
    assert damaged.is_file()
    assert [line for line in done.left_alone if "schema version 9" in line]
    assert not older.folders["evaluation"].exists()


def test_a_file_with_two_names_frees_its_bytes_when_both_go(home: Path, older: Generation) -> None:
    before = retention.clean(home, DS, dry_run=True).num_bytes
    kept = next(path for path in repository.current(home).rglob("*") if path.is_file())
    os.link(kept, older.folders["evaluation"] / "served_too")
    both = older.folders["evaluation"] / "twice"
    both.write_bytes(b"y" * 777)
    os.link(both, older.folders["judgement"] / "twice")
    assert retention.clean(home, DS, dry_run=True).num_bytes == before + 777


def test_the_command_says_what_went_and_what_stays(home: Path, older: Generation) -> None:
    def said(dry_run: bool) -> list[str]:
        return list(cleaning.report(home, DS, dry_run=dry_run))

    planned = said(True)
    assert f"would delete  runs/{DS}/{older.folders['evaluation'].name}  1.4 kB, 0 hours old" in planned
    assert planned[-1].startswith("would free")
    done = said(False)
    assert [line.replace("would delete", "deleted") for line in planned[:-1]] == done[:-1]
    assert said(False)[-1] == "nothing to delete"


def test_sizes_and_ages_are_told_in_whole_units() -> None:
    assert [cleaning.size(size) for size in (7, 1234, 5_600_000, 7.8e9)] == ["7 B", "1.2 kB", "5.6 MB", "7.8 GB"]
    assert [cleaning.age(hours * 3600) for hours in (-1, 3, 47, 72)] == ["0 hours", "3 hours", "47 hours", "3 days"]

"""A run is found by every name a person has for it. Models are stand-ins: files of the right names."""

import json
from pathlib import Path

import pytest

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.models.recipes import tiny
from gr_platform.registry import tracking
from gr_platform.registry.names import run_folder

DS = "shop"


def _run(home: Path, kind: str, name: str) -> storage.Result:
    def build(folder: Path) -> dict[str, int]:
        (folder / "recipe.json").write_text(json.dumps(tiny(kind).to_json()))
        return {}

    made = storage.ensure(home / "runs" / DS, f"{kind}_model", {"name": name, "sequences": "s"}, build)
    storage.point(home / "runs" / DS, f"{kind}_model", made.folder)
    return made


def test_a_run_is_found_by_folder_by_either_digest_and_as_the_current_one(tmp_path: Path) -> None:
    older, newer = _run(tmp_path, "retrieval", "a"), _run(tmp_path, "retrieval", "b")
    ranking = _run(tmp_path, "ranking", "a")
    for made in (older, newer, ranking):
        for name in (made.folder.name, made.manifest.digest, made.manifest.digest[:8], made.folder.name[-16:][:6]):
            assert run_folder(tmp_path, DS, name) == made.folder
    assert run_folder(tmp_path, DS, "retrieval_model") == newer.folder
    assert run_folder(tmp_path, DS, "ranking_model") == ranking.folder


def test_a_run_is_found_by_its_name_in_mlflow(tmp_path: Path) -> None:
    older, newer = _run(tmp_path, "retrieval", "a"), _run(tmp_path, "retrieval", "b")
    client = tracking.connect(tmp_path)
    experiment = tracking.experiment_id(client, tmp_path, DS)
    for name, made in (("first", older), ("second", newer), ("twice", older), ("twice", newer)):
        client.create_run(experiment, run_name=name, tags={tracking.RUN_DIGEST: made.manifest.digest})
    client.create_run(experiment, run_name="elsewhere", tags={tracking.RUN_DIGEST: "0" * 40})
    assert run_folder(tmp_path, DS, "first") == older.folder
    assert run_folder(tmp_path, DS, "second") == newer.folder
    with pytest.raises(UserError, match="'twice' fits several runs of shop"):
        run_folder(tmp_path, DS, "twice")
    for unknown in ("elsewhere", "it's"):
        with pytest.raises(UserError, match="has no run"):
            run_folder(tmp_path, DS, unknown)


@pytest.mark.parametrize("text", ["{bad", "[]", '{"schema_version": 9}'])
def test_a_damaged_manifest_is_in_the_way_of_its_own_run_alone(tmp_path: Path, text: str) -> None:
    damaged, whole = _run(tmp_path, "retrieval", "a"), _run(tmp_path, "retrieval", "b")
    (damaged.folder / storage.MANIFEST).write_text(text)
    for name in (whole.folder.name, whole.manifest.digest[:8], whole.folder.name[-16:][:6]):
        assert run_folder(tmp_path, DS, name) == whole.folder
    with pytest.raises(UserError, match=rf"has no run 'x'.*\(runs: {whole.folder.name}\)"):
        run_folder(tmp_path, DS, "x")
    for name in (damaged.folder.name, damaged.folder.name[-16:][:6]):
        with pytest.raises(UserError, match="delete the folder and make it again"):
            run_folder(tmp_path, DS, name)


def test_an_unknown_run_is_answered_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data set shop has no run 'x'.*none yet"):
        run_folder(tmp_path, DS, "x")
    made = _run(tmp_path, "retrieval", "a")
    with pytest.raises(UserError, match=made.folder.name):
        run_folder(tmp_path, DS, made.manifest.digest[:3])
    with pytest.raises(UserError, match="no ranking_model yet"):
        run_folder(tmp_path, DS, "ranking_model")
    assert not (tmp_path / "mlflow.db").exists()

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.evaluation import evaluate as evaluation
from gr_platform.evaluation.compare import compare_runs
from gr_platform.evaluation.evaluate import BASELINES, evaluate_baseline, evaluate_current, evaluate_run
from gr_platform.evaluation.protocols import rank_by_model
from gr_platform.evaluation.slices import SLICES
from gr_platform.evaluation.tables import metrics_of_table
from gr_platform.models.recipes import tiny
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.training import checkpoint
from gr_platform.training.epoch import Epoch
from gr_platform.training.load import load_model
from gr_platform.training.loop import train_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small simulated log through ingest, sequences, both models and evaluation."""
    from gr_platform.events.ingest import ingest
    from gr_platform.events.landing import import_file
    from gr_platform.events.simulator import simulate
    from gr_platform.sequences.sequentialize import sequentialize
    from gr_platform.sequences.vocabulary import build_vocabulary

    home = tmp_path_factory.mktemp("home")
    simulate(home / "log.parquet", num_events=20_000)
    import_file(home / "log.parquet", home=home, dataset="sim")
    ingest(home, "sim")
    build_vocabulary(home, "sim")
    sequentialize(home, "sim")
    for kind in ("retrieval", "ranking"):
        train_model(home, "sim", kind, "tiny", progress=False)
    return home, evaluate_current(home, "sim")


def test_facts_can_be_computed_again_from_the_files(trained):
    _, result = trained
    facts = result.manifest.facts
    for name in ("retrieval", "retrieval_chunk_1", "ranking", *BASELINES):
        assert metrics_of_table(pq.read_table(result.folder / f"{name}.parquet")) == facts[name]
    table = pq.read_table(result.folder / "retrieval.parquet")
    assert table.column_names[:4] == ["user_id", "item", "rank", "score"]
    assert len(table) == facts["retrieval"]["num_users"] == facts["num_users"] > 50
    assert set(facts["ranking"]) == set(facts["ranking_calibration"]) == {"like", "purchase"}
    assert {row["slice"] for row in facts["slices"]} == set(SLICES)
    json.dumps(facts, allow_nan=False)


def test_figures_at_chunk_1_are_those_of_the_sliding_window(trained):
    home, result = trained
    model = load_model(storage.current(home / "runs" / "sim", "retrieval_model"))
    dataset = SequenceDataset.current(home, "sim")
    for name, chunk in (("retrieval", model.config.chunk), ("retrieval_chunk_1", 1)):
        stored = pq.read_table(result.folder / f"{name}.parquet")["rank"].to_numpy()
        np.testing.assert_array_equal(stored, rank_by_model(model, dataset, "test", chunk=chunk).ranks)
    assert result.manifest.facts["retrieval"] != result.manifest.facts["retrieval_chunk_1"]


def test_a_run_alone_has_the_figures_that_the_pair_has(trained):
    home, result = trained
    facts, alone = result.manifest.facts, {}
    for kind in ("retrieval", "ranking"):
        found = evaluate_run(home, "sim", storage.current(home / "runs" / "sim", f"{kind}_model"))
        assert found.reused
        alone |= found.manifest.facts
    assert alone == facts
    assert evaluate_baseline(home, "sim", "popularity").manifest.facts["popularity"] == facts["popularity"]


def test_a_model_alone_can_be_current(trained, tmp_path):
    home, result = trained
    for name in ("sequences", "landing"):
        (tmp_path / name).symlink_to(home / name)
    runs = tmp_path / "runs" / "sim"
    runs.mkdir(parents=True)
    for path in (home / "runs" / "sim").glob("retrieval_model*"):
        (runs / path.name).symlink_to(path)
    alone = evaluate_current(tmp_path, "sim")
    assert alone.manifest.facts["retrieval"] == result.manifest.facts["retrieval"]
    assert "ranking" not in alone.manifest.facts
    assert set(alone.manifest.spec["models"]) == {"retrieval"}
    assert storage.current(runs, "evaluation") == alone.folder


def test_a_refit_model_is_judged_beside_baselines_that_know_as_much(trained, monkeypatch):
    home, result = trained
    lengths = SequenceDataset.current(home, "sim").lengths
    monkeypatch.setattr(
        evaluation, "trained_ends", lambda folder, num_users: np.where(lengths < 3, lengths, lengths - 1)
    )
    monkeypatch.setattr(evaluation, "EVALUATION_VERSION", 0)
    folder = storage.current(home / "runs" / "sim", "retrieval_model")
    facts = evaluate_run(home, "sim", folder).manifest.facts
    assert facts["retrieval"] == result.manifest.facts["retrieval"]
    assert facts["popularity"] == evaluate_baseline(home, "sim", "popularity", refit=True).manifest.facts["popularity"]
    assert facts["popularity"] != result.manifest.facts["popularity"]


def test_a_model_that_saw_its_test_targets_is_refused(trained, monkeypatch):
    home, _ = trained
    lengths = SequenceDataset.current(home, "sim").lengths
    monkeypatch.setattr(evaluation, "trained_ends", lambda folder, num_users: lengths)
    monkeypatch.setattr(evaluation, "EVALUATION_VERSION", -1)
    with pytest.raises(UserError, match="trained on the test targets of"):
        evaluate_run(home, "sim", storage.current(home / "runs" / "sim", "retrieval_model"))


def test_the_same_models_are_evaluated_once(trained):
    home, result = trained
    again = evaluate_current(home, "sim")
    assert again.reused
    assert again.manifest == result.manifest
    assert storage.current(home / "runs" / "sim", "evaluation") == result.folder


def test_training_again_reuses_the_result_and_leaves_no_checkpoint(trained):
    home, _ = trained
    runs = home / "runs" / "sim"
    for kind in ("retrieval", "ranking"):
        result = train_model(home, "sim", kind, "tiny", progress=False)
        assert result.reused
        assert storage.current(runs, f"{kind}_model") == result.folder
        assert result.manifest.facts["dataset_digest"] == result.manifest.spec["sequences"]
    assert not [path.name for path in runs.iterdir() if path.name.startswith(".")]


def test_a_killed_stage_resumes_and_ends_with_the_same_digest(trained, monkeypatch):
    home, _ = trained
    recipe = tiny("retrieval").with_training(seed=5, max_epochs=2)
    real_save, real_pass = checkpoint.save_checkpoint, Epoch._pass

    class Killed(BaseException):
        pass

    def save_then_die(*arguments):
        real_save(*arguments)
        raise Killed

    passes = []
    monkeypatch.setattr(Epoch, "_pass", lambda self, *a: (passes.append(a[3]), real_pass(self, *a))[1])
    monkeypatch.setattr(checkpoint, "save_checkpoint", save_then_die)
    with pytest.raises(Killed):
        train_model(home, "sim", "retrieval", recipe, progress=False)
    monkeypatch.setattr(checkpoint, "save_checkpoint", real_save)
    resumed = train_model(home, "sim", "retrieval", recipe, progress=False)
    assert passes == [0, 1]
    for path in resumed.folder.iterdir():
        path.unlink()
    whole = train_model(home, "sim", "retrieval", recipe, progress=False)
    assert not whole.reused
    assert whole.manifest.digest == resumed.manifest.digest
    train_model(home, "sim", "retrieval", "tiny", progress=False)


def test_models_of_other_sequences_are_refused(trained, tmp_path):
    home, _ = trained
    shutil.copytree(home / "sequences", tmp_path / "sequences")
    (tmp_path / "runs").symlink_to(home / "runs")
    folder = storage.current(tmp_path / "sequences" / "sim", "sequences")
    made = storage.read_manifest(folder)
    storage.write_manifest(folder, kind=made.kind, spec=made.spec | {"other": 1}, facts=made.facts)
    with pytest.raises(UserError, match="trained on other sequences"):
        evaluate_current(tmp_path, "sim")


def test_a_damaged_model_names_the_command_that_trains_it_again(trained, tmp_path, monkeypatch):
    home, _ = trained
    monkeypatch.setenv("GR_HOME", str(tmp_path))
    for name in ("sequences", "landing"):
        (tmp_path / name).symlink_to(home / name)
    recipe = tiny("retrieval").with_training(seed=4, max_epochs=1)
    made = train_model(tmp_path, "sim", "retrieval", recipe, progress=False)
    again = "train it again: gr train --recipe tiny --kind retrieval --dataset sim --seed 4 --epochs 1$"
    with (made.folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(5_000)
    where = rf"^\$GR_HOME/runs/sim/{made.folder.name}/model\.safetensors"
    with pytest.raises(UserError, match=rf"{where} is corrupt .*; {again}"):
        evaluate_run(tmp_path, "sim", made.folder)
    (made.folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"{where} is missing; {again}"):
        evaluate_run(tmp_path, "sim", made.folder)
    assert not train_model(tmp_path, "sim", "retrieval", recipe, progress=False).reused
    evaluate_run(tmp_path, "sim", made.folder)


def test_a_missing_model_is_a_clear_error(trained, tmp_path):
    home, _ = trained
    (tmp_path / "sequences").symlink_to(home / "sequences")
    with pytest.raises(UserError, match="no retrieval_model yet"):
        evaluate_current(tmp_path, "sim")


def test_the_popularity_file_names_users_and_items_of_the_test_split(trained):
    home, result = trained
    dataset = SequenceDataset.current(home, "sim")
    table = pq.read_table(result.folder / "popularity.parquet")
    row = dataset.find_user(table["user_id"][0].as_py())
    assert table["item"][0].as_py() == dataset.at([row], dataset.lengths[[row]] - 1).items[0]
    assert np.all(table["rank"].to_numpy() >= 1)


def test_two_runs_are_compared_user_by_user(trained):
    home, _ = trained
    runs = home / "runs" / "sim"
    current = storage.current(runs, "retrieval_model")
    other = train_model(home, "sim", "retrieval", tiny("retrieval").with_training(seed=9, max_epochs=1), progress=False)
    storage.point(runs, "retrieval_model", current)
    found = compare_runs(home, "sim", other.manifest.digest[:8], "retrieval_model")
    assert (found["kind"], found["a"], found["b"]) == ("retrieval", other.folder.name, current.name)
    facts = [evaluate_run(home, "sim", folder).manifest.facts["retrieval"] for folder in (other.folder, current)]
    for line in found["differences"]:
        assert (line["a"], line["b"]) == pytest.approx(tuple(each[line["figure"]] for each in facts))
        assert line["low"] <= line["difference"] <= line["high"]
    json.dumps(found, allow_nan=False)
    assert (found["recipe_a"], found["recipe_b"]) == ("tiny, seed 9", "tiny, seed 1")
    with pytest.raises(UserError, match="are one run"):
        compare_runs(home, "sim", "ranking_model", "ranking_model")
    with pytest.raises(UserError, match="compare two of one kind"):
        compare_runs(home, "sim", "retrieval_model", "ranking_model")

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.evaluation.evaluate import evaluate
from gr_platform.evaluation.metrics import binary_metrics, rank_metrics
from gr_platform.models.recipes import tiny
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.training import loop
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
    return home, evaluate(home, "sim")


def test_facts_can_be_computed_again_from_the_files(trained):
    _, result = trained
    facts = result.manifest.facts
    for name in ("retrieval", "popularity"):
        table = pq.read_table(result.folder / f"{name}.parquet")
        assert table.column_names == ["user_id", "item", "rank", "score"]
        again = rank_metrics(table["rank"].to_numpy())
        assert again == {key: facts[name][key] for key in again}
        assert len(table) == facts[name]["num_users"] == facts["num_users"] > 50
    judged = pq.read_table(result.folder / "ranking.parquet")
    assert set(facts["ranking"]) == {"like", "purchase"}
    for task, figures in facts["ranking"].items():
        again = binary_metrics(judged[f"label_{task}"].to_numpy(), judged[f"logit_{task}"].to_numpy())
        assert again == pytest.approx(figures)
    json.dumps(facts, allow_nan=False)


def test_the_same_models_are_evaluated_once(trained):
    home, result = trained
    again = evaluate(home, "sim")
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
    real_save, real_fold = loop.save_checkpoint, loop.Epoch._pass

    class Killed(BaseException):
        pass

    def save_then_die(*arguments):
        real_save(*arguments)
        raise Killed

    passes = []
    monkeypatch.setattr(loop.Epoch, "_pass", lambda self, *a: (passes.append(a[-1]), real_fold(self, *a))[1])
    monkeypatch.setattr(loop, "save_checkpoint", save_then_die)
    with pytest.raises(Killed):
        train_model(home, "sim", "retrieval", recipe, progress=False)
    monkeypatch.setattr(loop, "save_checkpoint", real_save)
    resumed = train_model(home, "sim", "retrieval", recipe, progress=False)
    assert passes == [0, 1]
    for path in resumed.folder.iterdir():
        path.unlink()
    whole = train_model(home, "sim", "retrieval", recipe, progress=False)
    assert not whole.reused
    assert whole.manifest.digest == resumed.manifest.digest
    train_model(home, "sim", "retrieval", "tiny", progress=False)


def test_models_of_other_sequences_are_refused(trained, monkeypatch):
    home, _ = trained
    opened = SequenceDataset.open

    def other(folder):
        dataset = opened(folder)
        dataset.digest = "another"
        return dataset

    monkeypatch.setattr(SequenceDataset, "open", staticmethod(other))
    with pytest.raises(UserError, match="trained on other sequences"):
        evaluate(home, "sim")


def test_a_missing_model_is_a_clear_error(trained, tmp_path):
    home, _ = trained
    (tmp_path / "sequences").symlink_to(home / "sequences")
    with pytest.raises(UserError, match="no retrieval_model yet"):
        evaluate(tmp_path, "sim")


def test_the_popularity_file_names_users_and_items_of_the_test_split(trained):
    home, result = trained
    dataset = SequenceDataset.current(home, "sim")
    table = pq.read_table(result.folder / "popularity.parquet")
    row = dataset.find_user(table["user_id"][0].as_py())
    assert table["item"][0].as_py() == dataset.at([row], dataset.lengths[[row]] - 1).items[0]
    assert np.all(table["rank"].to_numpy() >= 1)

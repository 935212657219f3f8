"""The commands about models: what is trained alone is what the pipeline reuses, judged and compared by name."""

import io
import shutil

import pytest
from mlflow.exceptions import MlflowException
from rich.console import Console

from gr_platform import storage
from gr_platform.commands import cli_models, demo, judging, status, training
from gr_platform.errors import UserError
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file
from gr_platform.models.recipes import RECIPES, tiny
from gr_platform.registry import tracking
from gr_platform.registry.names import run_folder
from gr_platform.registry.versions import KINDS
from gr_platform.sequences.sequentialize import sequentialize
from gr_platform.sequences.vocabulary import build_vocabulary
from gr_platform.training import checkpoint
from gr_platform.training.loop import train_model

DS = "simulated"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A state folder with two retrieval models of different seeds and a ranking model, trained by the command."""
    home = tmp_path_factory.mktemp("models")
    import_file(demo.simulated(home, 5_000), home=home, dataset=DS)
    ingest(home, DS)
    build_vocabulary(home, DS)
    sequentialize(home, DS)
    lines = list(training.report(home, DS, training.Wanted(recipe="tiny")))
    assert sum(": tiny on simulated" in line for line in lines) == 2
    assert any("tokens/s" in line for line in lines)
    list(training.report(home, DS, training.Wanted(recipe="tiny", kind="retrieval", seed=2)))
    return home


def _shown(command, *arguments):
    console = Console(width=160, file=io.StringIO())
    command(*arguments, console)
    return console.file.getvalue()


def test_what_was_trained_is_reused_by_the_pipeline(home):
    result = train_model(home, DS, "ranking", "tiny", progress=False)
    assert result.reused
    lines = list(training.report(home, DS, training.Wanted(recipe="tiny", kind="ranking")))
    assert lines[0] == f"{result.folder.name} was trained before: tiny on {DS}"
    assert lines[-1] == f"next: gr evaluate {result.folder.name}"


def test_another_seed_is_another_run(home):
    first, second = sorted((home / "runs" / DS).glob("retrieval_model-*"))
    seeds = {storage.read_manifest(folder).spec["recipe"]["training"]["seed"] for folder in (first, second)}
    assert seeds == {1, 2}


def test_a_recipe_of_ones_own_is_trained_for_as_long_as_is_wanted(home, tmp_path):
    (tmp_path / "mine.toml").write_text('base = "tiny"\n[training]\nlearning_rate = 0.002\n')
    wanted = training.Wanted(recipe=str(tmp_path / "mine.toml"), kind="ranking", epochs=1, seed=3)
    current = storage.current(home / "runs" / DS, "ranking_model")
    lines = list(training.report(home, DS, wanted))
    assert f"trained: mine on {DS}" in lines[0]
    assert ", 1 epochs, " in lines[1]
    made = storage.read_manifest(storage.current(home / "runs" / DS, "ranking_model")).spec["recipe"]["training"]
    storage.point(home / "runs" / DS, "ranking_model", current)
    expected = tiny("ranking").with_training(learning_rate=0.002, max_epochs=1, seed=3)
    assert made == expected.to_json()["training"]


def test_the_state_names_what_is_unfinished(home, monkeypatch):
    monkeypatch.setenv("GR_HOME", str(home))
    recipe, real = tiny("retrieval").with_training(seed=8), checkpoint.save_checkpoint

    def save_then_stop(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train_model(home, DS, "retrieval", recipe, progress=False)
    [folder] = (home / "runs" / DS).glob(".checkpoint-*")
    [line] = [line for line in status.report(home) if "unfinished" in line]
    assert "retrieval tiny, seed 8: validation epoch 1 done, saved " in line
    assert str(folder) in line
    shutil.rmtree(folder)
    assert not [line for line in status.report(home) if "unfinished" in line]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(3, "3 seconds"), (119, "119 seconds"), (300, "5 minutes"), (9_000, "2 hours"), (2e5, "2 days")],
)
def test_an_age_is_told_in_its_largest_unit(seconds, shown):
    assert status._ago(seconds) == shown


def test_a_run_is_judged_beside_the_baselines(home):
    shown = _shown(judging.evaluate, home, DS, "retrieval_model")
    for text in ("HR@10", "as served", "popularity", "co-occurrence", "events known"):
        assert text in shown
    assert "NE" not in shown
    current = _shown(judging.evaluate, home, DS, None)
    assert "NE" in current
    assert "GAUC" in current
    assert storage.current(home / "runs" / DS, "evaluation")


def test_two_runs_are_compared_with_an_interval(home):
    first, second = (folder.name for folder in sorted((home / "runs" / DS).glob("retrieval_model-*")))
    shown = _shown(judging.compare, home, DS, first, second)
    assert "ndcg_at_10" in shown
    assert "hr_at_200" in shown
    assert "95 %" in shown
    assert "seed 2" in shown
    assert "not whether other training seeds would" in " ".join(shown.split())
    assert "not of training seeds" in (cli_models.compare.__doc__ or "")
    with pytest.raises(UserError, match="are one run"):
        _shown(judging.compare, home, DS, first, first)
    with pytest.raises(UserError, match="compare two of one kind"):
        _shown(judging.compare, home, DS, first, "ranking_model")


def test_mlflow_has_every_run_that_was_trained_and_what_was_measured_of_it(home):
    client = tracking.connect(home)
    place = [client.get_experiment_by_name(DS).experiment_id]
    of_runs = {run.data.tags[tracking.RUN_DIGEST]: run for run in client.search_runs(place)}
    folders = [folder for kind in KINDS for folder in (home / "runs" / DS).glob(f"{kind}_model-*")]
    assert {storage.read_manifest(folder).digest for folder in folders} == set(of_runs)
    # Another seed is another name, and the name is an address.
    names = [f"retrieval-tiny-s{seed}-" for seed in (1, 2)]
    for run in of_runs.values():
        folder = run_folder(home, DS, run.info.run_name)
        assert storage.read_manifest(folder).digest == run.data.tags[tracking.RUN_DIGEST]
        if run.info.run_name.startswith(names[1]):
            assert f"in MLflow as {run.info.run_name}" in _shown(judging.evaluate, home, DS, run.info.run_name)
            metrics = client.get_run(run.info.run_id).data.metrics
            assert {"train_loss", "validation_hr_at_10", "test_hr_at_10", "popularity_hr_at_10"} <= set(metrics)
    assert all(any(run.info.run_name.startswith(name) for run in of_runs.values()) for name in names)


def test_a_registry_that_cannot_be_written_costs_a_sentence(home, monkeypatch):
    def refuse(home):
        raise MlflowException("database is locked")

    monkeypatch.setattr(tracking, "connect", refuse)
    lines = list(training.report(home, DS, training.Wanted(recipe="tiny", kind="retrieval")))
    assert any("was trained before" in line for line in lines)
    assert any("MLflow did not take the run" in line for line in lines)


def test_every_recipe_has_a_line():
    lines = list(training.list_recipes())
    for name, line in zip(RECIPES, lines, strict=False):
        assert line.startswith(f"{name} ")
        assert len(line.split("  ", 1)[1].strip()) > 20
    assert "-sasrec" in lines[len(RECIPES)]

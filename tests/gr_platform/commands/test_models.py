"""The commands about models: what is trained alone is what the pipeline reuses, judged and compared by name."""

import io

import pytest
from rich.console import Console

from gr_platform import storage
from gr_platform.commands import demo, judging, training
from gr_platform.errors import UserError
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file
from gr_platform.models.recipes import RECIPES
from gr_platform.sequences.sequentialize import sequentialize
from gr_platform.sequences.vocabulary import build_vocabulary
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
    assert "95 %" in shown
    with pytest.raises(UserError, match="compare two of one kind"):
        _shown(judging.compare, home, DS, first, "ranking_model")


def test_every_recipe_has_a_line():
    lines = list(training.list_recipes())
    for name, line in zip(RECIPES, lines, strict=False):
        assert line.startswith(f"{name} ")
        assert len(line.split("  ", 1)[1].strip()) > 20
    assert "-sasrec" in lines[len(RECIPES)]

"""The assets of models do what the commands do: options, one kind alone, a comparison, runs in MLflow."""

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from mlflow.exceptions import MlflowException

from assets.evaluation import comparison, evaluation
from assets.model_checks import finite_figures
from assets.registration import registration
from assets.resources import Platform
from assets.training import ranking_model, retrieval_model
from gr_platform import storage
from gr_platform.commands import demo, status
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file
from gr_platform.registry import tracking
from gr_platform.sequences.sequentialize import sequentialize
from gr_platform.sequences.vocabulary import build_vocabulary

DS = "simulated"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder with sequences and no model."""
    home = tmp_path_factory.mktemp("assets")
    import_file(demo.simulated(home, 5_000), home=home, dataset=DS)
    ingest(home, DS)
    build_vocabulary(home, DS)
    sequentialize(home, DS)
    return home


def _materialize(home: Path, *assets: Any, **config: Any) -> dict[str, dict[str, Any]]:
    first = assets[0].key.path[-1]
    done = dg.materialize(
        assets,
        resources={"platform": Platform(home=str(home), dataset=DS)},
        run_config={"ops": {first: {"config": config}}},
    )
    assert done.success
    names = [asset.key.path[-1] for asset in assets if not isinstance(asset, dg.AssetChecksDefinition)]
    return {name: dict(done.asset_materializations_for_node(name)[0].metadata) for name in names}


def test_one_kind_alone_goes_through_and_two_seeds_are_compared(home: Path) -> None:
    for seed in (1, 2):
        chain = (retrieval_model, evaluation, finite_figures, registration)
        found = _materialize(home, *chain, recipe="tiny", seed=seed)
        name = found["retrieval_model"]["mlflow_run"].value
        assert name.startswith(f"retrieval-tiny-s{seed}-")
        assert found["evaluation"]["hr_at_10"].value > 0
        assert "ranking_version" not in found["registration"]
        assert int(found["registration"]["retrieval_version"].value) == seed
    client = tracking.connect(home)
    place = client.get_experiment_by_name(DS)
    assert place is not None
    runs = client.search_runs([place.experiment_id])
    assert len(runs) == 2
    first, second = sorted(str(run.info.run_name) for run in runs)
    shown = _materialize(home, comparison, first=first, second=second)["comparison"]
    differences = [run.data.metrics["test_hr_at_10"] for run in sorted(runs, key=lambda run: str(run.info.run_name))]
    assert shown["hr_at_10"].value == pytest.approx(differences[1] - differences[0])
    assert "seed 2" in shown["b"].value


def test_a_warm_start_names_an_older_run(home: Path) -> None:
    older = storage.current(home / "runs" / DS, "retrieval_model")
    _materialize(home, retrieval_model, recipe="tiny", seed=5, warm_start=older.name.split("-")[-1])
    made = storage.read_manifest(storage.current(home / "runs" / DS, "retrieval_model"))
    assert made.spec["warm_start"] is not None
    assert made.spec["recipe"]["training"]["seed"] == 5


@pytest.fixture
def untrained(home: Path, tmp_path: Path) -> Path:
    """The same sequences in a state folder of its own."""
    for name in ("landing", "sequences"):
        shutil.copytree(home / name, tmp_path / name)
    return tmp_path


def test_a_ranking_model_alone_is_judged_tracked_and_shown(untrained: Path) -> None:
    found = _materialize(untrained, ranking_model, evaluation, finite_figures, recipe="tiny")
    assert found["evaluation"]["ranking_run"].value == found["ranking_model"]["mlflow_run"].value
    assert "retrieval_run" not in found["evaluation"]
    # Nobody registered it, and its figures on the test are in MLflow.
    client = tracking.connect(untrained)
    place = client.get_experiment_by_name(DS)
    assert place is not None
    [run] = client.search_runs([place.experiment_id])
    entropies = [found["evaluation"][f"{task}_ne"].value for task in ("like", "purchase")]
    assert run.data.metrics["test_mean_ne"] == pytest.approx(sum(entropies) / 2)
    [line] = [line for line in status.report(untrained) if "evaluation" in line]
    assert line == f"  evaluation   NE like {entropies[0]:.4f}, purchase {entropies[1]:.4f}"


def test_a_registry_that_cannot_be_written_stops_neither_training_nor_judging(
    untrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(home: Path) -> None:
        raise MlflowException("database is locked")

    monkeypatch.setattr(tracking, "connect", refuse)
    found = _materialize(untrained, retrieval_model, evaluation, recipe="tiny")
    for said in (found["retrieval_model"]["mlflow_run"], found["evaluation"]["retrieval_run"]):
        assert "MLflow did not take it" in said.value

"""The experiments' assets on small data: a partition is a nested run, a report is its parent's, the chart is of all."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.experiments import Experiments, compute_against_quality, experiment_assets
from gr_platform.experiments.catalogue import named
from gr_platform.registry import experiments as tracked
from gr_platform.registry.tracking import connect

NAME = "generative_training"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder in which every partition of one experiment and its report were materialised."""
    home = tmp_path_factory.mktemp("lab")
    cells, report = (_asset(f"{NAME}_{part}") for part in ("cells", "report"))
    for cell in named(NAME, "smoke").cells:
        assert _materialize(home, cells, partition_key=cell.name)["reused"].value is False
    assert _materialize(home, report)["missing"].value == 0
    return home


def test_cells_are_nested_runs_with_params_curves_and_figures_under_the_experiment(lab: Path) -> None:
    client = connect(lab)
    place = client.get_experiment_by_name(tracked.EXPERIMENTS)
    assert place is not None
    runs = client.search_runs([place.experiment_id])
    parents = [run for run in runs if tracked.PARENT not in run.data.tags]
    assert [run.info.run_name for run in parents] == ["Generative against impression-level training (smoke)"]
    nested = {run.info.run_name: run for run in runs if tracked.PARENT in run.data.tags}
    assert set(nested) == {f"{NAME}/{cell.name}" for cell in named(NAME, "smoke").cells}
    run = nested[f"{NAME}/impressions"]
    assert run.data.tags[tracked.PARENT] == parents[0].info.run_id
    assert run.data.params["model.encoder"] == "hstu"
    assert run.data.params["options.examples"] == "impressions"
    assert run.data.metrics["train_flops"] > 0
    assert [each.step for each in client.get_metric_history(run.info.run_id, "curve_ndcg_at_10")] == [2, 4]
    written = {each.path for each in client.list_artifacts(parents[0].info.run_id)}
    assert written == {"plots", "report.json", "report.md"}


def test_materialising_again_reuses_the_cell_and_its_run(lab: Path) -> None:
    metadata = _materialize(lab, _asset(f"{NAME}_cells"), partition_key="generative")
    assert metadata["reused"].value is True
    client = connect(lab)
    place = client.get_experiment_by_name(tracked.EXPERIMENTS)
    assert place is not None
    assert len(client.search_runs([place.experiment_id])) == 3


def test_the_chart_shows_every_run_that_has_compute_and_quality(lab: Path) -> None:
    # The cells of this experiment are judged on validation alone, so none stands in the chart.
    assert _materialize(lab, compute_against_quality)["num_runs"].value == 0
    client = connect(lab)
    place = client.get_experiment_by_name(tracked.EXPERIMENTS)
    assert place is not None
    run = client.create_run(place.experiment_id, run_name="a", tags={"gr.dataset": "d", "gr.label": "HSTU"})
    client.log_metric(run.info.run_id, "pflops_days", 2.0)
    client.log_metric(run.info.run_id, "ndcg_at_10", 0.1)
    client.set_terminated(run.info.run_id)
    assert tracked.compute_against_quality(lab) == [
        tracked.Spent(name="HSTU", dataset="d", pflops_days=2.0, measure="NDCG@10", quality=0.1)
    ]
    # A run of the pipeline is shown by its test, never by what chose its epoch; a ranking model by its NE.
    for name, metrics in {
        "untested": {"validation_ndcg_at_10": 0.9},
        "older": {"ndcg_at_10": 0.9},  # as a run was logged before its curve was called validation
        "tested": {"validation_ndcg_at_10": 0.9, "test_ndcg_at_10": 0.2},
        "ranks": {"test_like_ne": 0.5, "test_mean_ne": 0.6},
    }.items():
        run = client.create_run(place.experiment_id, run_name=name, tags={"gr.dataset": "d"})
        for metric, value in ({"pflops_days": 1.0} | metrics).items():
            client.log_metric(run.info.run_id, metric, value)
        client.set_terminated(run.info.run_id)
    assert {(each.name, each.measure, each.quality) for each in tracked.compute_against_quality(lab)} == {
        ("HSTU", "NDCG@10", 0.1),
        ("tested", "NDCG@10", 0.2),
        ("ranks", "NE", 0.6),
    }
    assert _materialize(lab, compute_against_quality)["num_runs"].value == 3


def _asset(name: str) -> dg.AssetsDefinition:
    return next(asset for asset in experiment_assets if asset.key == dg.AssetKey(name))


def _materialize(home: Path, asset: dg.AssetsDefinition, partition_key: str | None = None) -> dict[str, Any]:
    done = dg.materialize(
        [asset], partition_key=partition_key, resources={"lab": Experiments(home=str(home), scale="smoke")}
    )
    assert done.success
    return dict(done.asset_materializations_for_node(asset.key.path[-1])[0].metadata)

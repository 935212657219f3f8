"""Training in several processes through Dagster's pipes."""

import shutil

import dagster as dg
import pytest

from assets.resources import Platform
from assets.training import retrieval_model
from gr_platform import run_log, settings
from gr_platform.models.recipes import tiny
from gr_platform.registry import tracking


@pytest.mark.slow
def test_dagster_trains_in_two_processes_and_hears_of_each_epoch(pipeline_home, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "num_cores", lambda: 2)
    shutil.copytree(pipeline_home / "sequences", tmp_path / "sequences")
    config = {"recipe": "tiny", "num_processes": 2}
    with dg.instance_for_test() as instance:
        done = dg.materialize(
            [retrieval_model],
            instance=instance,
            resources={"platform": Platform(home=str(tmp_path), dataset="simulated")},
            run_config={"ops": {"retrieval_model": {"config": config}}},
            raise_on_error=False,
        )
        logged = [entry.user_message for entry in instance.all_logs(done.run_id)]
    assert done.success, logged
    [made] = done.asset_materializations_for_node("retrieval_model")
    assert made.metadata["reused"].value is False
    assert made.metadata["epochs"].value == tiny("retrieval").training.max_epochs
    assert any("phase=validation epoch=0" in message for message in logged)
    # One id everywhere: in Dagster, in MLflow, and in the log, where the lines of the processes stand too.
    lines = (tmp_path / run_log.FILE).read_text().splitlines()
    trained = [line for line in lines if "phase=validation epoch=0" in line]
    assert trained
    assert all(f"run={done.run_id} " in line for line in trained)
    [run] = tracking.connect(tmp_path).search_runs(
        [tracking.experiment_id(tracking.connect(tmp_path), tmp_path, "simulated")]
    )
    assert run.data.tags["gr.dagster_run"] == done.run_id

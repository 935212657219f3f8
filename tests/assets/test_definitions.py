"""The code location: what it defines, and what importing it must not cost."""

import subprocess
import sys

import dagster as dg
import pytest

from assets.materialization import MAX_PLOT_BYTES, picture, preview_of, table
from gr_platform.definitions import defs
from gr_platform.experiments.catalogue import experiments

DEPENDENCIES = {
    "events": set(),
    "data_card": {"events"},
    "item_vocabulary": {"events"},
    "sequences": {"events", "item_vocabulary"},
    "retrieval_model": {"sequences"},
    "ranking_model": {"sequences"},
    "evaluation": {"sequences", "retrieval_model", "ranking_model"},
    "registration": {"evaluation"},
    "bundle": {"registration", "retrieval_model", "ranking_model"},
    "deployment": {"bundle"},
    "served": {"events", "deployment"},
}
CHECKS = {
    ("events", "schema"),
    ("events", "conservation"),
    ("events", "nulls"),
    ("events", "time_range"),
    ("events", "duplicates"),
    ("events", "quarantine"),
    ("events", "volume"),
    ("events", "new_users"),
    ("events", "new_items"),
    ("events", "action_mix"),
    ("events", "longest_user"),
    ("sequences", "no_leakage"),
    ("retrieval_model", "no_leakage"),
    ("ranking_model", "no_leakage"),
    ("retrieval_model", "finite_weights"),
    ("ranking_model", "finite_weights"),
    ("evaluation", "finite_figures"),
    ("bundle", "parity"),
}


def test_assets_checks_and_jobs_are_these() -> None:
    graph = defs.resolve_asset_graph()
    found = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.get_all_asset_keys()
    }
    cells = {f"{name}_cells": set() for name in experiments()}
    reports = {f"{name}_report": {f"{name}_cells"} for name in experiments()}
    assert found == DEPENDENCIES | cells | reports | {"compute_against_quality": set(reports), "comparison": set()}
    assert {(key.asset_key.to_user_string(), key.name) for key in graph.asset_check_keys} == CHECKS
    assert [job.name for job in defs.resolve_all_job_defs() if not job.name.startswith("__")] == ["full_pipeline"]


def test_the_full_pipeline_runs_no_experiment() -> None:
    chosen = defs.resolve_job_def("full_pipeline").asset_layer.selected_asset_keys
    assert {key.to_user_string() for key in chosen} == set(DEPENDENCIES)


def test_every_cell_of_an_experiment_is_a_partition_of_its_asset() -> None:
    graph = defs.resolve_asset_graph()
    for name, experiment in experiments().items():
        partitions = graph.get(dg.AssetKey(f"{name}_cells")).partitions_def
        assert partitions is not None
        assert list(partitions.get_partition_keys()) == [cell.name for cell in experiment.cells]


def test_loading_the_code_location_imports_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys, gr_platform.definitions; print([m for m in ('torch', 'mlflow', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "[]"


def test_a_plot_too_large_for_the_event_log_is_refused() -> None:
    assert picture(b"png").startswith("![plot](data:image/png;base64,")
    with pytest.raises(RuntimeError, match="at most 50000"):
        picture(b"x" * (MAX_PLOT_BYTES + 1))


def test_tables_survive_bars_and_long_cells() -> None:
    import pyarrow as pa

    text = table(["a"], [["x|y"], ["z" * 100], [0.123456]])
    assert text.splitlines()[2] == "| x\\|y |"
    assert len(text.splitlines()[3]) < 70
    assert text.splitlines()[4] == "| 0.1235 |"
    assert len(preview_of(pa.table({"n": list(range(100))})).splitlines()) == 10

"""The code location: what it defines, and what importing it must not cost."""

import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from assets import automation, cleaning
from assets.materialization import MAX_PLOT_BYTES, picture, preview_of, table
from assets.resources import Platform
from gr_platform import settings, storage
from gr_platform.definitions import defs
from gr_platform.errors import UserError
from gr_platform.experiments.catalogue import experiments
from gr_platform.lifecycle.options import LifecycleOptions, Schedule

# Asset -> its parents, group, pool.
ASSETS = {
    "landed_day": (set(), "data", "landing"),
    "events": ({"landed_day"}, "data", "pipeline"),
    "data_card": ({"events"}, "data", "pipeline"),
    "item_vocabulary": ({"events"}, "data", "pipeline"),
    "sequences": ({"events", "item_vocabulary"}, "data", "pipeline"),
    "retrieval_model": ({"sequences"}, "models", "pipeline"),
    "ranking_model": ({"sequences"}, "models", "pipeline"),
    "evaluation": ({"sequences", "retrieval_model", "ranking_model"}, "models", "pipeline"),
    "registration": ({"evaluation"}, "release", "pipeline"),
    "bundle": ({"registration", "retrieval_model", "ranking_model"}, "release", "pipeline"),
    "judgement": ({"bundle"}, "release", "pipeline"),
    "deployment": ({"bundle", "judgement"}, "release", None),
    "served": ({"events", "deployment"}, "release", "pipeline"),
    "comparison": (set(), "models", "pipeline"),
}
PIPELINE = set(ASSETS) - {"landed_day", "comparison"}
JOBS = {
    "full_pipeline": PIPELINE,
    "retraining": PIPELINE,
    "landing_day": {"landed_day"},
    "deploying": {"deployment"},
}
# Schedule -> job, cron in UTC.
SCHEDULES = {
    "daily_landing": ("landing_day", "30 0 * * *"),
    "daily_retraining": ("retraining", "0 2 * * *"),
    "weekly_retraining": ("retraining", "0 4 * * 0"),
    "weekly_cleaning": ("cleaning", "0 8 * * 0"),
}
# Sensor -> job it asks for (None: it asks for none), seconds between two looks.
SENSORS = {
    "inbox": ("landing_day", 15),
    "champion": ("deploying", 30),
    "drift": ("retraining", 300),
    "shadow": ("deploying", 60),
    "failures": (None, 15),
    "failed_checks": (None, 15),
    "lost_runs": (None, 60),
}
CHECKS = {
    ("landed_day", "arrived"),
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
    ("events", "item_drift"),
    ("events", "action_drift"),
    ("events", "item_share"),
    ("sequences", "no_leakage"),
    ("retrieval_model", "no_leakage"),
    ("ranking_model", "no_leakage"),
    ("retrieval_model", "finite_weights"),
    ("ranking_model", "finite_weights"),
    ("evaluation", "finite_figures"),
    ("bundle", "parity"),
    ("judgement", "gates"),
    ("deployment", "model_age"),
    ("served", "score_drift"),
    ("served", "online_offline"),
}


def test_assets_checks_and_jobs_are_these() -> None:
    graph = defs.resolve_asset_graph()
    found = {}
    for key in graph.get_all_asset_keys():
        node, definition = graph.get(key), defs.get_assets_def(key)
        parents = {parent.to_user_string() for parent in node.parent_keys}
        found[key.to_user_string()] = (parents, node.group_name, definition.op.pool)
    cells = {f"{name}_cells": (set(), "experiments", None) for name in experiments()}
    reports = {f"{name}_report": ({f"{name}_cells"}, "experiments", None) for name in experiments()}
    assert found == ASSETS | cells | reports | {"compute_against_quality": (set(reports), "experiments", None)}
    assert {(key.asset_key.to_user_string(), key.name) for key in graph.asset_check_keys} == CHECKS
    jobs = {job.name: job for job in defs.resolve_all_job_defs() if not job.name.startswith("__")}
    assert [node.name for node in jobs.pop("cleaning").nodes] == ["delete_old"]
    chosen = {name: job.asset_layer.selected_asset_keys for name, job in jobs.items()}
    assert {name: {key.to_user_string() for key in keys} for name, keys in chosen.items()} == JOBS


def test_schedules_and_sensors_are_these_and_run() -> None:
    chosen = LifecycleOptions()
    defaults = [*automation.schedules(chosen), *cleaning.schedules(chosen)]
    assert {each.name: (each.job_name, each.cron_schedule) for each in defaults} == SCHEDULES
    assert {each.execution_timezone for each in defaults} == {"UTC"}
    assert {each.default_status for each in defaults} == {dg.DefaultScheduleStatus.RUNNING}
    loaded = {each.name: each for each in defs.sensors or ()}
    found = {
        name: (each.job_name if each.has_jobs or each.targets else None, each.minimum_interval_seconds)
        for name, each in loaded.items()
    }
    assert found == SENSORS
    assert {each.default_status for each in loaded.values()} == {dg.DefaultSensorStatus.RUNNING}


def test_an_empty_cron_line_is_no_schedule_and_one_that_is_none_is_named() -> None:
    weekly = automation.schedules(LifecycleOptions(schedule=Schedule(daily="", ingest="")))
    assert [each.name for each in weekly] == ["weekly_retraining"]
    assert cleaning.schedules(LifecycleOptions(schedule=Schedule(cleaning=""))) == []
    with pytest.raises(UserError, match=r"lifecycle.toml: schedule.daily is '61 2 \* \* \*', which is no moment"):
        automation.schedules(LifecycleOptions(schedule=Schedule(daily="61 2 * * *")))


def test_cleaning_deletes_what_nobody_names_and_tells_of_it(pipeline_home: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(pipeline_home, tmp_path / "home", symlinks=True))
    (home / "lifecycle.toml").write_text("[retention]\nkeep_days = 0\n")
    runs = home / "runs" / "simulated"
    stray = storage.ensure(runs, "retrieval_model", {"stray": True}, lambda folder: {}).folder
    resources = {"platform": Platform(home=str(home), dataset="simulated")}
    assert cleaning.cleaning.execute_in_process(resources=resources).success
    assert not stray.exists()
    for kind in ("retrieval", "ranking"):
        assert storage.current(runs, f"{kind}_model").is_dir()
        assert storage.current(home / "bundles" / "simulated", kind).is_dir()


@pytest.mark.parametrize("job", ["retraining", "deploying", "full_pipeline", "landing_day"])
def test_the_default_config_of_each_job_is_one_that_it_takes(job: str) -> None:
    definition = defs.resolve_job_def(job)
    assert dg.validate_run_config(definition, definition.run_config or {})


def test_the_instance_lets_one_run_of_a_pool_work_at_a_time_and_retries_only_killed_ones(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_bytes((settings.PROJECT_ROOT / "dagster_home" / "dagster.yaml").read_bytes())
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        concurrency = instance.get_concurrency_config()
        assert concurrency.pool_config.default_pool_limit == 1
        assert str(concurrency.pool_config.pool_granularity) == "PoolGranularity.RUN"
        assert instance.run_retries_enabled
        assert instance.run_retries_max_retries == 0
        assert not instance.run_retries_retry_on_asset_or_op_failure
        assert instance.run_monitoring_enabled


def test_every_cell_of_an_experiment_is_a_partition_of_its_asset() -> None:
    graph = defs.resolve_asset_graph()
    for name, experiment in experiments().items():
        partitions = graph.get(dg.AssetKey(f"{name}_cells")).partitions_def
        assert partitions is not None
        assert list(partitions.get_partition_keys()) == [cell.name for cell in experiment.cells]


def test_loading_the_code_location_imports_no_heavy_library() -> None:
    code = (
        "import sys, gr_platform.definitions\n"
        "print([m for m in ('torch', 'mlflow', 'matplotlib', 'duckdb', 'polars', 'pandas') if m in sys.modules])"
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

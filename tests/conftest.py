"""Fixtures that several packages share."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gr_platform import settings

# Read when a function of Triton's is decorated, those of its own library too, so before any test module imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Tests have state folders of their own, and must not write into the databases of whoever runs them.
for _name in (settings.MLFLOW_DB, settings.DAGSTER_DB):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session")
def load_script():
    """Return load(path under the project's root) -> the script as a module: it belongs to no package."""

    def load(path: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(Path(path).stem, settings.PROJECT_ROOT / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def random_bundle():
    """Return a function that writes an untrained bundle: (folder, kind, *, num_items, item_ids, ...) -> folder."""

    from gr_platform.models.recipes import tiny
    from serving.bench import models

    def write(folder, kind, *, num_items=200, seed=0, config=None, scale=5.0, **rest):
        # As large as trained weights, so that every term shows in the scores.
        shape = config or tiny(kind).model
        models.write_bundle(folder, shape, num_items=num_items, seed=seed, gain=scale, **({"name": "random"} | rest))
        return folder

    return write


@pytest.fixture(scope="session")
def pipeline_home(tmp_path_factory):
    """A state folder in which the whole Dagster job ran once on a small simulated log: read it, do not change it."""
    from gr_platform.commands import demo, pipeline
    from gr_platform.events.landing import import_file

    home = tmp_path_factory.mktemp("pipeline")
    dagster_home = home / "dagster_home"
    dagster_home.mkdir()
    (dagster_home / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    import_file(demo.simulated(home, 20_000), home=home, dataset="simulated")
    with pytest.MonkeyPatch.context() as patch:
        # One thread: two that wait for each other stand still when other programs use the cores.
        patch.setenv("GR_THREADS", "1")
        patch.setenv("GR_DEVICE", "cpu")
        pipeline.materialize(home, dagster_home, recipe="tiny")
    return home


@pytest.fixture(scope="session")
def replayed(tmp_path_factory):
    """Two days of `gr replay`, the second one poisoned: its folder with the report, the platform of its own in `home`.

    Read it, do not change it. There the champions are of version 2, version 1 served before, 3 was refused.
    """
    from gr_platform.replay import replay as replaying
    from gr_platform.replay.stream import StreamOptions

    folder = tmp_path_factory.mktemp("replayed") / "replay"
    days, stages = [], []
    options = replaying.ReplayOptions(
        stream=StreamOptions(days=2, num_events=30_000, faults={2: "poisoned"}), rate=4.0, command="gr replay --days 2"
    )
    listener = replaying.Listener(day=days.append, stage=stages.append, said=stages.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GR_THREADS", "1")
        patch.setenv("GR_DEVICE", "cpu")
        replaying.replay(folder, options, listener)
    assert [day and day.number for day in days] == [None, 1, 2]
    return folder

"""Fixtures that several packages share."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gr_platform import settings

# Read when a function of Triton's is decorated, those of its own library too, so before any test module imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


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
    from safetensors.torch import save_file

    from gr_platform import storage
    from gr_platform.bundle import export
    from gr_platform.events.declaration import Declaration
    from gr_platform.models.build import build_model
    from gr_platform.models.recipes import tiny
    from gr_platform.sequences.vocabulary import NUM_OOV

    def write(folder, kind, *, num_items=200, item_ids=None, seed=0, metrics=None, config=None, scale=5.0, **declared):
        folder.mkdir(parents=True, exist_ok=True)
        declaration = Declaration(
            **{
                "name": "random",
                "actions": ("view", "like", "purchase"),
                "tasks": {"like": ("like",), "purchase": ("purchase",)},
                "positives": ("view", "like", "purchase"),
                "item_id_type": "int64" if item_ids is None else "string",
                **declared,
            }
        )
        ids = pa.array(np.arange(num_items) + 1000 if item_ids is None else item_ids)
        counts = pa.array(np.ones(num_items, np.int64))
        columns = {"item_id": ids, "count": counts, "first_ts": counts, "last_ts": counts}
        source = folder.parent / f".{folder.name}-source"
        source.mkdir(exist_ok=True)
        pq.write_table(
            pa.table(columns | {"active": pa.array(np.ones(num_items, bool))}), source / "vocabulary.parquet"
        )
        torch.manual_seed(seed)
        num_rows = 1 + NUM_OOV + num_items
        model = build_model(config or tiny(kind).model, num_rows=num_rows, num_actions=3, tasks=list(declaration.tasks))
        with torch.no_grad():
            # As large as trained weights, so that every term shows in the scores.
            for parameter in model.parameters():
                parameter.mul_(scale)
        save_file(model.state_dict(), source / "model.safetensors")
        facts = export.write_bundle(
            folder,
            model=model,
            weights=source / "model.safetensors",
            vocabulary=source / "vocabulary.parquet",
            num_rows=num_rows,
            declaration=declaration.to_json(),
            recipe="tiny",
            metrics=metrics or {},
        )
        storage.write_manifest(folder, kind=kind, spec={"seed": seed}, facts=facts)
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

"""Trained models that are none: files of the right names, for tests of what registers, copies or moves them."""

import json
from pathlib import Path

from gr_platform import storage
from gr_platform.models.recipes import tiny
from gr_platform.registry import tracking, versions

DS = "shop"


def put_model(home: Path, name: str, kind: str = "retrieval") -> Path:
    """Put a finished run with its sequences in place, as training leaves them, and return its folder."""

    def build(folder: Path) -> dict[str, int]:
        (folder / "model.safetensors").write_bytes(b"")
        (folder / "recipe.json").write_text(json.dumps(tiny(kind).to_json()))
        (folder / "curves.json").write_text(json.dumps([{"epoch": 1, "loss": 3.0}]))
        return {}

    data = home / "sequences" / DS
    made = storage.ensure(data, "vocabulary", {}, lambda f: {"n": (f / "vocabulary.parquet").write_bytes(b"")})
    spec = {"vocabulary_folder": made.folder.name, "declaration": {"item_id_type": "int64"}}
    storage.point(data, "sequences", storage.ensure(data, "sequences", spec, lambda folder: {}).folder)
    run = storage.ensure(home / "runs" / DS, f"{kind}_model", {"name": name, "sequences": "s"}, build).folder
    storage.point(home / "runs" / DS, f"{kind}_model", run)
    return run


def register(home: Path, name: str) -> versions.Version:
    """Return the registered version of a model that is put in place under a name."""
    return versions.register(home, DS, tracking.log_run(home, DS, put_model(home, name)))

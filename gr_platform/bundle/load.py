"""A bundle on disk as a value: what the model server loads, with no Polars, DuckDB, Dagster or MLflow, and torch only
where it computes.

Invariant: loading verifies the digest of every file; nothing is unpickled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from gr_platform import storage
from gr_platform.bundle.compute import CacheType, Compute, ComputePath
from gr_platform.bundle.onnx_compute import OnnxCompute
from gr_platform.errors import UserError
from gr_platform.events.declaration import Declaration
from gr_platform.models.config import ModelConfig
from gr_platform.sequences.vocabulary import Vocabulary

# Raised when the same model would be exported as other files.
EXPORT_VERSION = 3
# What decides a score beside these files' content: facts of the manifest.
CONSTANTS = ("config", "actions", "tasks", "time_thresholds_ms", "attention_divisor")
_SCORING_FILES = ("model.safetensors", "vocabulary.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A verified model: constants, vocabulary, and the graphs on demand.

    `digest` covers everything that changes a score (weights, constants, vocabulary, actions, tasks): the cache's seed.
    `item_vectors`: normalised, float32 [num_rows, d], row = vocabulary index; no rows in a ranking bundle.
    """

    folder: Path
    digest: str
    config: ModelConfig
    declaration: Declaration
    tasks: tuple[str, ...]
    vocabulary: Vocabulary
    metrics: dict[str, Any]
    recipe: str
    item_vectors: np.ndarray

    @property
    def kind(self) -> str:
        """`retrieval` or `ranking`."""
        return self.config.kind

    @property
    def num_tasks(self) -> int:
        """Number of ranking heads; 0 for retrieval."""
        return len(self.tasks) if self.kind == "ranking" else 0

    def compute(
        self,
        num_pages: int,
        *,
        path: ComputePath = "auto",
        num_threads: int = 1,
        cache_dtype: CacheType = "fp32",
    ) -> Compute:
        """Return the loaded model with room for `num_pages` pages of K/V.

        path: "torch" (the kernels, several users a step), "onnx" (the graphs in ONNX Runtime, with no torch in the
        process), or "auto": both, each for what it does faster. cache_dtype: what K/V are
        kept in and products made in. Raises UserError for a short one without a GPU.
        """
        if path == "onnx" and cache_dtype != "fp32":
            raise UserError(f"cache_dtype is {cache_dtype}, the graphs keep fp32; set compute to auto or torch")
        if path == "onnx":
            return OnnxCompute(self.folder, self.config, self.num_tasks, num_pages, num_threads=num_threads)
        from gr_platform.bundle.fastest import fastest_compute
        from gr_platform.bundle.torch_model import torch_compute

        make = fastest_compute if path == "auto" else torch_compute
        return make(self, num_pages, num_threads=num_threads, cache_dtype=cache_dtype)


def model_digest(facts: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """Return the digest over everything that changes a score: constants among the facts, sha256 of the files."""
    constants = {name: facts[name] for name in CONSTANTS}
    return storage.digest_of({"constants": constants, "files": {name: files[name] for name in _SCORING_FILES}})


def load(folder: Path) -> Bundle:
    """Return the bundle in `folder` after checking every file's digest and the model's own.

    Raises UserError if it is no bundle, of another schema, or damaged.
    """
    manifest = storage.read_manifest(folder, verify=True)
    if manifest.kind not in ("retrieval", "ranking"):
        raise UserError(f"{folder.name} is a {manifest.kind}, not a model bundle")
    try:
        if manifest.facts["model_digest"] != model_digest(manifest.facts, manifest.files):
            raise UserError(f"the manifest of bundle {folder.name} was changed after its export; run gr materialize")
        if manifest.facts["export_version"] != EXPORT_VERSION:
            raise UserError(f"bundle {folder.name} was exported by another release; run gr materialize")
        return _read(folder, manifest.kind, manifest.facts)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the manifest of bundle {folder.name} does not hold what this release needs ({error}); delete the folder "
            "and run gr materialize"
        ) from None


def _read(folder: Path, kind: str, facts: Mapping[str, Any]) -> Bundle:
    vectors = np.zeros((0, facts["config"]["embedding_dim"]), np.float32)
    if kind == "retrieval":
        vectors = load_file(folder / "item_vectors.safetensors")["item_vectors"]
    return Bundle(
        folder=folder,
        digest=facts["model_digest"],
        config=ModelConfig(**facts["config"]),
        declaration=Declaration.from_json(facts["declaration"]),
        tasks=tuple(facts["tasks"]),
        vocabulary=Vocabulary.load(folder / "vocabulary.parquet"),
        metrics=facts["metrics"],
        recipe=facts["recipe"],
        item_vectors=vectors,
    )

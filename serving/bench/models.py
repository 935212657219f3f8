"""Pairs of bundles with random weights: what a benchmark serves, for its cost is that of a trained pair.

Invariant: a folder depends on its arguments alone, and two seeds of one shape are two models of one data set, so that
one can be swapped for the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from gr_platform import storage
from gr_platform.bundle import export
from gr_platform.events.declaration import Declaration
from gr_platform.models.build import build_model
from gr_platform.models.config import ModelConfig
from gr_platform.sequences.vocabulary import NUM_OOV

FIRST_ID = 1000
ACTIONS = ("view", "like", "purchase")
# Large enough that every term shows in the scores, small enough that no probability is 0 or 1.
_GAIN = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Folders of a retrieval and a ranking bundle of one data set."""

    retrieval: Path
    ranking: Path


def speed_table(max_events: int) -> ModelConfig:
    """Return the model of the speed table: d 256, 4 layers, 4 heads of 64/64; `kind` is the ranking one's."""
    return ModelConfig(
        kind="ranking", embedding_dim=256, num_layers=4, num_heads=4, qk_dim=64, v_dim=64, max_events=max_events
    )


def write_pair(parent: Path, config: ModelConfig, *, num_items: int, seed: int) -> Pair:
    """Return a pair of bundles under `parent`, both of `config`'s shape; items have the ids FIRST_ID and on."""
    pair = Pair(retrieval=parent / f"retrieval-{seed}", ranking=parent / f"ranking-{seed}")
    write_bundle(pair.retrieval, replace(config, kind="retrieval"), num_items=num_items, seed=seed)
    write_bundle(pair.ranking, replace(config, kind="ranking"), num_items=num_items, seed=seed)
    return pair


def write_bundle(
    folder: Path,
    config: ModelConfig,
    *,
    num_items: int,
    seed: int,
    gain: float = _GAIN,
    item_ids: Sequence[str] | None = None,
    metrics: dict[str, Any] | None = None,
    **declared: Any,
) -> None:
    """Write a bundle of `config`'s shape with weights drawn from `seed` and made `gain` times as large.

    item_ids: text ids in place of numbers from FIRST_ID; declared: fields of the Declaration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = folder.with_name(f".{folder.name}-source")
    source.mkdir(exist_ok=True)
    fields = {"name": "benchmark", "actions": ACTIONS, "tasks": {name: (name,) for name in ACTIONS[1:]}}
    id_type = "int64" if item_ids is None else "string"
    declaration = Declaration(**{**fields, "positives": ACTIONS, "item_id_type": id_type, **declared})
    _write_vocabulary(source / "vocabulary.parquet", item_ids or FIRST_ID + np.arange(num_items))
    torch.manual_seed(seed)
    num_rows = 1 + NUM_OOV + num_items
    model = build_model(config, num_rows=num_rows, num_actions=len(ACTIONS), tasks=list(declaration.tasks))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain)
    save_file(model.state_dict(), source / "model.safetensors")
    facts = export.write_bundle(
        folder,
        model=model,
        weights=source / "model.safetensors",
        vocabulary=source / "vocabulary.parquet",
        num_rows=num_rows,
        declaration=declaration.to_json(),
        recipe="benchmark",
        metrics=metrics or {},
    )
    storage.write_manifest(folder, kind=config.kind, spec={"seed": seed}, facts=facts)


def _write_vocabulary(path: Path, item_ids: Sequence[str] | np.ndarray) -> None:
    ones = pa.array(np.ones(len(item_ids), np.int64))
    columns = {
        "item_id": pa.array(item_ids),
        "count": ones,
        "first_ts": ones,
        "last_ts": ones,
        "active": pa.array(np.ones(len(item_ids), bool)),
    }
    pq.write_table(pa.table(columns), path)

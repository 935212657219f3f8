"""Two runs beside each other, user by user.

Invariant: both were judged on the same users and targets, or nothing is said.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.evaluation.evaluate import evaluate_run
from gr_platform.evaluation.significance import compare_tables
from gr_platform.registry.names import run_folder


def compare_runs(home: Path, ds: str, a: str, b: str) -> dict[str, Any]:
    """Return the paired comparison of two runs of a data set, each evaluated first unless it was.

    a, b: what `registry.names.run_folder` takes. Returns `kind`, `a` and `b` (folder names), `recipe_a`, `recipe_b`
    (name and seed), `facts_a`, `facts_b` (of `evaluate_run`), `num_targets` and `differences`, each the fields of a
    `significance.Difference`; retrieval at the served chunk.
    Raises UserError for an unknown run, one run named twice, runs of different kinds, or of other users or targets.
    """
    folders = [run_folder(home, ds, run) for run in (a, b)]
    manifests = [storage.read_manifest(folder) for folder in folders]
    kinds = [manifest.kind.removesuffix("_model") for manifest in manifests]
    if kinds[0] != kinds[1]:
        raise UserError(f"{a} is a {kinds[0]} model and {b} a {kinds[1]} model; compare two of one kind")
    if folders[0] == folders[1]:
        raise UserError(f"{a} and {b} are one run, {folders[0].name}; name two to compare")
    evaluations = [evaluate_run(home, ds, folder) for folder in folders]
    tables = [pq.read_table(evaluation.folder / f"{kinds[0]}.parquet") for evaluation in evaluations]
    named = [f"{manifest.spec['recipe']['name']}, seed {_seed(manifest)}" for manifest in manifests]
    return {
        "kind": kinds[0],
        "a": folders[0].name,
        "b": folders[1].name,
        "recipe_a": named[0],
        "recipe_b": named[1],
        "facts_a": evaluations[0].manifest.facts,
        "facts_b": evaluations[1].manifest.facts,
        "num_targets": len(tables[0]),
        "differences": [asdict(difference) for difference in compare_tables(*tables)],
    }


def _seed(manifest: storage.Manifest) -> int:
    return int(manifest.spec["recipe"]["training"]["seed"])

"""One harness for every benchmark: named rows with a target, printed as a table and written as JSON.

Invariant: a row says what it was measured against in the same run; machine, commit and date travel with the file.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from gr_platform import provenance, settings, storage

# name -> (module with run(num_threads) -> rows, one sentence)
BENCHES = {
    "attention": ("kernels.hstu_attention.bench", "HSTU attention against padded eager and a loop over users (1 min)"),
    "serving": ("serving.bench", "model server: time to ready, cold and cached requests, gRPC overhead (1 min)"),
}
Row = dict[str, Any]


def run(name: str) -> list[Row]:
    """Return the rows of a benchmark with `ok` filled in: whether the value reaches its target (None without one)."""
    module = import_module(BENCHES[name][0])
    bench: Callable[[int], list[Row]] = module.run
    return [row | {"ok": reaches_target(row)} for row in bench(settings.num_threads())]


def reaches_target(row: Row) -> bool | None:
    """Return whether a row reaches its target; `"at_most": True` in a row turns the comparison round."""
    if row["target"] is None:
        return None
    return row["value"] <= row["target"] if row.get("at_most") else row["value"] >= row["target"]


def write(rows: list[Row], path: Path) -> None:
    """Write rows with machine, commit and date as one JSON list."""
    stamp = {
        "machine": provenance.machine(),
        "commit": provenance.git_commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    storage.write_text(path, json.dumps([row | stamp for row in rows], indent=1, allow_nan=False) + "\n")

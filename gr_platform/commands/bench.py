"""One harness for every benchmark: named rows with a target, printed as a table and written as JSON.

Invariant: a row says what it was measured against in the same run; machine, commit and date travel with the file.
"""

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from gr_platform import provenance, settings, storage
from gr_platform.errors import UserError

# name -> (module:function(num_threads) -> rows, one sentence)
BENCHES = {
    "attention": ("kernels.bench:attention", "attention and sampled softmax against what they replace (2 min)"),
    "kernels": ("kernels.bench:kernels", "predicted time of every kernel on GPUs; --aot: compiled for them instead"),
    "train": ("gr_platform.training.bench_train:run", "ML-1M training: steps here and elsewhere, memory (5 min)"),
    "encoders": ("gr_platform.training.bench_encoders:run", "HSTU against Transformer++ by length (4 min)"),
    "memory": ("kernels.bench:memory", "what a layer keeps for its backward, against a Transformer layer"),
    "ingest": ("gr_platform.events.bench:run", "a log to sequences, stage by stage, against a bare sort (1 min)"),
    "reader": ("gr_platform.sequences.bench:run", "training batches a second from warm files (1 min)"),
    "serving": ("serving.bench:run", "model server: the engine, gRPC, latency against load, swaps (8 min)"),
    "lifecycle": ("gr_platform.replay.bench:run", "a replay of 7 days, promotion, rollback, code and lineage (10 min)"),
}
AOT_PROCESSES = 2
MIN_EVENTS = 20_000
Row = dict[str, Any]


def run(name: str, *, aot: bool = False, num_events: int | None = None) -> list[Row]:
    """Return the rows of a benchmark, or of all, with `ok` filled in: whether the value reaches its target.

    aot: of "kernels", what each kernel takes when compiled for each GPU. num_events: size of the log of "ingest".
    Raises UserError for another name.
    """
    if name != "all" and name not in BENCHES:
        raise UserError(f"there is no benchmark {name!r}; choose all, {', '.join(BENCHES)}")
    if aot and name != "kernels":
        raise UserError(f"--aot compiles kernels, it got benchmark {name!r}; run: gr bench kernels --aot")
    if num_events is not None and (name != "ingest" or num_events < MIN_EVENTS):
        raise UserError(f"--events is the size of a log for the benchmark ingest, at least {MIN_EVENTS:,}")
    if aot:
        rows = compiled_kernels()
    elif num_events is not None:
        rows = import_module("gr_platform.events.bench").run(settings.num_threads(), num_events)
    else:
        names = BENCHES if name == "all" else (name,)
        rows = [row for each in names for row in runner(each)(settings.num_threads())]
    return [row | {"ok": reaches_target(row)} for row in rows]


def runner(name: str) -> Callable[[int], list[Row]]:
    """Return the function(num_threads) behind a benchmark."""
    module, function = BENCHES[name][0].split(":")
    found: Callable[[int], list[Row]] = getattr(import_module(module), function)
    return found


def compiled_kernels() -> list[Row]:
    """Return one row a kernel, specialisation and GPU: spilled bytes, registers, shared memory, occupancy."""
    from tqdm import tqdm

    from kernels import aot

    with tqdm(desc="compiling", unit="kernel", disable=not sys.stderr.isatty(), leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            return aot.table(num_processes=AOT_PROCESSES, on_progress=show)
        except ModuleNotFoundError as error:
            raise UserError(f"kernels cannot be compiled without {error.name}; install it with: make setup") from error


def worst(rows: list[Row]) -> list[Row]:
    """Return, of compiled kernels, the one that spills most of each op, GPU and bound: what a terminal can show."""
    groups: dict[tuple[str, str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["arch"], row["target"] is None), []).append(row)
    most = [(max(group, key=lambda row: row["value"]), len(group)) for group in groups.values()]
    return [row | {"name": f"most of {count}: {row['name']}"} for row, count in most]


def reaches_target(row: Row) -> bool | None:
    """Return whether a row reaches its target; `"at_most": True` in a row turns the comparison round.

    A row without a value says itself: False where the target was missed, None where nothing was measured.
    """
    if row["target"] is None or row["value"] is None:
        return row.get("ok")
    return row["value"] <= row["target"] if row.get("at_most") else row["value"] >= row["target"]


def write(rows: list[Row], path: Path) -> None:
    """Write rows with machine, commit and date as one JSON list."""
    stamp = {
        "machine": provenance.machine(),
        "commit": provenance.git_commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    storage.write_text(path, json.dumps([row | stamp for row in rows], indent=1, allow_nan=False) + "\n")

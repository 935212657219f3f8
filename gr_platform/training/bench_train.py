"""`gr bench train`: what training costs here, against the same step elsewhere, and how long quality took.

Invariant: steps and memory are measured now, on one thread; the time to a quality is that of recorded experiments
(docs/results), and without such a record its row has no value. Nothing is extrapolated.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gr_platform import settings
from gr_platform.provenance import on_gpu
from gr_platform.training.bench_memory import peak_rss_gb
from gr_platform.training.bench_peers import rectools_ms
from gr_platform.training.bench_step import (
    PLAIN_REPEATS,
    REPEATS,
    SHAPES,
    WARM_UP,
    PlainRetrieval,
    Row,
    new_step,
    row,
    rows,
)
from gr_platform.training.memory import keep_freed_memory

NUM_THREADS = 1
# Seconds a step, measured beforehand on a machine of this kind: the better end of what was seen.
AUTHORS_S, RECTOOLS_S = 4.4, {"HSTU": 3.3, "HSTU-large": 8.2}
AUTHORS_ROW = "ML-1M step, HSTU, batch 128, 1 thread: authors' research code 4.4 s / ours"
RECTOOLS_ROWS = {
    "HSTU": "the same: RecTools in the same run or its recorded 3.3 s / ours",
    "HSTU-large": "ML-1M step, HSTU-large, 1 thread: RecTools 8.2 s / ours",
}
RSS_ROW = "peak RSS of training, GB"
RESULTS = settings.PROJECT_ROOT / "docs" / "results" / "ml_1m.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """A row of the time that recorded runs of `label` took, if their mean over seeds reaches the figures."""

    name: str
    label: str
    figures: Mapping[str, float]
    unit: str
    unit_s: float
    at_most: float


# A figure is reached within one standard error.
STANDARD_ERROR = 0.006
QUALITIES = (
    Quality(
        name="minutes to the 2-layer figure above, 2 threads",
        label="HSTU",
        figures={"hr_at_10": 0.3226, "ndcg_at_10": 0.1880},
        unit="min",
        unit_s=60,
        at_most=75,
    ),
    Quality(
        name="hours to the large figure, 2 threads",
        label="HSTU-large",
        figures={"hr_at_10": 0.3642, "ndcg_at_10": 0.2164},
        unit="h",
        unit_s=3600,
        at_most=3.5,
    ),
)


def run(_: int) -> list[Row]:
    """Return rows {name, value, unit, against, target}: those with a target first, then what stands behind them.

    RecTools is timed where `GR_PEERS` names an environment that has it; else its recorded figure stands for it.
    Raises UserError if that folder is none, RuntimeError if the library fails in it.
    """
    torch.set_num_threads(NUM_THREADS)
    keep_freed_memory()
    found = [measured for name in SHAPES for measured in _steps(name)]
    found += quality_rows(RESULTS)
    found.append(row(RSS_ROW, peak_rss_gb(), "GB", "HSTU-large, an epoch", 3.0) | {"at_most": True})
    return sorted(found, key=lambda each: each["target"] is None)


def _steps(name: str) -> Iterator[Row]:
    """Yield the rows of one shape's step."""
    config = SHAPES[name]
    step = new_step(config)
    ours = step.milliseconds(WARM_UP, REPEATS)
    plain_ms = new_step(config, PlainRetrieval).milliseconds(WARM_UP, PLAIN_REPEATS)[""]
    if name == "HSTU":
        yield row(AUTHORS_ROW, 1e3 * AUTHORS_S / ours[""], "x", "recorded", 5.0)
    rectools = rectools_ms(config, NUM_THREADS, keep_memory=False)
    peer_ms, against = (1e3 * RECTOOLS_S[name], "recorded") if rectools is None else (rectools, "same run")
    yield row(RECTOOLS_ROWS[name], peer_ms / ours[""], "x", against, 4.0)
    kept = rectools_ms(config, NUM_THREADS, keep_memory=True)
    sides = {"plain PyTorch": plain_ms, "RecTools": rectools, "RecTools with freed memory kept": kept}
    for side, ms in sides.items():
        if ms is not None:
            yield row(f"{name} step: {side} / ours", ms / ours[""], "x", "same run")
            yield row(f"{name} step, {side}", ms, "ms")
    yield from rows(name, step, ours)


def quality_rows(results: Path) -> list[Row]:
    """Return the rows of QUALITIES of a recorded ML-1M experiment, by what CPUs did; without it no value."""
    recorded = json.loads(results.read_text(encoding="utf-8"))["rows"] if results.is_file() else []
    here = [each for each in recorded if not on_gpu(each["machine"])]
    return [_quality(wanted, [each for each in here if each["label"] == wanted.label]) for wanted in QUALITIES]


def _quality(wanted: Quality, runs: Sequence[Mapping[str, Any]]) -> Row:
    figures = [each["figures"] for each in runs]
    told = row(wanted.name, None, wanted.unit, "not measured here", wanted.at_most) | {"at_most": True}
    if not runs:
        return told
    means = {name: statistics.mean(float(each[name]) for each in figures) for name in wanted.figures}
    of = f"{len(runs)} recorded runs: " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
    if any(means[name] < figure - STANDARD_ERROR for name, figure in wanted.figures.items()):
        return told | {"against": f"not reached by {of}", "ok": False}
    return told | {"value": statistics.mean(map(_seconds, runs)) / wanted.unit_s, "against": of}


def _seconds(run: Mapping[str, Any]) -> float:
    """Return what a run took: all of it, or its training passes where it was resumed and `seconds` is its last part."""
    return max(float(run["seconds"]), float(run["figures"]["train_seconds"]))

"""The server project's own load tool, perf_analyzer, on the same visits at the same rate as our generator.

Invariant: the tool is none of our dependencies: without GR_PERF_ANALYZER a row without a value says so.
"""

import csv
import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from gr_platform import settings
from gr_platform.errors import UserError
from serving.bench.generator import Phase, probe
from serving.bench.load import SHARES, latencies, percentile
from serving.bench.stage import Load, Stage
from serving.bench.traffic import Population, Visit
from serving.installation import find_installation

NUM_VISITS = 64
PERCENTILES = (50, 95, 99)
_LIBRARIES = {"libb64.so.0d": "libb64-*", "libcudart.so.12": "libcudart-*"}
Row = dict[str, Any]


def rows(stage: Stage, saturation: float, *, seconds: float = 10.0) -> list[Row]:
    """Return latencies of gr_ranker by perf_analyzer and by our generator at 30 % of `saturation` (requests a second).

    Without perf_analyzer, or where it fails: one row without a value, and the reason.
    """
    binary = settings.perf_analyzer()
    if binary is None:
        return [_row("perf_analyzer", None, "", "not run: GR_PERF_ANALYZER is not set, see docs/benchmarks")]
    rate = round(SHARES[1] * saturation, 1)
    visits = _visits(stage)
    try:
        theirs = _perf_analyzer(stage, binary, visits, rate, round(rate * seconds))
    except (UserError, OSError, subprocess.SubprocessError) as error:
        # The other rows took minutes.
        return [_row("perf_analyzer", None, "", f"not run: {error}")]
    ours = _generator(stage, visits, rate, seconds)
    against = f"same {NUM_VISITS} visits, poisson"
    return [
        _row(f"gr_ranker at {rate:g}/s, {who}: latency, p{percent}", value, "ms", against)
        for who, found in (("perf_analyzer", theirs), ("our generator", ours))
        for percent, value in zip(PERCENTILES, found, strict=True)
    ]


def input_data(visits: list[Visit]) -> dict[str, Any]:
    """Return visits as the JSON that perf_analyzer reads with --input-data; the shapes differ from step to step."""

    def tensors(visit: Visit) -> dict[str, Any]:
        history = visit.history
        arrays = {
            "HISTORY_ITEMS": history.items.tolist(),
            "HISTORY_ACTIONS": history.actions.tolist(),
            "HISTORY_TIMES": history.times.tolist(),
            "HISTORY_OFFSET": [history.offset],
            "CANDIDATES": visit.candidates.tolist(),
            "REQUEST_TIME": [visit.request_time],
        }
        return {name: {"content": values, "shape": [len(values)]} for name, values in arrays.items()}

    return {"data": [tensors(visit) for visit in visits]}


def report(text: str) -> list[float]:
    """Return the PERCENTILES in ms out of perf_analyzer's CSV report. Raises UserError if it has none."""
    lines = list(csv.DictReader(io.StringIO(text)))
    try:
        return [float(lines[0][f"p{percent} latency"]) / 1e3 for percent in PERCENTILES]
    except (IndexError, KeyError, ValueError):
        raise UserError("the report of perf_analyzer has no latencies; is it release 2.50 of tritonclient?") from None


def _visits(stage: Stage) -> list[Visit]:
    population = Population(stage.traffic)
    found: list[Visit] = []
    while len(found) < NUM_VISITS:
        visit = population.visit()
        if visit.kind == "score":
            found.append(visit)
    return found


def _perf_analyzer(stage: Stage, binary: Path, visits: list[Visit], rate: float, count: int) -> list[float]:
    data, csv_file = stage.home / "visits.json", stage.home / "perf_analyzer.csv"
    data.write_text(json.dumps(input_data(visits)), encoding="utf-8")
    command = [
        str(binary), "-m", "gr_ranker", "-i", "grpc", "-u", stage.handle.grpc_address, "--input-data", str(data),
        "--request-rate-range", str(rate), "--request-distribution", "poisson", "--async", "-f", str(csv_file),
    ]  # fmt: skip
    environment = os.environ | {"LD_LIBRARY_PATH": str(_libraries(stage.home / "perf_analyzer_libraries"))}
    # The first run sends every visit once, so that the second one finds the histories in the cache, as ours does.
    for number in (len(visits), count):
        done = subprocess.run(
            [*command, "--request-count", str(number)], env=environment, capture_output=True, text=True, timeout=300
        )
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise UserError(
                f"perf_analyzer ended with status {done.returncode}: {lines[-1] if lines else 'no message'}"
            )
    return report(csv_file.read_text(encoding="utf-8"))


def _libraries(folder: Path) -> Path:
    """Return a folder with the two libraries that the tool needs and the tritonserver wheel carries."""
    carried = find_installation(settings.serving_python()).tree.parent.parent / "nvidia_pytriton.libs"
    folder.mkdir(exist_ok=True)
    for name, pattern in _LIBRARIES.items():
        if not (found := sorted(carried.glob(pattern))):
            raise UserError(
                f"the tritonserver wheel carries no {name}, which perf_analyzer needs; unset GR_PERF_ANALYZER"
            )
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(found[-1])
    return folder


def _generator(stage: Stage, visits: list[Visit], rate: float, seconds: float) -> list[float | None]:
    plan = stage.plan(
        phases=(Phase(seconds=3.0, callers=1), Phase(seconds=seconds, rate=rate)),
        probes=tuple(probe(visit) for visit in visits),
        probe_share=1.0,
    )
    with Load(stage, plan) as load:
        records, _ = load.results()
    waits = latencies(records[records["phase"] == 1])
    return [percentile(waits, percent) for percent in PERCENTILES]


def _row(name: str, value: float | None, unit: str, against: str) -> Row:
    return {"name": name, "value": value, "unit": unit, "against": against, "target": None}

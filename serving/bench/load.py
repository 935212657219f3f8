"""Latency, goodput, refusals, cache hits and CPU against the offered load, from a tenth to beyond saturation.

Invariant: every figure of a load comes from its own open phase; percentiles are of all requests that were not refused,
from their scheduled arrival, the ones given up at the deadline included.
"""

from typing import Any

import numpy as np

from serving.bench.generator import EXPIRED, FAILED, OK, REJECTED, Phase
from serving.bench.stage import Load, Stage

GOOD_S = 0.25
NUM_CALLERS = 16
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.2)
Row = dict[str, Any]


def rows(
    stage: Stage,
    *,
    warm_up_s: float = 8.0,
    saturation_s: float = 12.0,
    load_s: float = 15.0,
    shares: tuple[float, ...] = SHARES,
) -> tuple[list[Row], float]:
    """Return the rows of a sweep over `shares` of saturation, `load_s` each, and the saturation in requests a second.

    Saturation is what NUM_CALLERS callers reach who each wait for their answer before they ask again.
    """
    phases = (
        Phase(seconds=warm_up_s, callers=NUM_CALLERS),
        Phase(seconds=saturation_s, callers=NUM_CALLERS),
        *(Phase(seconds=load_s, share=share) for share in shares),
    )
    with Load(stage, stage.plan(phases=phases)) as load:
        records, reports = load.results()
    saturation = reports[1]["rate"]
    found = [_row(f"saturation, {NUM_CALLERS} callers who wait", saturation, "1/s")]
    for number, share in enumerate(shares, start=2):
        found += _of_load(records[records["phase"] == number], reports[number], share, load_s)
    return found, saturation


def latencies(records: np.ndarray) -> np.ndarray:
    """Return the ms from scheduled arrival to answer or giving up, of all requests that were not refused."""
    waited = records[(records["outcome"] == OK) | (records["outcome"] == EXPIRED)]
    return 1e3 * (waited["done"] - waited["scheduled"])


def percentile(values: np.ndarray, percent: float) -> float | None:
    """Return the smallest value that `percent` % of all values do not exceed; None of no values."""
    return float(np.quantile(values, percent / 100, method="inverted_cdf")) if len(values) else None


def hit_rate(report: dict[str, Any]) -> float | None:
    """Return the share of history tokens that the server's own counters say were in the cache, in %."""
    hits, misses = (report.get(f"gr_cache_{what}_tokens_total", 0.0) for what in ("hit", "prefill"))
    return 100 * hits / (hits + misses) if hits + misses else None


def _of_load(records: np.ndarray, report: dict[str, Any], share: float, seconds: float) -> list[Row]:
    answered = records[records["outcome"] == OK]
    waits = latencies(records)
    good = np.count_nonzero(1e3 * (answered["done"] - answered["scheduled"]) <= 1e3 * GOOD_S)
    cacheable = int(answered["cacheable"].sum())
    figures: list[tuple[str, float | None, str]] = [
        ("offered", len(records) / seconds, "1/s"),
        *((f"latency, p{percent}", percentile(waits, percent), "ms") for percent in (50, 95, 99)),
        (f"goodput, answers within {1e3 * GOOD_S:g} ms", good / seconds, "1/s"),
        ("rejected", _percent(records, REJECTED), "%"),
        ("given up at the deadline", _percent(records, EXPIRED), "%"),
        ("failed", _percent(records, FAILED), "%"),
        ("cache hits by CACHED_TOKENS", 100 * int(answered["cached"].sum()) / cacheable if cacheable else None, "%"),
        ("cache hits by the server's counters", hit_rate(report), "%"),
        ("server CPU", report["server_cpu_s"] / report["spent_s"], "cores"),
        ("generator CPU", report["generator_cpu_s"] / report["spent_s"], "cores"),
        ("generator late, p99", percentile(1e3 * (records["sent"] - records["scheduled"]), 99), "ms"),
    ]
    load = round(100 * share)
    against = f"{len(records)} requests"
    return [
        _row(f"{load} % of saturation: {what}", value, unit, against) | {"load": load, "what": what}
        for what, value, unit in figures
    ]


def _percent(records: np.ndarray, outcome: int) -> float | None:
    return 100 * float(np.mean(records["outcome"] == outcome)) if len(records) else None


def _row(name: str, value: float | None, unit: str, against: str | None = None) -> Row:
    return {"name": name, "value": value, "unit": unit, "against": against, "target": None}

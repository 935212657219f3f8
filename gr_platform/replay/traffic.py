"""What a load came to, as figures: by day, during swaps, and over time.

Invariant: every request is in exactly one day, and one that failed is never left out; latency counts from the scheduled
arrival, of all requests that were not refused.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gr_platform.replay.load import Told
from serving.bench.generator import EXPIRED, FAILED, OK, REJECTED
from serving.bench.load import latencies, percentile

# How long after a deployment has ended its effects are looked for.
SETTLE_S = 5.0
INTERVAL_S = 5.0
ENDS = {"rejected": REJECTED, "expired": EXPIRED, "failed": FAILED}
Figures = dict[str, Any]


def figures(told: Told) -> Figures:
    """Return what a report shows of a load.

    "total", "outside_swaps", "during_swaps": requests, answered, rejected, expired, failed, p50_ms, p99_ms, hit_rate
    (history tokens that were cached, %; probes left out). "days": the same by "day". "total" and "days" have also
    lists (that visitors asked for) and lists_hit (that held what came next). "swaps": the same by swap, with label,
    at_s, seconds. "timeline": the same every INTERVAL_S seconds, at_s from the beginning. "day_starts_s": [day, at].
    """
    order = np.argsort(told.records["scheduled"], kind="stable")
    records = told.records[order]
    notes = {note["row"]: note for note in told.notes}
    records["probe"] = [notes[row]["probe"] if row in notes else -1 for row in order]
    hits = np.array([_hit(notes.get(row)) for row in order], int)
    began = told.days[0][1]
    at = records["scheduled"]
    swapping = np.zeros(len(records), bool)
    swaps = []
    for swap in told.swaps:
        inside = (at >= swap.began) & (at < swap.ended + SETTLE_S)
        swapping |= inside
        told_of = {"label": swap.served.label, "at_s": swap.began - began, "seconds": swap.ended - swap.began}
        swaps.append(told_of | _of(records[inside]))
    return {
        "total": _of(records) | _online(hits),
        "outside_swaps": _of(records[~swapping]),
        "during_swaps": _of(records[swapping]),
        "days": [{"day": day} | _of(records[inside]) | _online(hits[inside]) for day, inside in _days(told, at)],
        "swaps": swaps,
        "timeline": _timeline(records, at - began),
        "day_starts_s": [[day, moment - began] for day, moment in told.days],
    }


def _of(records: np.ndarray) -> Figures:
    waits = latencies(records)
    answered = records[records["outcome"] == OK]
    asked = answered[(answered["probe"] < 0) & (answered["cacheable"] > 0)]
    cacheable = int(asked["cacheable"].sum())
    return {
        "requests": len(records),
        "answered": len(answered),
        **{name: int(np.count_nonzero(records["outcome"] == end)) for name, end in ENDS.items()},
        "p50_ms": percentile(waits, 50),
        "p99_ms": percentile(waits, 99),
        "hit_rate": 100 * int(asked["cached"].sum()) / cacheable if cacheable else None,
    }


def _hit(note: Mapping[str, Any] | None) -> int:
    """Return 1 or 0 for a list that held what came next or did not, -1 for any other request."""
    return -1 if note is None or "hit" not in note else int(note["hit"])


def _online(hits: np.ndarray) -> Figures:
    lists = hits[hits >= 0]
    return {"lists": len(lists), "lists_hit": int(lists.sum())}


def _days(told: Told, at: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Return which requests, bool [n], belong to each day; those before the first one's beginning are its own."""
    starts = [-np.inf, *(moment for _, moment in told.days[1:]), np.inf]
    return [
        (day, (at >= begin) & (at < end))
        for (day, _), begin, end in zip(told.days, starts[:-1], starts[1:], strict=True)
    ]


def _timeline(records: np.ndarray, seconds: np.ndarray) -> list[Figures]:
    if not len(records):
        return []
    place = np.maximum(seconds // INTERVAL_S, 0).astype(int)
    found = []
    for number in range(int(place.max()) + 1):
        found.append({"at_s": number * INTERVAL_S} | _of(records[place == number]))
    return found

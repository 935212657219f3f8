"""A made-up week: what a replay would tell of seven days, the fourth of them poisoned."""

from dataclasses import asdict
from typing import Any

import pytest

from gr_platform.replay.answers import Staleness

GAIN = 0.02


def part(requests: int = 100, failed: int = 0) -> dict[str, Any]:
    return {
        "requests": requests,
        "answered": requests - failed,
        "rejected": 0,
        "expired": 0,
        "failed": failed,
        "p50_ms": 12.0,
        "p99_ms": 80.5,
        "hit_rate": 91.2,
    }


def compared(daily: float, frozen: float, width: float = 0.01) -> dict[str, dict[str, float]]:
    values = {"daily": daily, "frozen": frozen, "difference": daily - frozen}
    return {name: {"value": v, "low": v - width, "high": v + width} for name, v in values.items()}


def day(number: int) -> dict[str, Any]:
    poisoned = number == 4
    gain = GAIN * (number - 1)
    return {
        "number": number,
        "date": f"2026-06-{19 + number}",
        "num_events": 6_000 + 300 * number,
        "fault": "poisoned" if poisoned else None,
        "top_share": 0.8 if poisoned else 0.006,
        "new_item_share": 0.025,
        "outcome": "refused" if poisoned else "promoted",
        "reasons": ["one item: 80 % of the window's events are of one item, at most 30 % may be"] if poisoned else [],
        "seconds": 61.5,
        "deploy_s": None if poisoned else 4.2,
        "retrieval": {"ndcg_at_10": compared(0.32, 0.32 - gain), "hr_at_10": compared(0.5, 0.5 - gain)},
        "ranking": {"ne": compared(0.95, 0.95 + gain / 2)},
    }


@pytest.fixture
def facts() -> dict[str, Any]:
    timeline = [part(25) | {"at_s": 5.0 * number} for number in range(84)]
    return {
        "dataset": "simulated",
        "command": "gr replay --days 7",
        "commit": "0d18230",
        "date": "2026-11-28",
        "machine": "2 CPU cores",
        "seconds": 431.0,
        "target_seconds": 600.0,
        "days": [day(number) for number in range(1, 8)],
        "load": {
            "total": part(2_913) | {"lists": 900, "lists_hit": 300},
            "outside_swaps": part(2_400),
            "during_swaps": part(513),
            "days": [part(416) | {"day": number, "lists": 130, "lists_hit": 40} for number in range(1, 8)],
            "swaps": [part(60) | {"label": f"day {n}", "at_s": 60.0 * n, "seconds": 4.2} for n in (1, 2, 3, 5, 6)],
            "timeline": timeline,
            "day_starts_s": [[number, 60.0 * (number - 1)] for number in range(1, 8)],
        },
        "staleness": asdict(Staleness(num_probes=640, num_stale=0, num_of_no_model=0, num_undecided=0)),
    }

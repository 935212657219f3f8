"""Golden requests: made-up histories with the scores that the offline model gives them, stored in every bundle.

Invariant: requests are drawn from a seed, never from real users, so that a bundle carries no person's history.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

LENGTHS = (0, 1, 2, 7, 30)
NUM_CANDIDATES = 16
# 2020-01-01, ms: any fixed time serves, differences are what the model sees.
FIRST_TIME_MS = 1_577_836_800_000


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenRequest:
    """items, actions, times int64 [n] (dense indices, masks, ms); candidates int64 [C]; request_time ms."""

    items: np.ndarray
    actions: np.ndarray
    times: np.ndarray
    candidates: np.ndarray
    request_time: int


def draw(*, first_item: int, num_rows: int, num_actions: int, max_events: int, seed: int = 0) -> list[GoldenRequest]:
    """Return requests of lengths 0, 1, 2, 7, 30 and `max_events`, with gaps from seconds to months."""
    rng = np.random.default_rng(seed)
    requests = []
    for length in sorted({min(n, max_events) for n in (*LENGTHS, max_events)}):
        gaps = (10 ** rng.uniform(2, 10, length + 1)).astype(np.int64)
        times = FIRST_TIME_MS + np.cumsum(gaps)
        requests.append(
            GoldenRequest(
                items=rng.integers(first_item, num_rows, length),
                actions=2 ** rng.integers(0, num_actions, length),
                times=times[:-1],
                candidates=rng.integers(first_item, num_rows, NUM_CANDIDATES),
                request_time=int(times[-1]),
            )
        )
    return requests


def save(path: Path, requests: list[GoldenRequest], expected: list[np.ndarray]) -> None:
    """Write requests and their expected scores as safetensors."""
    tensors: dict[str, np.ndarray] = {}
    for index, (request, scores) in enumerate(zip(requests, expected, strict=True)):
        tensors |= {
            f"{index}.items": request.items,
            f"{index}.actions": request.actions,
            f"{index}.times": request.times,
            f"{index}.candidates": request.candidates,
            f"{index}.request_time": np.array([request.request_time], np.int64),
            f"{index}.expected": np.ascontiguousarray(scores),
        }
    save_file(tensors, path)


def load(path: Path) -> list[tuple[GoldenRequest, np.ndarray]]:
    """Return (request, expected scores [C, tasks] or [C]) in the order they were saved."""
    tensors = load_file(path)
    count = sum(name.endswith(".expected") for name in tensors)
    return [
        (
            GoldenRequest(
                items=tensors[f"{i}.items"],
                actions=tensors[f"{i}.actions"],
                times=tensors[f"{i}.times"],
                candidates=tensors[f"{i}.candidates"],
                request_time=int(tensors[f"{i}.request_time"][0]),
            ),
            tensors[f"{i}.expected"],
        )
        for i in range(count)
    ]

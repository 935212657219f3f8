"""What the deployed pair costs over gRPC on this machine: start, cold and cached requests, the wire, many callers.

Invariant: histories are made up (seeded), so a figure says nothing about a person; each is compared within one run.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gr_platform import settings
from gr_platform.bundle.load import Bundle, load
from gr_platform.errors import UserError
from serving import repository
from serving.client import Client, History
from serving.engine.ranker import Ranker
from serving.engine.requests import RankRequest
from serving.server import EmbeddedServer, attach

NUM_CANDIDATES = 512
NUM_REQUESTS = 30
# Recommendations under load: callers who each wait for their answer before they ask again.
NUM_CALLERS, CALLS_EACH = 16, 40
START_MS = 1_577_836_800_000


def run(num_threads: int) -> list[dict[str, Any]]:
    """Return rows {name, value, unit, against, target}. Raises UserError if no pair is deployed or a server runs."""
    home = settings.home()
    folder = repository.current(home)
    if folder is None or not (folder / "gr_ranker").is_dir():
        raise UserError("no pair is deployed, so there is nothing to measure; run gr demo first")
    if attach(home) is not None:
        raise UserError("a model server runs already and would share the cores; stop it (gr down) and run again")
    bundle = load(folder / "gr_ranker" / "1" / "bundle")
    began = time.perf_counter()
    with EmbeddedServer(home) as handle:
        ready_s = time.perf_counter() - began
        with Client(handle.grpc_address, deadline_s=30.0) as client:
            cold, cached = _over_grpc(client, bundle)
            seconds, waits = _recommendations(client, bundle)
    in_process = _in_process(bundle, num_threads)
    num_events = bundle.config.max_events
    label = f"n {num_events}, m {NUM_CANDIDATES}"
    return [
        {"name": "server ready", "value": ready_s, "unit": "s", "against": None, "target": 15.0, "at_most": True},
        _row(f"cold request, {label}", cold, "ms", None, None),
        _row(f"cached request, {label}", cached, "ms", None, None),
        _row(f"cold / cached, {label}", cold / cached, "x", "same run", None),
        _row(f"gRPC round trip / engine call, cached, {label}", cached / in_process, "x", "same engine", 1.15) | {
            "at_most": True
        },
        _row(f"recommendations, {NUM_CALLERS} callers", len(waits) / seconds, "1/s", None, None),
        _row(f"recommendation, {NUM_CALLERS} callers, p50", float(np.quantile(waits, 0.5)), "ms", None, None),
        _row(f"recommendation, {NUM_CALLERS} callers, p99", float(np.quantile(waits, 0.99)), "ms", None, None),
    ]  # fmt: skip


def _row(name: str, value: float, unit: str, against: str | None, target: float | None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "against": against, "target": target}


def _history(bundle: Bundle, seed: int) -> tuple[History, np.ndarray, int]:
    rng = np.random.default_rng(seed)
    num_events = bundle.config.max_events
    ids = bundle.vocabulary.item_ids
    times = START_MS + np.cumsum(rng.integers(1_000, 10_000_000, num_events + 1))
    history = History(
        items=rng.choice(ids, num_events),
        actions=np.ones(num_events, np.int64),
        times=times[:-1],
    )
    return history, rng.choice(ids, NUM_CANDIDATES), int(times[-1])


def _median_ms(calls: list[Callable[[], Any]]) -> float:
    milliseconds = []
    for call in calls:
        began = time.perf_counter()
        call()
        milliseconds.append(1e3 * (time.perf_counter() - began))
    return statistics.median(milliseconds)


def _over_grpc(client: Client, bundle: Bundle) -> tuple[float, float]:
    """Return median ms of the first request of NUM_REQUESTS users, and of the same requests again."""

    def ask(seed: int) -> Callable[[], Any]:
        history, candidates, at = _history(bundle, seed)
        return lambda: client.score(history, candidates, request_time=at)

    calls = [ask(seed) for seed in range(NUM_REQUESTS)]
    return _median_ms(calls), _median_ms(calls)


def _recommendations(client: Client, bundle: Bundle) -> tuple[float, list[float]]:
    """Return the seconds that all callers together took, and the ms that each recommendation was waited for."""

    def ask(number: int) -> float:
        history, _, at = _history(bundle, number % NUM_REQUESTS)
        began = time.perf_counter()
        client.recommend(history, k=10, request_time=at)
        return 1e3 * (time.perf_counter() - began)

    began = time.perf_counter()
    with ThreadPoolExecutor(NUM_CALLERS) as pool:
        waits = list(pool.map(ask, range(NUM_CALLERS * CALLS_EACH)))
    return time.perf_counter() - began, waits


def _in_process(bundle: Bundle, num_threads: int) -> float:
    """Return median ms of the cached requests by the engine alone."""
    ranker = Ranker(bundle, cache_bytes=256 << 20, num_threads=num_threads)
    ranker.warm_up()

    def ask(seed: int) -> Callable[[], Any]:
        history, candidates, at = _history(bundle, seed)
        request = RankRequest(history=history, candidates=candidates, request_time=at)
        return lambda: ranker.score(request)

    calls = [ask(seed) for seed in range(NUM_REQUESTS)]
    for call in calls:
        call()
    return _median_ms(calls)

"""What the server adds to the engine, and what batching gives: the same requests in process and over gRPC.

Invariant: both sides have the same bundle, threads and cache; every request is a hit. Callers live in a process of
their own, so that their CPU is not the server's.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from gr_platform import settings
from gr_platform.bundle.compute import least_seconds
from gr_platform.bundle.load import load
from gr_platform.models.config import ModelConfig
from serving import repository
from serving.bench import models
from serving.bench.speed import NUM_ITEMS, Row, request, row
from serving.client import Client
from serving.engine.engine import Engine
from serving.engine.ranker import Ranker
from serving.handle import ServerHandle
from serving.server import EmbeddedServer

ROUNDS = 5


def rows(num_threads: int) -> list[Row]:
    """Return the rows: round trip against the engine's call, and throughput with and without batching."""
    large, small = models.speed_table(256), replace(models.speed_table(256), embedding_dim=64, qk_dim=16, v_dim=16)
    return [
        _round_trip(large, num_threads),
        _batching(
            "throughput, dynamic batching on / off, hits, n 256, m 16, d 64, 8 users", small, 16, 1.3, num_threads
        ),
        _batching("the same at m 512, d 256", large, 512, 0.95, num_threads),
    ]


def _round_trip(config: ModelConfig, num_threads: int) -> Row:
    asked = request(512, 512)
    with _served(config, num_threads) as (handle, folder):
        with Client(handle.grpc_address, deadline_s=30.0) as client:
            history, at = asked.history, asked.request_time

            def over_grpc() -> object:
                return client.score(history, asked.candidates, request_time=at)

            trip = least_seconds(over_grpc, num_calls=50)
        model = Ranker(load(folder / "gr_ranker" / "1" / "bundle"), cache_bytes=256 << 20, num_threads=num_threads)
        model.warm_up()
        engine = Engine(model)
        call = least_seconds(lambda: engine.ask(asked), num_calls=50)
    against = f"{1e3 * trip:.1f} ms and {1e3 * call:.1f} ms"
    name = "gRPC round trip / the same engine call in process, n 512, m 512"
    return row(name, trip / call, "x", against, 1.15) | {"at_most": True}


def _batching(name: str, config: ModelConfig, num_candidates: int, target: float, num_threads: int) -> Row:
    with _served(config, num_threads) as (batched, _), _served(config, num_threads, max_batch_size=1) as (single, _):
        # Turn by turn, because the machine is not equally fast all the time.
        rates = [[_rate(handle, num_candidates) for handle in (batched, single)] for _ in range(ROUNDS)]
    on, off = (max(each) for each in zip(*rates, strict=True))
    return row(name, on / off, "x", f"{on:.0f}/s and {off:.0f}/s, the best of {ROUNDS} rounds each", target)


@contextmanager
def _served(config: ModelConfig, num_threads: int, **options: Any) -> Iterator[tuple[ServerHandle, Path]]:
    """Yield a server of a random pair, and its model repository."""
    with tempfile.TemporaryDirectory(prefix="gr-bench-") as folder:
        home = Path(folder)
        pair = models.write_pair(home / "pairs", config, num_items=NUM_ITEMS, seed=1)
        chosen = repository.ServingOptions(num_threads=num_threads, log_bytes=0, **options)
        published = repository.publish(home, pair.retrieval, pair.ranking, chosen)
        with EmbeddedServer(home) as handle:
            yield handle, published.folder


def _rate(handle: ServerHandle, num_candidates: int) -> float:
    """Return the answers a second that the callers get together, each with a history of its own."""
    command = [sys.executable, "-m", "serving.bench.callers", handle.grpc_address, str(num_candidates)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=settings.PROJECT_ROOT)
    return float(json.loads(done.stdout))

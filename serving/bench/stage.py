"""A model server of a benchmark's own: random pairs of one shape in a state folder that goes away with it.

Invariant: nothing of the user's state folder is read, written or stopped.
"""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gr_platform import settings
from gr_platform.errors import UserError
from gr_platform.models.config import ModelConfig
from serving import repository
from serving.bench import models
from serving.bench.generator import Plan
from serving.bench.traffic import Traffic
from serving.handle import ServerHandle
from serving.server import EmbeddedServer

START_TIMEOUT_S = 120.0
MAX_WAIT_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A running server of `home` that serves the first of `pairs`."""

    home: Path
    handle: ServerHandle
    pairs: tuple[models.Pair, ...]
    config: ModelConfig
    options: repository.ServingOptions
    traffic: Traffic

    def plan(self, **fields: Any) -> Plan:
        """Return a plan of this stage's traffic against its server."""
        return Plan(
            grpc_address=self.handle.grpc_address,
            metrics_address=self.handle.metrics_address,
            server_pid=self.handle.pid,
            traffic=self.traffic,
            **fields,
        )


@contextlib.contextmanager
def stage(
    config: ModelConfig,
    *,
    num_threads: int,
    num_items: int = 10_000,
    num_pairs: int = 2,
    traffic: dict[str, Any] | None = None,
) -> Iterator[Stage]:
    """Yield a server that serves a new random pair of `config`'s shape; `traffic` replaces fields of Traffic."""
    with tempfile.TemporaryDirectory(prefix="gr-bench-") as folder:
        home = Path(folder)
        pairs = tuple(
            models.write_pair(home / "pairs", config, num_items=num_items, seed=seed) for seed in range(num_pairs)
        )
        # What would come later than it is good for is refused (load.GOOD_S).
        options = repository.ServingOptions(num_threads=num_threads, max_wait_s=MAX_WAIT_S)
        repository.publish(home, pairs[0].retrieval, pairs[0].ranking, options)
        server = EmbeddedServer(home)
        handle = server.start(START_TIMEOUT_S)
        try:
            yield Stage(
                home=home,
                handle=handle,
                pairs=pairs,
                config=config,
                options=options,
                traffic=Traffic(
                    first_id=models.FIRST_ID,
                    num_items=num_items,
                    num_actions=len(models.ACTIONS),
                    max_events=config.max_events,
                    chunk=config.chunk,
                    **(traffic or {}),
                ),
            )
        finally:
            server.stop()


class Load:
    """A generator process that carries out a plan: a context manager, ended with its context."""

    def __init__(self, stage: Stage, plan: Plan) -> None:
        self._plan_file = stage.home / "plan.json"
        self._results = stage.home / "results"
        self._plan_file.write_text(plan.to_json(), encoding="utf-8")

    def __enter__(self) -> "Load":
        command = [sys.executable, "-m", "serving.bench.generator", str(self._plan_file), str(self._results)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=settings.PROJECT_ROOT, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def wait_for_phase(self) -> None:
        """Return when the next phase begins. Raises UserError if the process ends instead."""
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            self._fail()

    def stop(self) -> None:
        """Ask for no more traffic; what was sent is still waited for."""
        self._process.send_signal(signal.SIGTERM)

    def results(self) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Return all requests (RECORD [n]) and the reports of the phases, when the process has ended."""
        # It prints a word a phase, which the pipe holds unread.
        if self._process.wait():
            self._fail()
        records = np.load(self._results.with_suffix(".npy"), allow_pickle=False)
        return records, json.loads(self._results.with_suffix(".json").read_text(encoding="utf-8"))

    def _fail(self) -> None:
        raise UserError("the load generator ended with an error, which is printed above; run the benchmark again")

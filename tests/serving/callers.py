"""A caller like any other while faults run, who holds each answer against the offline model; a server's own figures."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from serving.client import Client, ServingError
from serving.handle import ServerHandle
from tests.serving.conftest import Offline, after, user

HISTORIES = tuple(user(8000 + num_events, num_events) for num_events in (0, 7, 25, 130))
CANDIDATES = np.arange(1000, 1012)


@dataclass(slots=True, kw_only=True)
class Caller:
    """Asks for scores again and again; `expected` are the offline model's. Times in seconds."""

    expected: list[np.ndarray]
    waited: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    in_a_row: int = 0

    def ask(self, client: Client) -> None:
        """Ask once more and hold the answer against the reference."""
        number = len(self.waited) % len(HISTORIES)
        history, began = HISTORIES[number], time.monotonic()
        try:
            scores = client.score(history, CANDIDATES, request_time=after(history)).scores
        except ServingError as error:
            self.failed.append(f"{error.code} {error}")
            self.in_a_row = 0
        else:
            assert_right(scores, self.expected[number], max(map(np.max, self.expected)))
            self.in_a_row += 1
        self.waited.append(time.monotonic() - began)

    def succeeds(self, times: int = 3) -> bool:
        """Return whether the last so many requests were answered."""
        return self.in_a_row >= times

    @contextmanager
    def asking(self, server: ServerHandle, *, may_fail: Collection[str] = ()) -> Iterator["Caller"]:
        """Ask all the while that the block runs: each answer must be right, and each error of a code that may come."""
        done, wrong = threading.Event(), list[BaseException]()

        def run() -> None:
            try:
                with Client(server.grpc_address, deadline_s=30) as client:
                    while not done.wait(0.005):
                        self.ask(client)
            except BaseException as error:
                wrong.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield self
            # What came last may show in the next answer alone.
            count = len(self.waited)
            wait_for(lambda: len(self.waited) > count + 1 or wrong)
        finally:
            done.set()
            thread.join()
        if wrong:
            raise wrong[0]
        assert [error for error in self.failed if error.partition(" ")[0] not in may_fail] == []
        assert len(self.failed) < len(self.waited)


def caller(model: Offline) -> Caller:
    """Return a caller of the ranking model."""
    return Caller(expected=[model.scores(history, CANDIDATES, after(history)) for history in HISTORIES])


def assert_right(actual: np.ndarray, expected: np.ndarray, largest: float | None = None) -> None:
    """The precision that serving promises in fp32: 1e-5 of the largest score, of these or of all that are asked for."""
    assert actual.shape == expected.shape
    largest = np.abs(expected).max(initial=0.0) if largest is None else largest
    assert np.abs(actual - expected).max(initial=0.0) <= 1e-5 * largest


def figures(server: ServerHandle, model: str = "gr_ranker") -> dict[str, float]:
    """Return the model's own figures by name; they are up to half a second old."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5) as answer:
        rows = (line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line.startswith("gr_"))
    label = f'{{model="{model}"}}'
    return {name.removesuffix(label): float(value) for name, value in rows if name.endswith(label)}


def settled(server: ServerHandle, model: str = "gr_ranker", within_s: float = 30.0) -> dict[str, float]:
    """Return the figures once nothing is in the engine and they have come to rest."""
    before, deadline = figures(server, model), time.monotonic() + within_s
    while True:
        time.sleep(1.1)
        now = figures(server, model)
        if now["gr_queue_requests"] == 0 and now["gr_requests_total"] == before["gr_requests_total"]:
            return now
        assert time.monotonic() < deadline, now
        before = now


def post(server: ServerHandle, body: bytes, path: str = "/v2/models/gr_ranker/infer") -> tuple[int, str]:
    """Return the status and the error's text (or "") of a request over HTTP."""
    request = urllib.request.Request(f"http://{server.http_address}{path}", data=body)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.read()
            return answer.status, ""
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]


def shared_memory(server: ServerHandle) -> int:
    """Return the bytes of shared memory that a server and its models hold."""
    return sum(512 * file.stat().st_blocks for file in Path("/dev/shm").glob(f"{server.instance}*"))


def processes(server: ServerHandle) -> dict[str, psutil.Process]:
    """Return the server's process and its models' by name."""
    process = psutil.Process(server.pid)
    children = process.children(recursive=True)
    return {"server": process} | {Path(child.cmdline()[1]).parts[-3]: child for child in children}


def resident(server: ServerHandle) -> dict[str, int]:
    """Return the bytes in memory of the server and of its models' processes, shared memory left out."""
    return {name: (info := each.memory_info()).rss - info.shared for name, each in processes(server).items()}


def wait_for(what: Callable[[], object], within_s: float = 30.0) -> None:
    """Return when `what()` is true; fail if it does not become so in time."""
    deadline = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)

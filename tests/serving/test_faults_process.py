"""Processes, files and memory fail under a real, supervised model server: it heals, or what served before goes on.

The slow ones are marked `faults` and run by `make test-faults`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from gr_platform import settings, storage
from gr_platform.errors import UserError, sentence_for
from gr_platform.processes import is_alive
from serving import client_tensors, health, repository, swap, verification
from serving.client import Client, History, ServingError
from serving.handle import ServerHandle, attach, record_path, sweep
from serving.repository import ServingOptions
from serving.server import EmbeddedServer
from serving.supervisor import Supervisor
from serving.swap import JOURNAL, deploy, load, serves
from serving.watch import Policy
from tests.serving.conftest import NUM_ITEMS, Offline, after, offline, user

pytestmark = pytest.mark.e2e

EAGER = Policy(interval_s=0.2)
HISTORY = user(77, 25)
CANDIDATES = np.arange(1000, 1006)
LONG = History(
    items=np.arange(90_000) % NUM_ITEMS + 1000, actions=np.ones(90_000, np.int64), times=np.arange(90_000) * 60_000
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server with its state folder and what it must answer."""

    home: Path
    server: EmbeddedServer
    pair: dict[str, Path]
    expected: np.ndarray

    @property
    def handle(self) -> ServerHandle:
        handle = attach(self.home)
        assert handle is not None
        return handle

    def scores(self, deadline_s: float = 5.0) -> np.ndarray:
        with Client(self.handle.grpc_address, deadline_s=deadline_s) as client:
            return client.score(HISTORY, CANDIDATES, request_time=after(HISTORY)).scores

    def assert_right(self) -> None:
        """All models answer, as the offline model does, and are those of the repository."""
        np.testing.assert_allclose(self.scores(), self.expected, atol=1e-5 * self.expected.max())
        folder = repository.current(self.home)
        assert folder is not None
        with self.handle.connect() as client:
            assert [m for m in repository.MODELS if not serves(client, folder, m)] == []
            verification.verify(client, folder, swap.models_in(folder))

    def wait_until_right(self, within_s: float) -> float:
        """Return the seconds that it took; no answer on the way may be wrong."""
        started = time.monotonic()
        while True:
            # No server on record, or one that does not answer.
            with suppress(ServingError, AssertionError):
                scores = self.scores(deadline_s=1.0)
                break
            assert time.monotonic() - started < within_s, health.read(self.home)
            time.sleep(0.05)
        np.testing.assert_allclose(scores, self.expected, atol=1e-5 * self.expected.max())
        return time.monotonic() - started


@contextmanager
def watched(served: Served, policy: Policy = EAGER) -> Iterator[Supervisor]:
    """Have a supervisor watch for the block; an error of its own fails the test."""
    watching = Supervisor(served.handle, served.server, policy)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(watching.run)
        try:
            yield watching
        finally:
            watching.stop()
            running.result(timeout=300)


def wait_for(what: Callable[[], object], within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def acts(home: Path) -> tuple[int, int]:
    """How often models were loaded again, and the server restarted."""
    seen = health.read(home)
    return (seen.num_reloads, seen.num_restarts) if seen else (0, 0)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, pair: dict[str, Path], offline_models: dict[str, Offline]
) -> Iterator[Served]:
    state = tmp_path_factory.mktemp("supervised")
    repository.publish(state, pair["retrieval"], pair["ranking"])
    expected = offline_models["ranking"].scores(HISTORY, CANDIDATES, after(HISTORY))
    server = EmbeddedServer(state)
    server.start()
    yield Served(home=state, server=server, pair=pair, expected=expected)
    # Models whose process died are never given up by the server: no need to wait for them.
    server.stop(grace_s=1.0)


@pytest.fixture(scope="module")
def other_pair(tmp_path_factory: pytest.TempPathFactory, random_bundle: Callable[..., Path]) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("other")
    return {kind: random_bundle(parent / kind, kind, num_items=NUM_ITEMS, seed=1) for kind in ("retrieval", "ranking")}


@pytest.mark.parametrize("model", ["gr_ranker", "gr_recommender"])
def test_a_model_whose_process_is_killed_answers_right_again_within_seconds(served: Served, model: str) -> None:
    with watched(served):
        wait_for(lambda: health.read(served.home))
        (stub,) = (stub for stub in served.handle.stubs(model) if stub.status() != psutil.STATUS_ZOMBIE)
        stub.kill()
        wait_for(lambda: acts(served.home)[0] == 1, 20.0)
        served.wait_until_right(20.0)
        wait_for(lambda: health.read(served.home).state == "serving", 20.0)
        assert acts(served.home) == (1, 0)
        assert health.read(served.home).reason == f"stub_died {model}"
    served.assert_right()


def test_who_waits_for_a_model_that_dies_does_not_wait_for_ever(served: Served) -> None:
    def processes(model: str) -> set[psutil.Process]:
        return {stub for stub in served.handle.stubs(model) if stub.status() != psutil.STATUS_ZOMBIE}

    ended: list[object] = []
    call = client_tensors.ranked_list("gr_recommender", HISTORY, NUM_ITEMS, after(HISTORY), (), id_type="int64")
    arguments = call.arguments(client_tensors.CallOptions(), 300.0)
    callers = processes("gr_recommender") | processes("gr_user_recommender")
    with watched(served), served.handle.connect() as client:
        wait_for(lambda: health.read(served.home))
        for _ in range(128):
            client.async_infer(callback=lambda result, error: ended.append((result, error)), **arguments)
        # In the middle of its requests, so that some are lost.
        wait_for(lambda: len(ended) >= 8)
        (stub,) = processes("gr_ranker")
        stub.kill()
        assert len(ended) < 100
        wait_for(lambda: not any(map(is_alive, callers)), 40.0)
        wait_for(lambda: health.read(served.home).state == "serving", 20.0)
        assert acts(served.home) == (1, 0)
    served.assert_right()


def flipped(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)


def without_a_file(folder: Path) -> None:
    (folder / "golden.safetensors").unlink()


def of_another_schema(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flipped, r"model\.safetensors is corrupt"),
        (without_a_file, r"golden\.safetensors is missing"),
        (of_another_schema, "schema version 99"),
    ],
)
def test_a_damaged_bundle_is_a_named_error_and_the_old_pair_serves_on(
    served: Served, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damaged = shutil.copytree(served.pair["ranking"], tmp_path / "ranking")
    damage(damaged)
    with pytest.raises(UserError, match=message) as failed:
        deploy(served.home, served.pair["retrieval"], damaged)
    assert str(tmp_path) not in str(failed.value)
    assert not (served.home / JOURNAL).exists()
    served.assert_right()


@pytest.fixture
def sabotaged(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], None]], None]:
    """Return sabotage(change): what is published next is changed, by change(repository folder), before it is loaded."""

    def sabotage(change: Callable[[Path], None]) -> None:
        publish = repository.publish

        def publish_changed(*args: object, **kwargs: object) -> repository.Published:
            published = publish(*args, **kwargs)  # type: ignore[arg-type]
            change(published.folder)
            return published

        monkeypatch.setattr(repository, "publish", publish_changed)

    return sabotage


def test_a_byte_that_flips_after_the_publication_is_found_by_the_model_and_all_go_back(
    served: Served, sabotaged: Callable[..., None]
) -> None:
    def flip_the_retriever(folder: Path) -> None:
        bundle = folder / "gr_retriever" / "1" / "bundle"
        # The repository links to the bundle's own files: this copy alone is to be damaged.
        copy = shutil.copytree(bundle, folder / "copy")
        shutil.rmtree(bundle)
        flipped(copy.rename(bundle))

    before = repository.current(served.home)
    sabotaged(flip_the_retriever)
    with pytest.raises(UserError, match=r"did not load gr_retriever: .*corrupt"):
        deploy(served.home, served.pair["retrieval"], served.pair["ranking"], ServingOptions(cache_bytes=65 << 20))
    assert repository.current(served.home) == before
    served.assert_right()


def test_golden_requests_that_get_other_scores_through_the_server_bring_the_old_pair_back(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = repository.current(served.home)
    monkeypatch.setattr(verification, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="gr_ranker answers the golden requests of its bundle with other scores"):
        deploy(served.home, served.pair["retrieval"], served.pair["ranking"], ServingOptions(cache_bytes=66 << 20))
    monkeypatch.undo()
    assert repository.current(served.home) == before
    assert not (served.home / JOURNAL).exists()
    served.assert_right()


@pytest.mark.faults
def test_a_server_that_is_killed_comes_back_at_the_same_ports_with_nothing_left_of_it(served: Served) -> None:
    before = served.handle
    with watched(served), Client(before.grpc_address, deadline_s=30) as client:
        client.score(HISTORY, CANDIDATES, request_time=after(HISTORY))
        os.kill(before.pid, signal.SIGKILL)
        wait_for(lambda: (now := attach(served.home)) is not None and now.pid != before.pid)
        served.wait_until_right(60.0)
        # A connection that was there before finds the server again.
        answer = client.score(HISTORY, CANDIDATES, request_time=after(HISTORY))
        np.testing.assert_allclose(answer.scores, served.expected, atol=1e-5 * served.expected.max())
        assert health.read(served.home).reason == "the server was killed by signal 9"
    now = served.handle
    assert (now.grpc_address, now.http_address, now.metrics_address) == (
        before.grpc_address,
        before.http_address,
        before.metrics_address,
    )
    assert now.admin_key == before.admin_key
    assert list(Path("/dev/shm").glob(f"{before.instance}*")) == []
    assert not before.backend_folder.exists()


@pytest.mark.faults
@pytest.mark.parametrize("whose", ["server", "model"])
def test_what_hangs_is_replaced(served: Served, whose: str) -> None:
    impatient = replace(EAGER, stalled_s=4.0, canary_s=0.5)
    hanging = psutil.Process(served.handle.pid)
    if whose == "model":
        (hanging,) = (s for s in served.handle.stubs("gr_ranker") if s.status() != psutil.STATUS_ZOMBIE)
    with watched(served, impatient):
        served.wait_until_right(10.0)
        hanging.suspend()
        wait_for(lambda: acts(served.home) == ((0, 1) if whose == "server" else (1, 0)), 60.0)
        served.wait_until_right(60.0)
    served.assert_right()


@pytest.mark.faults
def test_a_server_with_more_work_than_it_can_do_is_left_alone(served: Served) -> None:
    many = np.random.default_rng(0).integers(1000, 1000 + NUM_ITEMS, 10_000)
    stop_at, canaries = time.monotonic() + 12.0, []

    def ask(seed: int) -> None:
        with Client(served.handle.grpc_address, deadline_s=60) as client:
            while time.monotonic() < stop_at:
                history = user(seed, 130)
                client.score(history, many, request_time=after(history))

    with (
        watched(served, Policy(interval_s=0.1, canary_s=0.01, num_missed=3, stalled_s=4.0)),
        ThreadPoolExecutor(8) as p,
    ):
        asking = [p.submit(ask, seed) for seed in range(8)]
        while time.monotonic() < stop_at:
            if (seen := health.read(served.home)) is not None:
                canaries += [each.outcome for each in seen.models.values()]
            time.sleep(0.1)
        for each in asking:
            each.result()
        assert acts(served.home) == (0, 0)
    assert "late" in canaries, "the server was not slow enough for this test to say anything"
    served.assert_right()


@pytest.mark.faults
def test_a_load_that_hangs_ends_in_time_and_the_next_deployment_works(
    served: Served, other_pair: dict[str, Path], sabotaged: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(folder: Path) -> None:
        (folder / "gr_retriever" / "1" / "model.py").write_text("import time\ntime.sleep(3600)\n")

    before = repository.current(served.home)
    sabotaged(hang)
    slow = ServingOptions(cache_bytes=32 << 20)
    with pytest.raises(UserError, match="did not load gr_retriever: it was not done in 10 s"):
        deploy(served.home, other_pair["retrieval"], other_pair["ranking"], slow, timeout_s=10.0)
    monkeypatch.undo()
    assert repository.current(served.home) == before
    served.assert_right()
    assert deploy(served.home, other_pair["retrieval"], other_pair["ranking"])
    scores = offline(other_pair["ranking"]).scores(HISTORY, CANDIDATES, after(HISTORY))
    np.testing.assert_allclose(served.scores(), scores, atol=1e-5 * scores.max())
    assert deploy(served.home, served.pair["retrieval"], served.pair["ranking"])
    served.assert_right()


KILLED_AFTER_THE_RANKER = """
import os, signal, sys
from pathlib import Path
from serving import swap

load = swap.load

def load_and_die(handle, model, timeout_s):
    load(handle, model, timeout_s)
    os.kill(os.getpid(), signal.SIGKILL)

swap.load = load_and_die
swap.deploy(*map(Path, sys.argv[1:]))
"""


@pytest.mark.faults
def test_a_deployment_that_is_killed_half_way_is_undone_by_the_supervisor(
    served: Served, other_pair: dict[str, Path]
) -> None:
    before = repository.current(served.home)
    arguments = (str(served.home), str(other_pair["retrieval"]), str(other_pair["ranking"]))
    died = subprocess.run([sys.executable, "-c", KILLED_AFTER_THE_RANKER, *arguments], timeout=300)
    assert died.returncode == -signal.SIGKILL
    assert repository.current(served.home) != before
    assert np.abs(served.scores() - served.expected).max() > 1e-3, "the new ranker should be serving now"
    with watched(served):
        wait_for(lambda: not (served.home / JOURNAL).exists())
    assert repository.current(served.home) == before
    served.assert_right()


@pytest.mark.faults
def test_a_model_that_somebody_took_away_is_loaded_again(served: Served) -> None:
    with served.handle.connect() as client:
        client.unload_model("gr_retriever", headers=served.handle.admin_headers)
    with watched(served):
        wait_for(lambda: acts(served.home)[0] == 1)
        assert health.read(served.home).reason == "not_loaded gr_retriever"
    served.assert_right()


@pytest.mark.faults
def test_a_pair_is_deployed_into_an_external_server_that_shares_the_folder(
    served: Served, other_pair: dict[str, Path]
) -> None:
    ours = served.handle
    stranger = replace(ours, external=True, pid=0, create_time=0.0, instance="external-test")
    storage.write_text(record_path(served.home), stranger.to_json())
    try:
        assert deploy(served.home, other_pair["retrieval"], other_pair["ranking"])
        scores = offline(other_pair["ranking"]).scores(HISTORY, CANDIDATES, after(HISTORY))
        np.testing.assert_allclose(served.scores(), scores, atol=1e-5 * scores.max())
        assert deploy(served.home, served.pair["retrieval"], served.pair["ranking"])
        served.assert_right()
        stranger.stop()
        assert ours.alive
    finally:
        storage.write_text(record_path(served.home), ours.to_json())


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def carrying(instance: str) -> list[psutil.Process]:
    return [
        p for p in psutil.process_iter(["cmdline"]) if any(instance in argument for argument in p.info["cmdline"] or ())
    ]


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state folder of which no process is left, whatever a test does."""
    yield tmp_path
    sweep(tmp_path)


@contextmanager
def gr_serve(state: Path, ports: list[int]) -> Iterator[subprocess.Popen[bytes]]:
    options = [f"--{name}-port={port}" for name, port in zip(("grpc", "http", "metrics"), ports, strict=True)]
    command = [sys.executable, "-m", "gr_platform.cli", "serve", *options]
    process = subprocess.Popen(command, env=os.environ | {"GR_HOME": str(state)}, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.faults
@pytest.mark.parametrize("when", ["while it serves", "while it starts"])
def test_what_a_killed_supervisor_leaves_is_cleaned_by_the_next_one(
    state: Path, pair: dict[str, Path], when: str
) -> None:
    repository.publish(state, pair["retrieval"], pair["ranking"])
    ports = free_ports(3)
    with gr_serve(state, ports) as killed:
        folders = (state / "serving").glob("backends-*")
        wait_for(lambda: list((state / "serving").glob("backends-*")))
        instance = next(folders).name.removeprefix("backends-")
        wait_for(lambda: carrying(instance) if when == "while it starts" else attach(state))
        killed.kill()
        killed.wait()
    assert carrying(instance) != []
    with gr_serve(state, ports) as again:
        wait_for(lambda: (now := attach(state)) is not None and now.instance != instance)
        assert carrying(instance) == []
        assert list(Path("/dev/shm").glob(f"{instance}*")) == []
        handle = attach(state)
        assert handle is not None
        with Client(handle.grpc_address, deadline_s=30) as client:
            assert client.score(HISTORY, CANDIDATES, request_time=after(HISTORY)).scores.shape == (6, 2)
        wait_for(lambda: health.read(state))
        again.send_signal(signal.SIGTERM)
        assert again.wait(timeout=60) == 0
    assert carrying(handle.instance) == []
    assert list((state / "serving").iterdir()) == []
    assert list(Path("/dev/shm").glob(f"{handle.instance}*")) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of its own of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "gr-test", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.faults
def test_a_full_disk_is_a_named_error_and_the_old_pair_serves_on_and_heals(
    small_disk: Path, pair: dict[str, Path], other_pair: dict[str, Path], offline_models: dict[str, Offline]
) -> None:
    state = small_disk / "home"
    repository.publish(state, pair["retrieval"], pair["ranking"])
    server = EmbeddedServer(state)
    server.start()
    expected = offline_models["ranking"].scores(HISTORY, CANDIDATES, after(HISTORY))
    full = Served(home=state, server=server, pair=pair, expected=expected)
    try:
        with watched(full):
            wait_for(lambda: health.read(state))
            before = repository.current(state)
            with suppress(OSError), (small_disk / "filler").open("wb") as filler:
                while True:
                    filler.write(bytes(1 << 16))
                    filler.flush()
            with pytest.raises(OSError, match="No space") as failed:
                deploy(state, other_pair["retrieval"], other_pair["ranking"])
            assert "disk of the state folder is full" in (sentence_for(failed.value) or "")
            assert repository.current(state) == before
            full.assert_right()
            (stub,) = full.handle.stubs("gr_ranker")
            stub.kill()
            full.wait_until_right(30.0)
            (small_disk / "filler").unlink()
            assert deploy(state, other_pair["retrieval"], other_pair["ranking"])
    finally:
        server.stop(grace_s=1.0)


IN_SMALL_SHARED_MEMORY = """
import json, sys, threading, time
from contextlib import suppress
from pathlib import Path

import numpy as np

from serving.client import Client, History, ServingError
from serving.server import EmbeddedServer
from serving.supervisor import Supervisor
from serving.watch import Policy

# More than a model's shared memory holds before it grows.
items, actions, times = np.load(sys.argv[2])
history = History(items=items, actions=actions, times=times)
filler = Path("/dev/shm/filler")
server = EmbeddedServer(Path(sys.argv[1]))
with server as handle:
    watching = Supervisor(handle, server, Policy(interval_s=0.2))
    thread = threading.Thread(target=watching.run)
    thread.start()
    answers = {"full": [], "free": []}
    for state in answers:
        if state == "full":
            with suppress(OSError), filler.open("wb", buffering=0) as stream:
                while True:
                    stream.write(bytes(1 << 12))
        else:
            filler.unlink()
        for _ in range(30):
            with Client(handle.grpc_address, deadline_s=10) as client:
                try:
                    scores = client.score(history, np.arange(1000, 1006), request_time=int(times[-1])).scores
                    answers[state].append(scores.tolist())
                except ServingError as error:
                    answers[state].append(f"{error.code}: {error}")
            if state == "free" and not isinstance(answers[state][-1], str):
                break
            time.sleep(0.2)
    watching.stop()
    thread.join()
print(json.dumps(answers))
"""


@pytest.mark.faults
def test_full_shared_memory_gives_a_named_error_never_a_wrong_score_and_heals(
    tmp_path: Path, pair: dict[str, Path], offline_models: dict[str, Offline]
) -> None:
    small = "mount -t tmpfs -o size=24m gr-test /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", small], capture_output=True).returncode:
        pytest.skip("only root may give a process a /dev/shm of its own")
    repository.publish(tmp_path, pair["retrieval"], pair["ranking"])
    (tmp_path / "script.py").write_text(IN_SMALL_SHARED_MEMORY)
    np.save(tmp_path / "history.npy", np.stack([LONG.items, LONG.actions, LONG.times]))
    script = f'{small} && exec "$0" "$@"'
    python = (sys.executable, str(tmp_path / "script.py"), str(tmp_path), str(tmp_path / "history.npy"))
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, *python],
        env=os.environ | {"PYTHONPATH": str(settings.PROJECT_ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    expected = offline_models["ranking"].scores(LONG, CANDIDATES, int(LONG.times[-1]))
    refused = [answer for answer in answers["full"] if isinstance(answer, str)]
    for scores in answers["full"] + answers["free"]:
        if not isinstance(scores, str):
            # All scores are tiny here, and a probability is rounded as one near 1 is.
            np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert refused, "the shared memory was not full enough to tell"
    assert {answer.split(":")[0] for answer in refused} <= {"INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED"}
    assert not [answer for answer in refused if "/" in answer], "a path reached a caller"
    assert not isinstance(answers["free"][-1], str), answers["free"][-1]


@pytest.mark.faults
def test_an_unchanged_repository_is_not_loaded_twice(served: Served) -> None:
    load(served.handle, "gr_ranker", 60)
    served.scores()
    with Client(served.handle.grpc_address) as client:
        before = client.score(HISTORY, CANDIDATES, request_time=after(HISTORY)).cached_tokens
        load(served.handle, "gr_ranker", 60)
        assert client.score(HISTORY, CANDIDATES, request_time=after(HISTORY)).cached_tokens == before > 0

"""The model server comes up, changes its models, says why it does not, and leaves nothing behind."""

import errno
import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr_platform import serving_state
from gr_platform.errors import UserError
from serving import repository
from serving import server as server_module
from serving.client import Client, ServingError
from serving.engine.requests import History
from serving.handle import ServerHandle, attach, last_useful_line, record_path
from serving.server import EmbeddedServer, Ports
from serving.swap import deploy, in_swap_order, load
from tests.serving.callers import wait_for
from tests.serving.conftest import after, user

pytestmark = pytest.mark.e2e


def with_text_ids(folder: Path, facts: dict) -> None:
    table = pq.read_table(folder / "vocabulary.parquet")
    ids = pa.array([f"item-{i}" for i in table["item_id"].to_pylist()])
    pq.write_table(table.set_column(table.column_names.index("item_id"), "item_id", ids), folder / "vocabulary.parquet")
    facts["declaration"] = facts["declaration"] | {"item_id_type": "string", "exclude_seen": "all"}


def with_broken_weights(folder: Path, facts: dict) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights")


def as_text(history: History) -> History:
    return History(
        items=np.array([f"item-{i}" for i in history.items], object), actions=history.actions, times=history.times
    )


def remains(handle: ServerHandle) -> list[str]:
    processes = [
        p.info["name"]
        for p in psutil.process_iter(["name", "cmdline"])
        if any(handle.instance in argument for argument in p.info["cmdline"] or ())
    ]
    files = [str(f) for f in Path("/dev/shm").glob(f"{handle.instance}*")]
    return processes + files + [str(f) for f in (handle.home / "serving").glob("*")]


def test_new_models_replace_the_old_under_load_and_a_broken_one_does_not(server, client, home, pair, rewritten):
    history, request_time = user(1, 30), after(user(1, 30))
    asked_at = time.time()
    expected = client.score(history, [1000, 1001], request_time=request_time).scores
    kept = serving_state.recent_folder(home) / "gr_ranker.safetensors"
    wait_for(lambda: kept.exists() and kept.stat().st_mtime > asked_at, 30)
    text = {kind: rewritten(folder, with_text_ids) for kind, folder in pair.items()}
    codes = []

    def keep_asking() -> None:
        # Three models load on the same cores meanwhile, so an answer may take its time.
        with Client(server.grpc_address, deadline_s=120) as other:
            other.metadata()
            while not codes:
                try:
                    other.score(user(2, 10), [1000], request_time=after(user(2, 10)))
                except ServingError as error:
                    codes.append(error.code)

    try:
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(keep_asking)
            assert deploy(home, text["retrieval"], text["ranking"])
            # An integer id is of the wrong type from the moment of the swap, and until then every request is answered.
            asking.result(timeout=300)
        assert codes == ["INVALID_ARGUMENT"]
        with Client(server.grpc_address) as swapped:
            assert swapped.metadata().item_id_type == "string"
            answer = swapped.score(as_text(history), ["item-1000", "item-1001"], request_time=request_time)
            # The old model wrote down what it was asked for, and the new one encoded it ahead.
            assert answer.cached_tokens == 1 + 2 * 30
            np.testing.assert_allclose(answer.scores, expected, rtol=1e-5)
            for bad in (1, "\ud800"):
                with pytest.raises(ServingError, match="item ids must be text"):
                    swapped.score(as_text(history), ["item-1000", bad], request_time=request_time)
            with pytest.raises(ServingError, match=r"CANDIDATES\[0\] has 2000 bytes"):
                swapped.score(as_text(history), ["x" * 2000], request_time=request_time)
            found = swapped.recommend(as_text(history), k=500, request_time=request_time, exclude=["item-1003"])
            assert not {*as_text(history).items, "item-1003"} & set(found.items)
            assert len(swapped.retrieve(as_text(user(1, 0)), k=3, request_time=1).items) == 3

            broken = rewritten(text["ranking"], with_broken_weights)
            with pytest.raises(UserError, match=r"did not load gr_ranker: .*what served before goes on") as failed:
                deploy(home, text["retrieval"], broken)
            assert str(home) not in str(failed.value)
            again = swapped.score(as_text(history), ["item-1000", "item-1001"], request_time=request_time)
            np.testing.assert_allclose(again.scores, expected, rtol=1e-5)
    finally:
        deploy(home, pair["retrieval"], pair["ranking"])
    back = client.score(history, [1000, 1001], request_time=request_time)
    np.testing.assert_allclose(back.scores, expected, rtol=1e-5)


def test_a_running_server_is_found_and_a_second_one_refused(server, client, home):
    record = record_path(home)
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    assert attach(home) == server
    client.score(user(3, 20), [1000], request_time=after(user(3, 20)))
    for model in in_swap_order(repository.MODELS):
        load(server, model, 60)
    again = client.score(user(3, 20), [1000], request_time=after(user(3, 20)))
    assert again.cached_tokens == 41, "an unchanged model was loaded again and lost its cache"
    with pytest.raises(UserError, match="runs already"):
        EmbeddedServer(home).start()


def test_of_two_starts_at_once_one_is_refused_and_none_is_lost(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        starts = [pool.submit(EmbeddedServer(tmp_path).start) for _ in range(2)]
        errors = [start.exception() for start in starts]
    refused = [str(error) for error in errors if error is not None]
    assert len(refused) == 1
    assert re.search("works on the model-server|runs already", refused[0])
    handle = attach(tmp_path)
    assert handle is not None
    handle.stop()
    assert remains(handle) == []


def test_a_server_that_cannot_be_recorded_is_stopped_again(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(server_module.storage, "write_text", full)
    starting, spawned = EmbeddedServer(tmp_path), []
    monkeypatch.setattr(
        ServerHandle,
        "with_process",
        lambda self, pid, of=ServerHandle.with_process: spawned.append(of(self, pid)) or spawned[0],
    )
    with pytest.raises(OSError, match="No space left"):
        starting.start()
    assert not spawned[0].alive
    assert remains(spawned[0]) == []


def test_a_port_in_use_is_one_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is in use"):
            EmbeddedServer(tmp_path, ports=Ports(http=port)).start()
    assert attach(tmp_path) is None


def test_a_missing_environment_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="missing; run make setup"):
        EmbeddedServer(tmp_path, python=tmp_path / "venv" / "bin" / "python").start()


def test_models_that_do_not_load_end_the_start_with_the_reason_and_no_remains(tmp_path, pair, rewritten):
    repository.publish(tmp_path, pair["retrieval"], rewritten(pair["ranking"], with_broken_weights))
    starting = EmbeddedServer(tmp_path)
    with pytest.raises(UserError, match=r"the model server exited with status 1: .*see \$GR_HOME/logs") as failed:
        starting.start()
    assert "\n" not in str(failed.value)
    assert str(tmp_path) not in str(failed.value)
    assert attach(tmp_path) is None
    assert list((tmp_path / "serving").iterdir()) == []


def test_it_starts_without_models_takes_a_pair_and_stops_clean_from_another_process(tmp_path, pair):
    handle = EmbeddedServer(tmp_path).start()
    with Client(handle.grpc_address) as early, pytest.raises(ServingError, match="no model"):
        early.metadata()
    assert deploy(tmp_path, pair["retrieval"], pair["ranking"])
    with Client(handle.grpc_address) as client:
        assert len(client.recommend(user(1, 5), k=4, request_time=after(user(1, 5))).items) == 4
        assert remains(handle)
        code = (
            "import sys; from pathlib import Path; from serving.handle import attach; attach(Path(sys.argv[1])).stop()"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=300)
        assert remains(handle) == []
        assert not handle.alive
        with pytest.raises(ServingError, match="no model server answers"):
            client.score(user(1, 5), [1000], request_time=after(user(1, 5)))
    os.waitpid(handle.pid, 0)


def test_a_killed_server_is_recognised_and_swept_by_the_next_start(tmp_path, pair):
    repository.publish(tmp_path, pair["retrieval"], pair["ranking"])
    killed = EmbeddedServer(tmp_path).start()
    os.kill(killed.pid, 9)
    os.waitpid(killed.pid, 0)
    assert attach(tmp_path) is None
    with EmbeddedServer(tmp_path) as handle:
        assert attach(tmp_path) == handle
        assert [name for name in remains(killed) if killed.instance in name] == []
    assert remains(handle) == []
    assert remains(killed) == []


def test_a_pid_given_to_another_process_is_not_taken_for_the_server(tmp_path):
    handle = ServerHandle(
        home=tmp_path,
        pid=os.getpid(),
        create_time=1.0,
        instance="gr-none",
        grpc_address="127.0.0.1:1",
        http_address="127.0.0.1:2",
        metrics_address="127.0.0.1:3",
        admin_key="k",
        owner_pid=os.getpid(),
        owner_create_time=psutil.Process().create_time(),
    )
    record_path(tmp_path).parent.mkdir()
    record_path(tmp_path).write_text(handle.to_json())
    assert attach(tmp_path) is None
    handle.stop()
    assert not record_path(tmp_path).exists()
    record_path(tmp_path).write_text(json.dumps({"pid": 1}))
    with pytest.raises(UserError, match=r"server\.json is damaged"):
        attach(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "E1122 11:23 1 model_lifecycle.cc:642] \"failed to load 'gr_ranker' version 1: Internal: "
            'TritonModelException: score.onnx is corrupt\\n\\nAt:\\n  /a/b/model.py(3): initialize\\n"',
            "score.onnx is corrupt",
        ),
        (
            "load failed for model 'm': version 1 is at UNAVAILABLE state: Internal: RuntimeError: cannot open "
            "/home/x/y.onnx\n\nAt:\n  /a/model.py(3)",
            "cannot open y.onnx",
        ),
        (
            "load failed for model 'm': version 1 is at UNAVAILABLE state: Internal: UserError: "
            "$GR_HOME/model_repository/gr_ranker/1/bundle/model.safetensors is corrupt; run gr materialize",
            "$GR_HOME/model_repository/gr_ranker/1/bundle/model.safetensors is corrupt; run gr materialize",
        ),
        ("I1\nerror: creating server: Invalid argument - bad flag\n", "bad flag"),
        ("I1122 all is well", None),
    ],
)
def test_the_reason_in_a_log_is_one_line_without_paths(text, reason):
    found = last_useful_line(text)
    assert found == reason or (reason and found and reason in found)
    assert not re.search(r"(?<!\w)/", found or "")

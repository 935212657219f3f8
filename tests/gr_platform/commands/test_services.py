"""Starting and stopping the services beside the platform, with small stand-in programs."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gr_platform import processes, storage
from gr_platform.commands import services
from gr_platform.errors import UserError
from serving.handle import ServerHandle, record_path

SLEEPER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
time.sleep(60)
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((services.HOST, 0))
        return int(probe.getsockname()[1])


def _web(name: str, port: int) -> services.Service:
    return services.Service(
        name=name,
        command=(sys.executable, "-m", "http.server", str(port), "--bind", services.HOST),
        ports=(port,),
        address=f"http://{services.HOST}:{port}",
        ready_url=f"http://{services.HOST}:{port}/",
    )


def _program(name: str, code: str) -> services.Service:
    return services.Service(name=name, command=(sys.executable, "-c", code))


def test_up_waits_until_each_answers_and_down_stops_whole_trees(tmp_path: Path) -> None:
    started = services.up(tmp_path, [_web("web", _free_port()), _program("tree", SLEEPER)])
    assert services.answers(started[0].address)
    assert [s.name for s in services.running_services(tmp_path)] == ["web", "tree"]
    tree = psutil.Process(started[1].pid)
    deadline = time.monotonic() + 60
    while not tree.children() and time.monotonic() < deadline:
        time.sleep(0.05)
    child = tree.children()[0]
    assert services.down(tmp_path) == ["web", "tree"]
    assert not services.answers(started[0].address)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert services.down(tmp_path) == []


@pytest.mark.parametrize("text", [b"", b"{", b'[{"pid": 1}]', b"[1]", b"\xff"])
def test_a_damaged_record_is_one_sentence(tmp_path: Path, text: bytes) -> None:
    (tmp_path / services.RECORD).write_bytes(text)
    with pytest.raises(UserError, match=r"services\.json is damaged"):
        services.down(tmp_path)


def test_up_again_leaves_what_runs_alone(tmp_path: Path) -> None:
    web = _web("web", _free_port())
    try:
        first = services.up(tmp_path, [web])
        assert services.up(tmp_path, [web]) == first
    finally:
        services.down(tmp_path)


def test_one_port_for_two_services_is_refused_before_anything_starts(tmp_path: Path) -> None:
    port = _free_port()
    with pytest.raises(UserError, match=f"port {port} is named for two services"):
        services.up(tmp_path, [_web("one", port), _web("two", port)])
    assert not (tmp_path / services.RECORD).exists()


def test_a_service_that_runs_elsewhere_is_not_said_to_be_where_it_was_asked_for(tmp_path: Path) -> None:
    web = _web("web", _free_port())
    try:
        services.up(tmp_path, [web])
        with pytest.raises(UserError, match=f"web runs already at {web.address}; run gr down first"):
            services.up(tmp_path, [_web("web", _free_port())])
    finally:
        services.down(tmp_path)


def test_an_address_that_something_else_answers_does_not_make_a_dead_service_ready(tmp_path: Path) -> None:
    web = _web("web", _free_port())
    dying = services.Service(name="dying", command=(sys.executable, "-c", ""), ready_url=web.ready_url)
    try:
        services.up(tmp_path, [web])
        running = services._start(tmp_path, dying)
        processes.wait_gone([psutil.Process(running.pid)], 60)
        with pytest.raises(UserError, match="dying stopped before it answered"):
            services._wait_ready(running, dying, 5.0)
    finally:
        services.down(tmp_path)


def test_up_beside_another_up_is_refused_and_loses_nothing(tmp_path: Path) -> None:
    with storage.exclusive(tmp_path, "services"):
        code = "import sys; from pathlib import Path; from gr_platform.commands.services import up; "
        code += "up(Path(sys.argv[1]), [])"
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert "another program works on the services" in done.stderr


def test_a_model_server_that_lost_its_program_is_stopped_by_down_and_one_that_has_it_is_not(tmp_path: Path) -> None:
    tree = subprocess.Popen([sys.executable, "-c", SLEEPER])
    owner = subprocess.Popen([sys.executable, "-c", SLEEPER])
    handle = ServerHandle(
        home=tmp_path,
        pid=0,
        create_time=0.0,
        instance="gr-test-orphan",
        grpc_address="127.0.0.1:1",
        http_address="127.0.0.1:2",
        metrics_address="127.0.0.1:3",
        admin_key="k",
        owner_pid=owner.pid,
        owner_create_time=psutil.Process(owner.pid).create_time(),
    ).with_process(tree.pid)
    storage.write_text(record_path(tmp_path), handle.to_json())
    (tmp_path / "model_repository" / "gr_ranker").mkdir(parents=True)
    (tmp_path / "model_repository" / "gr_ranker" / "config.pbtxt").write_text("")
    try:
        assert services.down(tmp_path) == []
        assert services.foreign_server(tmp_path) == handle
        wanted = services.platform_services(tmp_path, tmp_path, services.Ports())
        assert services.MODEL_SERVER not in [service.name for service in wanted]
        processes.kill([*psutil.Process(owner.pid).children(), psutil.Process(owner.pid)])
        assert services.down(tmp_path) == [services.MODEL_SERVER]
        assert not handle.alive
        assert not record_path(tmp_path).exists()
    finally:
        for process in (tree, owner):
            process.kill()
            process.wait()


def test_a_port_in_use_is_one_sentence_and_starts_nothing(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind((services.HOST, 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        with pytest.raises(UserError, match=f"port {port} is in use, web needs it"):
            services.up(tmp_path, [_program("tree", SLEEPER), _web("web", port)])
    assert services.running_services(tmp_path) == []
    assert not (tmp_path / services.RECORD).exists()


def test_a_service_that_dies_takes_the_others_started_with_it_down(tmp_path: Path) -> None:
    web = _web("web", _free_port())
    failing = services.Service(
        name="broken", command=(sys.executable, "-c", "raise SystemExit(3)"), ready_url="http://127.0.0.1:9/"
    )
    with pytest.raises(UserError, match=r"broken stopped before it answered; see .*broken\.log"):
        services.up(tmp_path, [web, failing])
    assert services.running_services(tmp_path) == []
    assert not services.answers(web.address)


def test_a_service_that_never_answers_is_given_up(tmp_path: Path) -> None:
    silent = services.Service(
        name="silent", command=(sys.executable, "-c", SLEEPER), ready_url=f"http://127.0.0.1:{_free_port()}/"
    )
    with pytest.raises(UserError, match="silent gave no answer in 1 s"):
        services.up(tmp_path, [silent], timeout_s=1.0)
    assert services.running_services(tmp_path) == []


def test_down_never_touches_a_process_that_only_has_the_pid(tmp_path: Path) -> None:
    stranger = {"name": "web", "pid": os.getpid(), "create_time": psutil.Process().create_time() - 100, "address": ""}
    (tmp_path / services.RECORD).write_text(json.dumps([stranger]))
    assert services.down(tmp_path) == []
    assert psutil.Process().is_running()


def test_every_address_is_loopback_and_the_model_server_needs_a_deployed_pair(tmp_path: Path) -> None:
    ports = services.Ports()
    found = services.platform_services(tmp_path, tmp_path, ports)
    assert [s.name for s in found] == ["dagster-webserver", "dagster-daemon", "mlflow", "platform-metrics"]
    assert all(services.HOST in s.address for s in found if s.ports)
    (tmp_path / "model_repository" / "gr_ranker").mkdir(parents=True)
    (tmp_path / "model_repository" / "gr_ranker" / "config.pbtxt").write_text("")
    assert services.platform_services(tmp_path, tmp_path, ports)[-1].name == "model-server"

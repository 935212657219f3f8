"""The supervisor's own decisions, with stand-ins for the server; and a real server that it only watches."""

import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from gr_platform import storage
from gr_platform.commands import status
from gr_platform.errors import UserError
from serving import canary, health, repository, swap
from serving.canary import Check, Outcome
from serving.external import ExternalServer
from serving.handle import ServerHandle, attach, record_path
from serving.health import Health, ModelHealth
from serving.server import LOCK, Ports
from serving.supervisor import Supervisor
from serving.swap import deploy
from serving.watch import Policy

QUICK = Policy(max_restarts=5, backoff_s=0.001, max_backoff_s=0.002, interval_s=0.01, stalled_s=0.0)


def a_handle(home: Path, **changes: object) -> ServerHandle:
    """A handle of a process that lives (this one) and of a port where nothing listens."""
    return replace(
        ServerHandle(
            home=home,
            pid=os.getpid(),
            create_time=psutil.Process().create_time(),
            instance="gr-none",
            grpc_address="127.0.0.1:9",
            http_address="127.0.0.1:9",
            metrics_address="127.0.0.1:9",
            admin_key="k",
            owner_pid=os.getpid(),
            owner_create_time=psutil.Process().create_time(),
        ),
        **changes,
    )


class StandIn:
    """What restarts: `outcomes` are the errors that restarts end with, None for one that works."""

    def __init__(self, home: Path, outcomes: list[Exception | None]) -> None:
        self.home, self.outcomes, self.num_restarts = home, iter(outcomes), 0

    def stop(self, grace_s: float) -> None:
        pass

    def exit_status(self) -> int:
        return -9

    def restart(self) -> ServerHandle:
        self.num_restarts += 1
        if error := next(self.outcomes):
            raise error
        return a_handle(self.home)


def dead(home: Path) -> ServerHandle:
    return a_handle(home, create_time=1.0)


def test_a_server_that_does_not_stay_up_is_given_up_with_the_last_reason(tmp_path: Path) -> None:
    server = StandIn(tmp_path, [UserError("a model is damaged")] * 99)
    with pytest.raises(UserError, match=r"restarted 5 times in 10 minutes .* a model is damaged; see \$GR_HOME"):
        Supervisor(dead(tmp_path), server, QUICK).run()
    assert server.num_restarts == 5
    seen = health.read(tmp_path)
    assert seen is not None
    assert (seen.state, seen.num_restarts, seen.reason) == ("failed", 5, "a model is damaged")
    assert any("failed" in line and "a model is damaged" in line for line in status._health(tmp_path, is_running=False))


def test_a_restart_that_works_ends_the_trying_and_a_full_disk_is_one_reason_more(tmp_path: Path) -> None:
    server = StandIn(tmp_path, [UserError("port 1 is in use"), OSError(28, "No space left on device"), None])
    watching = Supervisor(dead(tmp_path), server, QUICK)
    watching.tick()
    assert server.num_restarts == 3
    assert "No space" not in health.read(tmp_path).reason
    assert "disk of the state folder is full" in health.read(tmp_path).reason


def test_the_pauses_between_restarts_double_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Policy(max_restarts=5, backoff_s=0.5, max_backoff_s=1.5)
    watching = Supervisor(dead(tmp_path), StandIn(tmp_path, [UserError("no")] * 9), patience)
    pauses: list[float] = []
    monkeypatch.setattr(watching._stop, "wait", lambda pause_s: pauses.append(pause_s))
    with pytest.raises(UserError, match="given up"):
        watching.tick()
    assert pauses == [0.0, 0.5, 1.0, 1.5, 1.5]


def test_old_restarts_do_not_count(tmp_path: Path) -> None:
    watching = Supervisor(dead(tmp_path), StandIn(tmp_path, [None] * 20), replace(QUICK, window_s=0.05))
    for _ in range(8):
        watching.tick()
        watching._handle = dead(tmp_path)
        time.sleep(0.06)


def test_a_server_whose_process_lives_but_does_not_answer_is_restarted_in_time(tmp_path: Path) -> None:
    server = StandIn(tmp_path, [None])
    watching = Supervisor(a_handle(tmp_path), server, replace(QUICK, stalled_s=0.2, canary_s=0.05))
    watching.tick()
    assert server.num_restarts == 0
    assert health.read(tmp_path).state == "unreachable"
    time.sleep(0.25)
    watching.tick()
    assert (server.num_restarts, health.read(tmp_path).reason) == (1, "the server does not answer")


def test_a_look_that_was_missed_long_ago_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, live = StandIn(tmp_path, [None]), iter([False, True, False, False])
    monkeypatch.setattr(Supervisor, "_is_live", lambda self: next(live))
    monkeypatch.setattr(Supervisor, "_wanted", lambda self: {})
    watching = Supervisor(a_handle(tmp_path), server, replace(QUICK, stalled_s=0.1))
    for _ in range(3):
        watching.tick()
        time.sleep(0.06)
    assert server.num_restarts == 0
    time.sleep(0.06)
    watching.tick()
    assert server.num_restarts == 1


@pytest.fixture
def one_model(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A server with one model whose process is dead at every look: the models that were loaded again."""
    loaded: list[str] = []
    found = Check(model="gr_ranker", outcome=Outcome.DEAD, milliseconds=1.0, error="dead", parameters={})
    monkeypatch.setattr(Supervisor, "_is_live", lambda self: True)
    monkeypatch.setattr(Supervisor, "_wanted", lambda self: {"gr_ranker": None})
    monkeypatch.setattr(canary, "check", lambda client, model, deadline_s: found)
    monkeypatch.setattr(swap, "reload", lambda handle, model, timeout_s: loaded.append(model))
    return loaded


def test_a_damaged_or_missing_repository_ends_no_watch_over_what_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    answers = Check(model="gr_ranker", outcome=Outcome.ANSWERS, milliseconds=1.0, error="", parameters={})
    monkeypatch.setattr(Supervisor, "_is_live", lambda self: True)
    monkeypatch.setattr(swap, "known", lambda client: ["gr_ranker"])
    monkeypatch.setattr(canary, "check", lambda client, model, deadline_s: looked.append(model) or answers)
    config = tmp_path / "model_repositories" / "pair-1" / "gr_ranker" / "config.pbtxt"
    config.parent.mkdir(parents=True)
    config.write_text('name: "gr_ranker"\nparameters [ {')
    repository.point_to(tmp_path, config.parents[1])
    watching = Supervisor(a_handle(tmp_path), StandIn(tmp_path, []), QUICK)
    for _ in range(5):
        watching.tick()
    config.unlink()
    watching.tick()
    (tmp_path / repository.LINK).unlink()
    watching.tick()
    assert looked == ["gr_ranker"] * 7


def test_going_back_to_a_repository_that_is_gone_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap, "attach", lambda home: pytest.fail("the server was touched"))
    swap._roll_back(tmp_path, tmp_path / "model_repositories" / "pair-gone", ["gr_ranker"])
    storage.write_text(tmp_path / swap.JOURNAL, '{"previous": "model_repositories/pair-gone"}')
    assert swap.undo_interrupted(tmp_path)
    assert not (tmp_path / swap.JOURNAL).exists()


def test_a_dead_model_is_loaded_again_but_not_for_ever(tmp_path: Path, one_model: list[str]) -> None:
    server = StandIn(tmp_path, [None])
    watching = Supervisor(a_handle(tmp_path), server, QUICK)
    for _ in range(4):
        watching.tick()
    assert (one_model, server.num_restarts) == (["gr_ranker"] * 3, 1)
    assert "gr_ranker was loaded again 3 times, now stub_died" in health.read(tmp_path).reason


def test_a_challenger_that_dies_again_and_again_never_costs_the_server_a_restart(
    tmp_path: Path, one_model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Check(model=repository.SHADOW, outcome=Outcome.DEAD, milliseconds=1.0, error="dead", parameters={})
    monkeypatch.setattr(Supervisor, "_wanted", lambda self: {repository.SHADOW: None})
    monkeypatch.setattr(canary, "check", lambda client, model, deadline_s: found)
    server = StandIn(tmp_path, [])
    watching = Supervisor(a_handle(tmp_path), server, Policy())
    for _ in range(6):
        watching.tick()
    assert (one_model, server.num_restarts) == ([repository.SHADOW] * 3, 0)


def test_nothing_is_touched_while_a_deployment_is_under_way(tmp_path: Path, one_model: list[str]) -> None:
    watching = Supervisor(a_handle(tmp_path), StandIn(tmp_path, []), QUICK)
    with storage.exclusive(tmp_path, LOCK), ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(watching.tick).result(timeout=60)
    assert one_model == []
    watching.tick()
    assert one_model == ["gr_ranker"]


def test_a_reload_that_fails_restarts_our_own_server_and_leaves_an_external_one_alone(
    tmp_path: Path, one_model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("the model server did not load gr_ranker: it was not done in 120 s")

    monkeypatch.setattr(swap, "reload", refuse)
    server = StandIn(tmp_path, [None])
    Supervisor(a_handle(tmp_path), server, QUICK).tick()
    assert server.num_restarts == 1
    watching = Supervisor(a_handle(tmp_path, external=True), None, Policy())
    watching.tick()
    watching.tick()
    assert health.read(tmp_path).num_reloads == 1, "it was tried again without a pause"
    assert "did not load gr_ranker" in health.read(tmp_path).reason


def test_a_disk_that_is_full_does_not_end_the_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watching = Supervisor(a_handle(tmp_path), StandIn(tmp_path, []), QUICK)
    looks: list[int] = []

    def fail(self: Supervisor) -> None:
        looks.append(1)
        if len(looks) == 3:
            watching.stop()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Supervisor, "tick", fail)
    watching.run()
    assert len(looks) == 3


def test_status_shows_what_the_supervisor_sees_and_did(tmp_path: Path) -> None:
    now = time.time()
    models = {
        "gr_ranker": ModelHealth(outcome="answers", answered_at=now, milliseconds=2.5),
        "gr_retriever": ModelHealth(outcome="dead", answered_at=now - 240, milliseconds=1.0, error="gone"),
    }
    seen = Health(
        state="degraded", checked_at=now, models=models, num_reloads=1, reason="stub_died gr_retriever", acted_at=now
    )
    health.write(tmp_path, seen)
    assert health.read(tmp_path) == seen
    lines = "\n".join(status._health(tmp_path, is_running=True))
    assert re.search(
        r"degraded, looked at \d seconds ago; models loaded again: 1, restarts: 0, .*stub_died gr_ret", lines
    )
    assert "gr_ranker  answers in 2.5 ms" in lines
    assert "gr_retriever  dead, answered 4 minutes ago" in lines
    health.write(tmp_path, replace(seen, checked_at=now - 600))
    assert "nobody has looked for 10 minutes" in next(status._health(tmp_path, is_running=True))
    assert list(status._health(tmp_path, is_running=False)) == []


@pytest.mark.parametrize("text", ["", "[]", '{"models": 3}', '{"models": {"m": {"x": 1}}}', '{"state": "serving"}'])
def test_a_health_file_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    storage.write_text(tmp_path / health.FILE, text)
    assert health.read(tmp_path) is None
    assert health.read(tmp_path / "nowhere") is None


@pytest.mark.parametrize("address", ["8001", ":8001", "host:", "host:x", "host:0", "host:65536"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(UserError, match="must be HOST:PORT"):
        ExternalServer(tmp_path, address, Ports(), "k")


def test_a_server_that_is_not_there_cannot_be_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.external._TIMEOUT_S", 0.2)
    with pytest.raises(UserError, match=r"no model server answers at 127\.0\.0\.1:9"):
        ExternalServer(tmp_path, "127.0.0.1:9", Ports(), "k").__enter__()
    assert not record_path(tmp_path).exists()


@contextmanager
def watching_from(elsewhere: Path, server: ServerHandle, key: str) -> Iterator[ServerHandle]:
    """Another state folder from which the server is watched."""
    http, metrics = (int(each.split(":")[1]) for each in (server.http_address, server.metrics_address))
    with ExternalServer(elsewhere, server.grpc_address, Ports(http=http, metrics=metrics), key) as handle:
        yield handle


@pytest.mark.e2e
def test_an_external_server_is_on_record_while_it_is_watched_and_its_dead_model_is_loaded_again(
    server: ServerHandle, home: Path, tmp_path: Path
) -> None:
    (tmp_path / repository.LINK).symlink_to(home / repository.LINK)
    with pytest.raises(UserError, match="refuses the admin key; set GR_SERVER_ADMIN_KEY"):
        with watching_from(tmp_path, server, "wrong"):
            pass
    with watching_from(tmp_path, server, server.admin_key) as handle:
        assert attach(tmp_path) == handle
        watching = Supervisor(handle, None, replace(Policy(), canary_s=5.0))
        watching.tick()
        assert health.read(tmp_path).state == "serving", health.read(tmp_path)
        for stub in server.stubs("gr_retriever"):
            stub.kill()
        watching.tick()
        assert health.read(tmp_path).reason == "stub_died gr_retriever"
        watching.tick()
        assert health.read(tmp_path).state == "serving", health.read(tmp_path)
        assert handle.stubs("gr_retriever") == set(), "processes of another server are no business of this folder"
    assert server.alive
    assert attach(tmp_path) is None
    assert not record_path(tmp_path).exists()


@pytest.mark.e2e
def test_a_server_that_does_not_share_the_folder_is_found_out_and_nothing_changes(
    server: ServerHandle, home: Path, tmp_path: Path, pair: dict[str, Path]
) -> None:
    repository.publish(tmp_path, pair["retrieval"], pair["ranking"])
    with watching_from(tmp_path, server, server.admin_key) as handle:
        other = repository.ServingOptions(cache_bytes=64 << 20)
        with pytest.raises(UserError, match="goes on serving another gr_ranker than the one that was loaded"):
            deploy(tmp_path, pair["retrieval"], pair["ranking"], other)
        with handle.connect() as client:
            for model in repository.MODELS:
                assert swap.serves(client, home / repository.LINK, model)

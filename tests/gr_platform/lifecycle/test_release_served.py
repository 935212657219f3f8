"""Promotions and rollbacks on a real model server that answers a load all the while, and on one that is gone."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gr_platform.bundle.load import load
from gr_platform.errors import UserError
from gr_platform.lifecycle import measures, release
from gr_platform.lifecycle.folders import bundle_of
from gr_platform.registry import card_facts, promotion, versions
from gr_platform.registry.promotion import Pair
from gr_platform.replay.answers import staleness
from gr_platform.replay.load import Served, StreamLoad
from gr_platform.replay.stream import StreamOptions, simulated
from gr_platform.replay.traffic import figures
from serving import swap
from serving.client import Client
from serving.handle import ServerHandle, attach
from serving.server import EmbeddedServer
from tests.gr_platform.lifecycle.spoiling import DS, pair_of, spoiled

pytestmark = pytest.mark.e2e


@dataclass(frozen=True)
class Serving:
    """A platform with its server."""

    home: Path
    server: EmbeddedServer
    handle: ServerHandle


@pytest.fixture(scope="module")
def serving(replayed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    home = tmp_path_factory.mktemp("released") / "home"
    shutil.copytree(replayed / "home", home, symlinks=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measures, "NUM_TURNS", 1)
        patched.setattr(card_facts, "try_record", lambda *_, **__: None)
        server = EmbeddedServer(home)
        yield Serving(home, server, server.start())
        server.stop(grace_s=3.0)


def _bundles(home: Path, pair: Pair) -> Served:
    folders = {kind: bundle_of(home, DS, kind, version) for kind, version in pair.items()}
    return Served(retrieval=folders["retrieval"], ranking=folders["ranking"])


def _answering(handle: ServerHandle, home: Path) -> str:
    """Return the version whose models answer."""
    with Client(handle.grpc_address, deadline_s=30) as client:
        digests = client.metadata().model_digests
    for number in ("1", "2", "3"):
        pair = _bundles(home, pair_of(home, number))
        if digests["gr_ranker"] == load(pair.ranking).digest and digests["gr_retriever"] == load(pair.retrieval).digest:
            return number
    raise AssertionError("the server answers with no registered pair")


def _champion(home: Path) -> set[str]:
    return {version.version for version in promotion.champions(home, DS).values()}


def test_a_rollback_under_load_fails_no_request_and_the_scores_of_before_come_back(
    serving: Serving, tmp_path: Path
) -> None:
    home, address = serving.home, serving.handle.grpc_address
    stream = simulated(tmp_path / "stream", StreamOptions(days=2, num_events=4_000))
    now, before = (_bundles(home, pair_of(home, number)) for number in ("2", "1"))
    assert _answering(serving.handle, home) == "2"
    with StreamLoad(tmp_path / "load", stream, now, grpc_address=address, rate=20) as running:
        time.sleep(3.0)
        with running.swap(before):
            done = release.rollback(home, DS)
        assert (done.outcome, done.server_loaded) == ("rolled back", True)
        assert _answering(serving.handle, home) == "1"
        time.sleep(3.0)
        with running.swap(now):
            release.rollback(home, DS)
        time.sleep(2.0)
        told = running.end()
    assert _answering(serving.handle, home) == "2"
    assert _champion(home) == {"2"}
    assert all(each.ended - each.began < 10 for each in told.swaps)
    total, found = figures(told)["total"], staleness(told)
    assert total["answered"] == total["requests"] > 50
    assert (found.num_stale, found.num_of_no_model) == (0, 0)
    assert found.num_probes - found.num_undecided > 10


def test_a_pair_that_the_server_does_not_vouch_for_is_never_champion(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = serving.home
    # Somebody whom no gate stops: what is served then is not what the bundle promises.
    monkeypatch.setattr(release, "_broken", lambda _: False)
    sound = pair_of(home, "3")
    broken = spoiled(home, {"retrieval": sound["retrieval"]}, "broken", bundle=_other_vectors)
    versions.move_alias(home, broken["retrieval"], versions.CHALLENGER)
    with pytest.raises(UserError, match="gr_retriever"):
        release.release(home, DS, force=True)
    versions.move_alias(home, sound["retrieval"], versions.CHALLENGER)
    assert _champion(home) == {"2"}
    assert _answering(serving.handle, home) == "2"


def test_a_server_that_dies_in_a_deployment_comes_back_with_the_pair_before(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, real = serving.home, swap.load
    calls = []

    def dying(handle: ServerHandle, model: str, timeout_s: float) -> None:
        if not calls:
            os.kill(handle.pid, signal.SIGKILL)
        calls.append(model)
        real(handle, model, timeout_s)

    with monkeypatch.context() as patched:
        patched.setattr(swap, "load", dying)
        with pytest.raises(UserError):
            release.release(home, DS, force=True)
    assert calls
    assert _champion(home) == {"2"}
    # As the watcher of gr serve does.
    handle = serving.server.restart()
    assert _answering(handle, home) == "2"
    assert release.release(home, DS).outcome == "refused"


def test_what_is_promoted_while_no_server_runs_serves_when_one_starts(serving: Serving) -> None:
    home = serving.home
    serving.server.stop(grace_s=3.0)
    assert attach(home) is None
    done = release.release(home, DS, force=True)
    assert (done.outcome, done.server_loaded) == ("promoted", False)
    assert _champion(home) == {"3"}
    handle = serving.server.start()
    assert _answering(handle, home) == "3"


def _other_vectors(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    vectors = load_file(folder / "item_vectors.safetensors")["item_vectors"]
    save_file({"item_vectors": -vectors}, folder / "item_vectors.safetensors")

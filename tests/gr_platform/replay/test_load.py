"""The load is a process that sends by its schedule, obeys through its pipe, and leaves nothing behind."""

import time

import grpc
import numpy as np
import psutil
import pytest

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.replay.answers import staleness
from gr_platform.replay.load import Served, StreamLoad
from gr_platform.replay.stream import StreamOptions, simulated
from gr_platform.replay.traffic import figures
from serving.bench.generator import FAILED, KINDS, OK, REJECTED
from tests.serving.scripted_endpoint import Endpoint, serving

ACTIONS = ["view", "like", "purchase"]


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    return simulated(tmp_path_factory.mktemp("stream") / "s", StreamOptions(days=2, num_events=4_000))


@pytest.fixture
def served(tmp_path):
    for kind in ("retrieval", "ranking"):
        (tmp_path / kind).mkdir()
        facts = {"config": {"max_events": 40, "chunk": 8}, "declaration": {"actions": ACTIONS}}
        storage.write_manifest(tmp_path / kind, kind=kind, spec={}, facts=facts)
    return Served(retrieval=tmp_path / "retrieval", ranking=tmp_path / "ranking")


def test_requests_of_every_kind_are_sent_until_the_end_and_their_ends_told_apart(stream, served, tmp_path):
    endpoint = Endpoint()
    endpoint.failures = [(grpc.StatusCode.UNAVAILABLE, "full"), (grpc.StatusCode.INTERNAL, "")]
    with (
        serving(endpoint) as address,
        StreamLoad(tmp_path / "load", stream, served, grpc_address=address, rate=60) as load,
    ):
        time.sleep(1.0)
        load.live(2)
        time.sleep(1.0)
        told = load.end()
    records = told.records
    assert 60 < len(records) < 260
    assert np.bincount(records["outcome"], minlength=4)[[OK, REJECTED, FAILED]].tolist() == [len(records) - 2, 1, 1]
    assert {KINDS[kind] for kind in records["kind"]} == {"score", "recommend", "retrieve"}
    assert len(told.notes) == len(records) - 2
    assert {note["day"] for note in told.notes} == {1, 2}
    assert {note["probe"] for note in told.notes if note["probe"] >= 0} <= set(range(len(told.probes)))
    assert any("hit" in note for note in told.notes)
    found = figures(told)
    assert [day["day"] for day in found["days"]] == [1, 2]
    assert (found["total"]["rejected"], found["total"]["failed"]) == (1, 1)


def test_the_load_ends_with_its_context(stream, served, tmp_path):
    with serving(Endpoint()) as address:
        with StreamLoad(tmp_path / "load", stream, served, grpc_address=address) as load:
            child = psutil.Process(load._process.pid)
            assert child.is_running()
        assert not child.is_running()


def test_a_load_that_cannot_begin_says_so(stream, served, tmp_path):
    with (
        pytest.raises(UserError, match="ended with an error"),
        StreamLoad(tmp_path / "load", stream, served, grpc_address="127.0.0.1:9", deadline_s=1.0),
    ):
        pass


@pytest.mark.e2e
def test_on_a_real_server_no_answer_of_a_swap_fails_or_is_stale_and_a_swap_that_never_was_is_found_out(tmp_path):
    from dataclasses import replace

    from gr_platform.models.recipes import tiny
    from gr_platform.replay.load import Swapped
    from serving.bench.stage import stage
    from serving.swap import deploy

    stream = simulated(tmp_path / "s", StreamOptions(days=2, num_events=4_000))
    with stage(tiny("ranking").model, num_threads=1, num_items=400) as started:
        pairs = [Served(retrieval=pair.retrieval, ranking=pair.ranking) for pair in started.pairs]
        address = started.handle.grpc_address
        with StreamLoad(tmp_path / "load", stream, pairs[0], grpc_address=address, rate=30) as load:
            time.sleep(1.5)
            with load.swap(pairs[1]):
                deploy(started.home, pairs[1].retrieval, pairs[1].ranking, started.options)
            time.sleep(2.5)
            told = load.end()
        found, total = staleness(told), figures(told)["total"]
        assert total["answered"] == total["requests"] > 50
        assert (found.num_stale, found.num_of_no_model, found.num_undecided) == (0, 0, 0)
        assert found.num_probes > 10
        ended = told.swaps[0].ended
        lie = Swapped(served=pairs[0], began=ended, ended=ended + 0.1)
        assert staleness(replace(told, swaps=[*told.swaps, lie])).num_stale > 0

"""Requests that break rules, lie, are huge, come too many or are given up: a right answer or a named error for each.

Meanwhile a caller like any other goes on getting right scores. The slow ones are marked `faults` and run by
`make test-faults`.
"""

import asyncio
import json
import socket
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.grpc import service_pb2, service_pb2_grpc

from serving import client_tensors, health, repository
from serving.client import CallOptions, Client, History, ServingError
from serving.client_asyncio import AsyncClient
from serving.engine.requests import MAX_CANDIDATES, MAX_EVENTS, MAX_EXCLUDE, MAX_K, MAX_TIME
from serving.handle import ServerHandle
from serving.options import ServingOptions
from serving.server import EmbeddedServer
from serving.supervisor import Supervisor
from serving.watch import Policy
from serving.wire import RANKER_INPUTS, RETRIEVER_INPUTS
from tests.serving.callers import (
    Caller,
    assert_right,
    caller,
    figures,
    post,
    resident,
    settled,
    shared_memory,
    wait_for,
)
from tests.serving.conftest import NUM_ITEMS, Offline, after, user

pytestmark = pytest.mark.e2e
KINDS = ("ranking", "retrieval")
ALL_ITEMS = np.arange(1000, 1000 + NUM_ITEMS)
SOME = ALL_ITEMS[::20]
EXTREME = np.array([-(1 << 63), (1 << 63) - 1, 0, -1, 999, 1000 + NUM_ITEMS])
# What more than the engine takes in time is refused with, whoever sends it.
OVERLOAD = ("UNAVAILABLE",)
MANY = np.random.default_rng(0).choice([*ALL_ITEMS, *EXTREME], MAX_CANDIDATES)


@pytest.fixture(scope="module")
def other(offline_models: dict[str, Offline]) -> Callable[[], Caller]:
    """A caller that meets no fault of its own."""
    expected = caller(offline_models["ranking"]).expected
    return lambda: Caller(expected=expected)


def of_length(num_events: int, seed: int = 90) -> History:
    """A history of any length: `user` over and over."""
    part = user(seed, 400)
    rounds = -(-num_events // 400) or 1
    span = int(part.times[-1] - part.times[0]) + 1000
    return History(
        items=np.tile(part.items, rounds)[:num_events],
        actions=np.tile(part.actions, rounds)[:num_events],
        times=(part.times[None] + span * np.arange(rounds)[:, None]).reshape(-1)[:num_events],
    )


def assert_as_offline(client: Client, models: dict[str, Offline], history: History, at: int | None = None) -> None:
    """Both models score the history, twice, as the offline models do."""
    request_time = after(history) if at is None else at
    expected = models["ranking"].scores(history, SOME, request_time)
    similar = models["retrieval"].scores(history, ALL_ITEMS, request_time)
    for _ in range(2):
        assert_right(client.score(history, SOME, request_time=request_time).scores, expected)
        found = client.retrieve(history, k=NUM_ITEMS, request_time=request_time)
        assert_right(found.scores[np.argsort(found.items)], similar)


def error_of(call: Callable[[], object]) -> ServingError:
    with pytest.raises(ServingError) as failed:
        call()
    assert "/" not in str(failed.value)
    return failed.value


# What a history may be.


@pytest.mark.parametrize("num_events", [0, 1, 40, 400, MAX_EVENTS])
def test_a_history_of_any_length_up_to_the_limit_is_scored_as_offline(client, offline_models, num_events):
    assert_as_offline(client, offline_models, of_length(num_events))


def test_a_history_beyond_the_limit_is_refused_by_name(client):
    history = of_length(MAX_EVENTS + 1)
    at = after(history)
    for call in (
        lambda: client.score(history, SOME, request_time=at),
        lambda: client.retrieve(history, k=3, request_time=at),
        lambda: client.recommend(history, k=3, request_time=at),
    ):
        error = error_of(call)
        assert error.code == "INVALID_ARGUMENT"
        assert "HISTORY_ITEMS holds 100001 entries, at most 100000 are allowed" in str(error)


@pytest.mark.parametrize("times", ["all equal", "equal pairs", "negative", "as far apart as can be"])
def test_legal_times_however_odd_are_scored_as_offline(client, offline_models, times):
    history = user(91, 30)
    odd = {
        "all equal": np.full(30, 1_600_000_000_000),
        "equal pairs": np.repeat(history.times[:15], 2),
        "negative": history.times - 2_000_000_000_000,
        "as far apart as can be": np.sort(np.random.default_rng(2).integers(-MAX_TIME, MAX_TIME, 30)),
    }[times]
    at = MAX_TIME if times.startswith("as far") else int(odd[-1])
    assert_as_offline(client, offline_models, replace(history, times=odd), at)


@pytest.mark.parametrize(
    ("changes", "at", "message"),
    [
        ({"times": [-(1 << 63), 5]}, 5, "HISTORY_TIMES[0] is -9223372036854775808, which is no time"),
        ({"times": [5, (1 << 63) - 1]}, 5, "HISTORY_TIMES[1] is 9223372036854775807, which is no time"),
        ({}, -(1 << 63), "REQUEST_TIME is -9223372036854775808, which is no time"),
        ({}, (1 << 63) - 1, "REQUEST_TIME is 9223372036854775807, which is no time"),
        ({"actions": [1, (1 << 63) - 1]}, 9, "HISTORY_ACTIONS[1] is 9223372036854775807, must be a bitmask"),
        ({"actions": [-(1 << 63), 1]}, 9, "HISTORY_ACTIONS[0] is -9223372036854775808, must be a bitmask"),
        ({"offset": (1 << 63) - 1}, 9, "HISTORY_OFFSET is 9223372036854775807, must be from 0"),
    ],
)
def test_numbers_at_the_end_of_their_range_are_refused_by_name(client, changes, at, message):
    events = {"items": np.array([1000, 1001]), "actions": np.array([1, 1]), "times": np.array([3, 4])}
    history = History(**(events | {name: np.array(v) if name != "offset" else v for name, v in changes.items()}))
    for call in (
        lambda: client.score(history, [1000], request_time=at),
        lambda: client.retrieve(history, k=3, request_time=at),
        lambda: client.recommend(history, k=3, request_time=at),
    ):
        error = error_of(call)
        assert error.code == "INVALID_ARGUMENT"
        assert message in str(error)


# What may be asked.


def test_ids_that_nobody_knows_are_scored_as_offline_and_the_largest_list_of_repeated_ones(client, offline_models):
    history = user(92, 30)
    history = replace(history, items=np.where(np.arange(30) % 2, history.items, np.resize(EXTREME, 30)))
    assert_as_offline(client, offline_models, history)
    distinct, where = np.unique(MANY, return_inverse=True)
    expected = offline_models["ranking"].scores(history, distinct, after(history))
    assert_right(client.score(history, MANY, request_time=after(history)).scores, expected[where])
    without = client.retrieve(history, k=NUM_ITEMS, request_time=after(history), exclude=[*EXTREME, *SOME])
    assert set(without.items) == set(ALL_ITEMS) - set(SOME)


@pytest.mark.parametrize("k", [-(1 << 31), -1, MAX_K + 1, (1 << 31) - 1])
def test_lists_of_other_lengths_than_are_made_cannot_be_asked_for(client, k):
    history = user(93, 5)
    for ask in (client.retrieve, client.recommend):
        error = error_of(lambda ask=ask: ask(history, k=k, request_time=after(history)))
        assert (error.code, f"K is {k}, must be from 1 to 10000" in str(error)) == ("INVALID_ARGUMENT", True)


def test_more_items_than_there_are_are_all_of_them(client, offline_models):
    history = user(93, 5)
    found = client.retrieve(history, k=MAX_K, request_time=after(history))
    similar = offline_models["retrieval"].scores(history, ALL_ITEMS, after(history))
    assert_right(found.scores[np.argsort(found.items)], similar)
    assert (np.diff(found.scores) <= 0).all()
    assert len(client.recommend(history, k=MAX_K, request_time=after(history)).items) == NUM_ITEMS


def test_as_many_items_as_the_limit_says_may_be_excluded_and_no_more(client):
    history = user(93, 5)
    unknown = np.arange(5_000, 5_000 + MAX_EXCLUDE)
    for ask in (client.retrieve, client.recommend):
        asked = {"k": 3, "request_time": after(history)}
        assert len(ask(history, exclude=unknown, **asked).items) == 3
        assert len(ask(history, exclude=[*unknown[NUM_ITEMS:], *ALL_ITEMS], **asked).items) == 0
        error = error_of(lambda ask=ask, asked=asked: ask(history, exclude=[*unknown, 1000], **asked))
        assert "EXCLUDE holds 100001 entries, at most 100000 are allowed" in str(error)


# What a message may be.


def message(model: str = "gr_ranker") -> service_pb2.ModelInferRequest:
    """A valid request as a message, to be broken."""
    made = service_pb2.ModelInferRequest(model_name=model)
    values = {"HISTORY_ACTIONS": 1, "HISTORY_OFFSET": 0, "K": 1}
    for name in RANKER_INPUTS if model == "gr_ranker" else RETRIEVER_INPUTS:
        kind = np.int32 if name == "K" else np.int64
        made.inputs.add(name=name, datatype=np.dtype(kind).name.upper(), shape=[1, 1])
        made.raw_input_contents.append(np.array([values.get(name, 1000)], kind).tobytes())
    return made


def shaped(*shape: int, content: bytes | None = None, at: int = 4) -> Callable[[service_pb2.ModelInferRequest], None]:
    def change(broken: service_pb2.ModelInferRequest) -> None:
        broken.inputs[at].shape[:] = shape
        if content is not None:
            broken.raw_input_contents[at] = content

    return change


def field(name: str, value: str) -> Callable[[service_pb2.ModelInferRequest], None]:
    return lambda broken: setattr(broken.inputs[4], name, value)


def parameter(name: str, **value: object) -> Callable[[service_pb2.ModelInferRequest], None]:
    def change(broken: service_pb2.ModelInferRequest) -> None:
        for kind, each in value.items():
            setattr(broken.parameters[name], kind, each)

    return change


def twice(broken: service_pb2.ModelInferRequest) -> None:
    broken.inputs.add().CopyFrom(broken.inputs[4])
    broken.raw_input_contents.append(np.array([1001]).tobytes())


def two_users(broken: service_pb2.ModelInferRequest) -> None:
    for at, content in enumerate(list(broken.raw_input_contents)):
        shaped(2, 1, content=2 * content, at=at)(broken)


BROKEN = {
    "two inputs of one name": twice,
    "no input": lambda broken: broken.ClearField("inputs"),
    "an input less": lambda broken: broken.inputs.pop(),
    "a content less": lambda broken: broken.raw_input_contents.pop(),
    "a byte less": shaped(1, 1, content=b"1234567"),
    "no byte": shaped(1, 1, content=b""),
    "a shape larger than its content": shaped(1, 2),
    "a shape smaller than its content": shaped(1, 0),
    "a shape below zero": shaped(1, -1),
    "a shape beyond all memory": shaped(1, 1 << 60),
    "a shape whose size is beyond int64": shaped(1, (1 << 63) - 1),
    "no shape": shaped(),
    "a rank less": shaped(1),
    "many ranks": shaped(*[1] * 500),
    "other users than the rest": shaped(2, 1, content=bytes(16)),
    "two users": two_users,
    "two values of one number": shaped(1, 2, content=bytes(16), at=3),
    "text instead of numbers": field("datatype", "BYTES"),
    "floats instead of numbers": field("datatype", "FP64"),
    "no type": field("datatype", ""),
    "an unknown type": field("datatype", "INT65"),
    "an unknown name": field("name", "CANDIDATE"),
    "no name": field("name", ""),
    "a version that is none": lambda broken: setattr(broken, "model_version", "-1"),
    "an output that is none": lambda broken: broken.outputs.add(name="SCORE") and None,
    "a priority that is no number": parameter("gr_priority", string_param="high"),
    "a priority that is a fraction": parameter("gr_priority", double_param=float("nan")),
    "a timeout that is no number": parameter("timeout", string_param="1 s"),
}


@pytest.fixture(scope="module")
def stub(server: ServerHandle) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    """The plain gRPC service, which sends anything."""
    with grpc.insecure_channel(server.grpc_address, options=[("grpc.max_send_message_length", -1)]) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_message_is_an_invalid_argument(stub, fault):
    for model in ("gr_ranker", "gr_retriever", "gr_recommender"):
        broken = message(model)
        assert stub.ModelInfer(broken, timeout=10).outputs
        BROKEN[fault](broken)
        with pytest.raises(grpc.RpcError) as failed:
            stub.ModelInfer(broken, timeout=10)
        assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT, failed.value.details()
        assert "/" not in failed.value.details()


@pytest.mark.parametrize("content", [b"\xff" * 100, message().SerializeToString()[:-3]], ids=["garbage", "cut"])
def test_bytes_that_are_no_message_are_refused(server, content):
    with grpc.insecure_channel(server.grpc_address) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer", lambda sent: sent, lambda got: got)
        with pytest.raises(grpc.RpcError, match="Unable to parse request"):
            call(content, timeout=10)


def as_json(**changes: object) -> bytes:
    """A valid request over HTTP, CANDIDATES changed."""
    values = {"HISTORY_ACTIONS": 1, "HISTORY_OFFSET": 0}
    inputs = [
        {"name": name, "shape": [1, 1], "datatype": "INT64", "data": [values.get(name, 1000)]} for name in RANKER_INPUTS
    ]
    inputs[4] |= changes
    return json.dumps({"inputs": inputs}).encode()


MALFORMED = {
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe",
    "no object": b"[]",
    "null": b"null",
    "no inputs": b"{}",
    "inputs that are no list": b'{"inputs": 5}',
    "inputs that are no objects": b'{"inputs": [5, null]}',
    "a name that is no text": as_json(name=5),
    "a fraction": as_json(data=[1000.5]),
    "text": as_json(data=["1000"]),
    "null as a number": as_json(data=[None]),
    "NaN": as_json(data=[float("nan")]),
    "beyond int64": as_json(data=[1 << 63]),
    "beyond a double": as_json(data=["@"]).replace(b'"@"', b"1e400"),
    "fewer than the shape says": as_json(shape=[1, 5]),
    "more than the shape says": as_json(data=[1, 2, 3]),
    "a shape below zero": as_json(shape=[1, -1]),
    "a shape that is no list": as_json(shape="1"),
    "no shape": as_json(shape=[]),
    "another type": as_json(datatype="FP32"),
    "two inputs of one name": as_json().replace(b"REQUEST_TIME", b"CANDIDATES"),
    "lists in lists": b"[" * 10_000,
    "a priority that is no number": as_json()[:-1] + b', "parameters": {"gr_priority": "high"}}',
    "another model": b"{}",
}


def test_malformed_json_gets_a_status_that_says_so_and_harms_nobody(server, other):
    assert post(server, as_json()) == (200, "")
    with other().asking(server):
        for fault, body in MALFORMED.items():
            path = "/v2/models/gr_other/infer" if fault == "another model" else "/v2/models/gr_ranker/infer"
            status, error = post(server, body, path)
            # This release answers 500 to what it cannot parse.
            assert status in (400, 404, 500), fault
            assert error, fault
            assert "/" not in error
            assert error != "internal error"
    assert post(server, as_json()) == (200, "")
    assert server.alive


def sent_to(address: str, content: bytes) -> None:
    """Send bytes to a port and let go of it."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection, suppress(OSError):
        connection.sendall(content)
        connection.settimeout(0.2)
        connection.recv(100)


@pytest.mark.parametrize(
    "content",
    [
        b"\x00" * 1000,
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 5000,
        b"POST /v2/models/gr_ranker/infer HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v2/models/gr_ranker/infer HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\nx",
        b"POST /v2/models/gr_ranker/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
    ids=["zeros", "HTTP 1", "frames", "length below zero", "length beyond all", "chunks"],
)
def test_who_speaks_another_protocol_harms_nobody(server, other, content):
    with other().asking(server):
        for address in (server.grpc_address, server.http_address, server.metrics_address):
            sent_to(address, content)
    assert server.is_ready(("gr_ranker",))


# Callers who are slow, gone, late or many.


def test_a_request_of_64_mib_is_refused_by_name_while_others_are_answered(server, stub, other):
    huge = message()
    shaped(1, 8_380_000, content=bytes(8 * 8_380_000))(huge)
    assert 63 << 20 < huge.ByteSize() < 64 << 20
    with other().asking(server):
        with pytest.raises(grpc.RpcError, match="CANDIDATES holds 8380000 entries") as failed:
            stub.ModelInfer(huge, timeout=60)
    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_the_engine_does_not_compute_for_callers_who_have_gone(server, other):
    before, history = settled(server), of_length(400, seed=94)

    async def run() -> list:
        async with AsyncClient(server.grpc_address, deadline_s=60) as client:
            calls = [
                asyncio.create_task(client.score(history, MANY, request_time=after(history) + number))
                for number in range(40)
            ]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            for call in calls:
                call.cancel()
            return await asyncio.gather(*calls, return_exceptions=True)

    with other().asking(server, may_fail=OVERLOAD):
        outcomes = asyncio.run(run())
    assert sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes) > 20
    now = settled(server)
    cancelled = now["gr_cancelled_total"] - before["gr_cancelled_total"]
    assert cancelled > 0
    assert now["gr_answers_total"] - before["gr_answers_total"] < (40 - cancelled / 2) * MAX_CANDIDATES


def test_a_deadline_shorter_than_the_work_ends_the_work_and_no_answer_is_wrong(server, client, other, offline_models):
    before, history = settled(server), of_length(400, seed=95)
    distinct, where = np.unique(MANY, return_inverse=True)
    expected = offline_models["ranking"].scores(history, distinct, after(history))[where]

    def ask(_: int) -> str:
        try:
            options = CallOptions(deadline_s=0.1)
            scores = client.score(history, MANY, request_time=after(history), options=options).scores
        except ServingError as error:
            return error.code
        assert_right(scores, expected)
        return "ok"

    client.metadata()
    with other().asking(server, may_fail=OVERLOAD), ThreadPoolExecutor(50) as pool:
        codes = list(pool.map(ask, range(100)))
    assert set(codes) <= {"ok", "DEADLINE_EXCEEDED", "CANCELLED", *OVERLOAD}
    assert codes.count("ok") < len(codes)
    now = settled(server)
    cancelled = now["gr_cancelled_total"] - before["gr_cancelled_total"]
    assert cancelled > 0
    assert now["gr_answers_total"] - before["gr_answers_total"] < (100 - cancelled / 2) * MAX_CANDIDATES


class Relay:
    """A connection to the server through which answers come as slowly as the caller wants to read them."""

    def __init__(self, address: str) -> None:
        self.reading, self._address = threading.Event(), address
        self.reading.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets = [self._listener]
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        self.reading.set()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _run(self) -> None:
        with suppress(OSError):
            caller, _ = self._listener.accept()
            upstream = socket.socket()
            # Little waits in between: what is not read is the server's to hold.
            upstream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            host, port = self._address.split(":")
            upstream.connect((host, int(port)))
            self._sockets += [caller, upstream]
            threading.Thread(target=self._pass, args=(caller, upstream, None), daemon=True).start()
            self._pass(upstream, caller, self.reading)

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket, gate: threading.Event | None) -> None:
        with suppress(OSError):
            while content := source.recv(4096):
                if gate is not None:
                    gate.wait()
                sink.sendall(content)


def test_callers_who_read_their_answers_seconds_later_hold_nobody(server, other, offline_models):
    history = of_length(400, seed=96)
    distinct, where = np.unique(MANY, return_inverse=True)
    expected = offline_models["ranking"].scores(history, distinct, after(history))[where]
    with ExitStack() as stack:
        relays = [Relay(server.grpc_address) for _ in range(16)]
        clients = [stack.enter_context(Client(relay.address, deadline_s=60)) for relay in relays]
        for relay, client in zip(relays, clients, strict=True):
            stack.callback(relay.close)
            client.metadata()
            relay.reading.clear()
        pool = stack.enter_context(ThreadPoolExecutor(len(clients)))
        before = figures(server)["gr_requests_total"]
        slow = [pool.submit(client.score, history, MANY, request_time=after(history)) for client in clients]
        wait_for(lambda: figures(server)["gr_requests_total"] >= before + len(clients))
        with other().asking(server) as asking:
            time.sleep(2.0)
        assert len(asking.waited) > 50
        assert max(asking.waited) < 1.0
        assert not any(answer.done() for answer in slow)
        for relay in relays:
            relay.reading.set()
        for answer in slow:
            assert_right(answer.result(timeout=60).scores, expected)


def test_two_hundred_connections_at_once_are_served_and_as_many_silent_ones_hold_nobody(server, other, offline_models):
    history = user(97, 25)
    expected = offline_models["ranking"].scores(history, SOME, after(history))
    call = client_tensors.score(history, SOME, after(history), id_type="int64")
    arguments = call.arguments(CallOptions(), 60.0)
    host, port = server.grpc_address.split(":")
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
        own = [("grpc.use_local_subchannel_pool", 1)]
        clients = [
            stack.enter_context(grpcclient.InferenceServerClient(server.grpc_address, channel_args=own))
            for _ in range(200)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(len(clients)))
        with other().asking(server) as asking:
            # By then the engine knows again that requests are short.
            wait_for(lambda: len(asking.waited) > 60)
            answers = list(pool.map(lambda each: call.answer(each.infer(**arguments)), clients))
        connections = psutil.Process(server.pid).net_connections("tcp")
        assert sum(each.laddr.port == int(port) and each.status == "ESTABLISHED" for each in connections) >= 400
    for answer in answers:
        assert_right(answer.scores, expected)


# Slow ones, on a server of their own.


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory, pair: dict[str, Path]) -> Iterator[ServerHandle]:
    """A server whose caches hold less than one history, and whose engines hold few requests."""
    home = tmp_path_factory.mktemp("cramped")
    options = ServingOptions(cache_bytes=10_000, max_batch_size=4, max_queue=8)
    repository.publish(home, pair["retrieval"], pair["ranking"], options)
    embedded = EmbeddedServer(home)
    yield embedded.start()
    embedded.stop(grace_s=3.0)


@pytest.mark.faults
def test_a_cache_smaller_than_one_user_serves_everyone_right(cramped, other, offline_models):
    lengths = (0, 1, 9, 40, 130)
    with Client(cramped.grpc_address, deadline_s=60) as client:
        for num_events in lengths:
            assert_as_offline(client, offline_models, user(100 + num_events, num_events))
    before = figures(cramped)
    # As many as the engine takes: nobody is refused, everybody waits for pages.
    with ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(other().asking(cramped))
        time.sleep(3.0)
    now = settled(cramped)
    assert now["gr_requests_total"] > before["gr_requests_total"] + 100
    one_history = 6 * (16 * (2 * 2 * 16 * 4 + 8) + 512)
    assert now["gr_cache_bytes"] <= 10_000 < one_history


@pytest.mark.faults
def test_more_than_the_engine_takes_are_refused_as_unavailable_and_the_rest_is_right(cramped, offline_models):
    history = user(98, 40)
    expected = offline_models["ranking"].scores(history, SOME, after(history))

    def ask(_: int) -> str:
        with Client(cramped.grpc_address, deadline_s=60, max_attempts=1) as client:
            try:
                scores = client.score(history, np.resize(SOME, 5000), request_time=after(history)).scores
            except ServingError as error:
                return f"{error.code} {'requests wait for this model already' in str(error)}"
        assert_right(scores, np.resize(expected, (5000, 2)))
        return "ok"

    with ThreadPoolExecutor(64) as pool:
        codes = list(pool.map(ask, range(256)))
    assert set(codes) == {"ok", "UNAVAILABLE True"}
    assert settled(cramped)["gr_rejected_total"] >= codes.count("UNAVAILABLE True")


@pytest.mark.faults
def test_huge_requests_take_no_more_memory_the_more_there_are(cramped, other, record_property):
    huge = message()
    shaped(1, 8_380_000, content=bytes(8 * 8_380_000))(huge)

    def send(_: int) -> str:
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(cramped.grpc_address, options=options) as channel:
            with pytest.raises(grpc.RpcError) as failed:
                service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(huge, timeout=120)
            return f"{failed.value.code().name} {failed.value.details()}"

    taken = []
    with ThreadPoolExecutor(4) as pool:
        for _ in range(6):
            with other().asking(cramped):
                codes = set(pool.map(send, range(12)))
            assert codes == {"INVALID_ARGUMENT CANDIDATES holds 8380000 entries, at most 10000 are allowed"}
            taken.append(resident(cramped) | {"shared memory": shared_memory(cramped)})
    megabytes = [{name: round(size / 1e6) for name, size in each.items()} for each in taken]
    record_property("megabytes", json.dumps(megabytes))
    print(*megabytes, sep="\n")
    # The server keeps room for as many as came at once, and a model's process nothing.
    assert max(each["shared memory"] for each in taken) < 5 * (64 << 20) + (16 << 20)
    assert max(each["server"] for each in taken) < 6 * (64 << 20)
    assert taken[-1]["gr_ranker"] < taken[0]["gr_ranker"] + (8 << 20)


@contextmanager
def supervised(home: Path, pair: dict[str, Path]) -> Iterator[ServerHandle]:
    """A server that is watched, as `gr serve` does."""
    repository.publish(home, pair["retrieval"], pair["ranking"])
    server = EmbeddedServer(home)
    handle = server.start()
    watching = Supervisor(handle, server, Policy(interval_s=0.2))
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(watching.run)
        try:
            yield handle
        finally:
            watching.stop()
            running.result(timeout=300)
            server.stop(grace_s=1.0)


def deadly_message(server: ServerHandle) -> None:
    """A shape whose size in bytes is a multiple of 2**64: the server believes it, and the model's process ends."""
    deadly = message()
    shaped(1, 1 << 61, content=b"")(deadly)
    with grpc.insecure_channel(server.grpc_address) as channel, pytest.raises(grpc.RpcError) as failed:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(deadly, timeout=30)
    assert failed.value.code() == grpc.StatusCode.INTERNAL
    assert "is not healthy" in failed.value.details()


def deadly_json(body: bytes) -> Callable[[ServerHandle], None]:
    def send(server: ServerHandle) -> None:
        with pytest.raises((ConnectionError, urllib.error.URLError)):
            post(server, body)

    return send


# What release 24.10 does not survive; later ones refuse it.
DEADLY = {
    "a shape over gRPC": deadly_message,
    "a shape over HTTP": deadly_json(as_json(shape=[1, 1 << 61])),
    "lists in lists": deadly_json(b"[" * 20_000_000),
}


@pytest.mark.faults
@pytest.mark.parametrize("fault", DEADLY)
def test_what_ends_a_process_of_this_release_is_healed_and_no_answer_is_wrong(tmp_path, pair, other, fault):
    with supervised(tmp_path, pair) as server:
        wait_for(lambda: health.read(tmp_path))
        # Not all errors of a dying server reach a caller as one and the same.
        with other().asking(server, may_fail=("INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED")) as asking:
            DEADLY[fault](server)
            failed = len(asking.failed)
            wait_for(lambda: len(asking.failed) > failed)
            wait_for(lambda: asking.succeeds(), 60.0)
        wait_for(lambda: health.read(tmp_path).state == "serving")
        seen = health.read(tmp_path)
        assert (seen.num_reloads > 0) == (fault == "a shape over gRPC")
        assert (seen.num_restarts > 0) == (fault != "a shape over gRPC")


@pytest.mark.faults
def test_json_as_large_as_a_message_may_be_is_refused_by_name(cramped, other):
    with other().asking(cramped):
        status, error = post(cramped, as_json(shape=[1, 8_000_000], data=[1_000_000] * 8_000_000))
    assert (status, error) == (400, "CANDIDATES holds 8000000 entries, at most 10000 are allowed")

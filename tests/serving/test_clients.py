"""The blocking and the asyncio client: one contract, shown on a scripted endpoint and on the real server."""

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from serving.client import CallOptions, Client, History, ServingError
from serving.client_asyncio import AsyncClient
from serving.client_tensors import MAX_MESSAGE_BYTES
from serving.handle import ServerHandle
from tests.serving.conftest import NUM_ITEMS, after, user
from tests.serving.scripted_endpoint import LISTED, Endpoint, serving

Ask = Callable[..., Any]
ONE = History(items=np.array([1000]), actions=np.array([1]), times=np.array([5]))


@pytest.fixture
def endpoint() -> Iterator[tuple[Endpoint, str]]:
    servicer = Endpoint()
    with serving(servicer) as address:
        yield servicer, address


@pytest.fixture(params=["blocking", "asyncio"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Return ask(address, method, *args, client={}, **kwargs): the answer of one call through one of the clients."""

    def blocking(address: str, method: str, *args: Any, client: dict | None = None, **kwargs: Any) -> Any:
        with Client(address, **(client or {})) as connection:
            return getattr(connection, method)(*args, **kwargs)

    def through_asyncio(address: str, method: str, *args: Any, client: dict | None = None, **kwargs: Any) -> Any:
        async def run() -> Any:
            async with AsyncClient(address, **(client or {})) as connection:
                return await getattr(connection, method)(*args, **kwargs)

        return asyncio.run(run())

    return blocking if request.param == "blocking" else through_asyncio


def test_both_clients_have_the_same_calls_with_the_same_arguments():
    def calls(client: type) -> dict[str, str]:
        return {
            name: str(inspect.signature(method))
            for name, method in inspect.getmembers(client, inspect.isfunction)
            if not name.startswith("_")
        }

    assert calls(Client) == calls(AsyncClient)
    assert set(calls(Client)) >= {"score", "retrieve", "recommend", "recommend_user", "append_events", "metadata"}


def test_a_call_carries_its_deadline_priority_request_id_and_user(endpoint, ask):
    servicer, address = endpoint
    options = CallOptions(deadline_s=1.5, priority=0, request_id="r-1", user=42)
    answer = ask(address, "recommend", ONE, k=1, request_time=9, exclude=[3], options=options)
    assert (answer.items.tolist(), answer.cached_tokens) == ([42], 7)
    sent = servicer.requests[-1]
    assert (sent.model_name, sent.id) == ("gr_recommender", "r-1")
    assert 1_000_000 < sent.parameters["timeout"].int64_param <= 1_500_000
    assert sent.parameters["gr_priority"].int64_param == 0
    assert sent.parameters["user"].string_param == "42"
    assert servicer.tensors()["EXCLUDE"] == [3]


def test_a_call_without_options_sends_the_clients_deadline_and_nothing_else(endpoint, ask):
    servicer, address = endpoint
    ask(address, "retrieve", ONE, k=1, request_time=9, client={"deadline_s": 2.0})
    assert set(servicer.requests[-1].parameters) == {"timeout"}
    assert 1_500_000 < servicer.requests[-1].parameters["timeout"].int64_param <= 2_000_000


def test_users_known_by_id_are_asked_and_appended_to(endpoint, ask):
    servicer, address = endpoint
    answer = ask(address, "recommend_user", 17, k=3, request_time=9, exclude=[1, 2])
    assert answer.items.tolist() == [42]
    assert servicer.requests[-1].model_name == "gr_user_recommender"
    assert servicer.tensors() == {"USER": [17], "REQUEST_TIME": [9], "EXCLUDE": [1, 2], "K": [3]}
    servicer.outputs = {"NUM_EVENTS": np.array([[12]], np.int64)}
    assert ask(address, "append_events", 17, [5, 6], [1, 1], [7, 8]) == 12
    assert servicer.requests[-1].model_name == "gr_events"
    assert servicer.tensors() == {"USER": [17], "ITEMS": [5, 6], "ACTIONS": [1, 1], "TIMES": [7, 8]}
    assert {tuple(tensor.shape) for tensor in servicer.requests[-1].inputs} == {(1, 1), (1, 2)}


def test_text_ids_travel_as_utf_8(endpoint, ask):
    servicer, address = endpoint
    servicer.item_id_type = "string"
    ask(address, "recommend_user", "ada", k=1, request_time=9, exclude=["\u00fc"])
    sent = servicer.tensors()
    assert sent["USER"] == b"\x03\x00\x00\x00ada"
    assert sent["EXCLUDE"] == b"\x02\x00\x00\x00\xc3\xbc"


@pytest.mark.parametrize(
    ("options", "message"), [({"priority": -1}, "priority is -1"), ({"deadline_s": 0}, "deadline_s is 0")]
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CallOptions(**options)


def test_a_server_that_is_not_available_is_asked_again_within_the_deadline(endpoint, ask):
    servicer, address = endpoint
    servicer.failures = [(grpc.StatusCode.UNAVAILABLE, "queue full")] * 2
    assert ask(address, "retrieve", ONE, k=1, request_time=9).items.tolist() == [42]
    assert len(servicer.requests) == 3


@pytest.mark.parametrize(
    "code", ["INVALID_ARGUMENT", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED"]
)
def test_any_other_refusal_is_final_and_named(endpoint, ask, code):
    servicer, address = endpoint
    servicer.failures = [(grpc.StatusCode[code], "because")]
    with pytest.raises(ServingError) as failed:
        ask(address, "retrieve", ONE, k=1, request_time=9)
    assert failed.value.code == code
    assert len(servicer.requests) == 1


@pytest.mark.parametrize("code", ["NOT_FOUND", "UNAVAILABLE"])
def test_a_model_that_is_not_loaded_is_unavailable_by_name(endpoint, ask, code):
    servicer, address = endpoint
    servicer.failures = [(grpc.StatusCode[code], "Request for unknown model: 'gr_events' is not found")] * 4
    with pytest.raises(ServingError, match="has no model gr_events; run gr materialize") as failed:
        ask(address, "append_events", 1, [1], [1], [1])
    assert failed.value.code == "UNAVAILABLE"


def test_one_attempt_means_no_retry(endpoint, ask):
    servicer, address = endpoint
    servicer.failures = [(grpc.StatusCode.UNAVAILABLE, "queue full")]
    with pytest.raises(ServingError, match="queue full") as failed:
        ask(address, "retrieve", ONE, k=1, request_time=9, client={"max_attempts": 1})
    assert failed.value.code == "UNAVAILABLE"
    assert len(servicer.requests) == 1


def test_a_call_ends_by_its_deadline_retries_included(endpoint, ask):
    servicer, address = endpoint
    servicer.wait = threading.Event()
    began = time.monotonic()
    with pytest.raises(ServingError, match=r"did not answer gr_ranker within 0\.3 s") as failed:
        ask(address, "score", ONE, [1], request_time=9, options=CallOptions(deadline_s=0.3))
    assert failed.value.code == "DEADLINE_EXCEEDED"
    assert time.monotonic() - began < 3


def test_a_deadline_that_passed_in_the_server_is_the_callers_deadline(endpoint, ask):
    servicer, address = endpoint
    passed = "the request's deadline passed after 12 ms in the engine"
    servicer.failures = [(grpc.StatusCode.CANCELLED, passed)]
    with pytest.raises(ServingError, match="did not answer gr_retriever within 2 s") as failed:
        ask(address, "retrieve", ONE, k=1, request_time=9, client={"deadline_s": 2})
    assert failed.value.code == "DEADLINE_EXCEEDED"


def test_nobody_there_is_said_with_what_to_do(ask):
    with pytest.raises(ServingError, match="start it with gr serve") as failed:
        ask("127.0.0.1:9", "metadata", client={"deadline_s": 1})
    assert failed.value.code == "UNAVAILABLE"


def test_a_request_beyond_the_limit_is_not_sent(endpoint, ask):
    servicer, address = endpoint
    too_many = np.zeros(MAX_MESSAGE_BYTES // 8 + 1, np.int64)
    with pytest.raises(ServingError, match="the request of gr_ranker is larger than 64 MiB") as failed:
        ask(address, "score", ONE, too_many, request_time=9)
    assert failed.value.code == "INVALID_ARGUMENT"
    assert servicer.requests == []


def test_an_answer_beyond_the_limit_is_refused_by_name(endpoint, ask):
    servicer, address = endpoint
    servicer.outputs = LISTED | {"SCORES": np.zeros((1, MAX_MESSAGE_BYTES // 4), np.float32)}
    with pytest.raises(ServingError, match="the answer of gr_retriever is larger than 64 MiB") as failed:
        ask(address, "retrieve", ONE, k=1, request_time=9, options=CallOptions(deadline_s=30))
    assert failed.value.code == "INVALID_ARGUMENT"


def test_a_cancelled_task_cancels_its_call(endpoint):
    servicer, address = endpoint
    servicer.wait = threading.Event()

    async def run() -> None:
        async with AsyncClient(address) as client:
            task = asyncio.create_task(client.score(ONE, [1], request_time=9))
            await asyncio.to_thread(servicer.started.wait, 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(servicer.cancelled.wait, 5)
            servicer.wait.set()
            servicer.wait = None
            assert (await client.score(ONE, [1], request_time=9)).cached_tokens == 7

    asyncio.run(run())


@pytest.mark.e2e
def test_many_coroutines_of_one_connection_get_the_answers_of_the_blocking_client(server: ServerHandle, client: Client):
    histories = [user(3000 + seed, 5 * (seed % 9)) for seed in range(24)]
    candidates = np.arange(1000, 1000 + NUM_ITEMS, 7)

    async def run() -> list:
        async with AsyncClient(server.grpc_address, deadline_s=30) as together:
            calls = [
                asyncio.gather(
                    together.score(history, candidates, request_time=after(history)),
                    together.recommend(history, k=5, request_time=after(history), options=CallOptions(priority=0)),
                )
                for history in histories
            ]
            return await asyncio.gather(*calls)

    for history, (scored, recommended) in zip(histories, asyncio.run(run()), strict=True):
        alone = client.score(history, candidates, request_time=after(history))
        assert np.abs(scored.scores - alone.scores).max() <= 1e-5 * alone.scores.max()
        best = client.recommend(history, k=5, request_time=after(history))
        assert recommended.items.tolist() == best.items.tolist()


@pytest.mark.e2e
def test_events_that_a_client_appends_are_what_the_user_is_recommended_for(
    server: ServerHandle, client: Client, ask: Ask, request: pytest.FixtureRequest
):
    history, name = user(5000, 12), {"blocking": 5000, "asyncio": 5001}[request.node.callspec.id]
    assert ask(server.grpc_address, "append_events", name, history.items, history.actions, history.times) == 12
    # Sent again after an answer that got lost, they are the same events.
    assert ask(server.grpc_address, "append_events", name, history.items, history.actions, history.times) == 12
    answer = ask(server.grpc_address, "recommend_user", name, k=5, request_time=after(history), exclude=[1000])
    expected = client.recommend(history, k=5, request_time=after(history), exclude=[1000])
    assert answer.items.tolist() == expected.items.tolist()
    assert np.abs(answer.scores - expected.scores).max() <= 1e-5 * expected.scores.max()

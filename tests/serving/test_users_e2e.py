"""The real server knows users: what they did reaches their recommendations, and what it served them its log."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import np_to_triton_dtype

from gr_platform import serving_state
from serving import repository
from serving.client import Client
from serving.engine.requests import History
from serving.handle import ServerHandle
from serving.repository import ServingOptions
from serving.server import EmbeddedServer
from tests.serving.conftest import BASE_MS, NUM_ITEMS, user
from tests.serving.sequences import write_sequences
from tests.serving.test_served_log import rows_in, until

pytestmark = pytest.mark.e2e
DS = "random"
NOW_MS = int(1000 * time.time())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("users")


@pytest.fixture(scope="module")
def server(home: Path, random_bundle: Callable[..., Path]) -> Iterator[ServerHandle]:
    folders = {
        name: random_bundle(home / name, kind, num_items=NUM_ITEMS, seed=seed, user_id_type="string")
        for name, kind, seed in (("a", "retrieval", 0), ("b", "ranking", 0), ("c", "ranking", 1))
    }
    write_sequences(home, DS, {name: rows_of(user(seed, 60)) for seed, name in enumerate("xyz")}, user_id_type="string")
    options = ServingOptions(shadow_share=1.0, log_seconds=0.3)
    repository.publish(home, folders["a"], folders["b"], options, shadow=folders["c"])
    with EmbeddedServer(home) as handle:
        yield handle


@pytest.fixture(scope="module")
def client(server: ServerHandle) -> Iterator[Client]:
    with Client(server.grpc_address, deadline_s=30) as connection:
        yield connection


@pytest.fixture(scope="module")
def raw(server: ServerHandle) -> Iterator[grpcclient.InferenceServerClient]:
    with grpcclient.InferenceServerClient(server.grpc_address) as connection:
        yield connection


def rows_of(history: History) -> list[tuple[int, int, int]]:
    return list(zip(history.items.tolist(), history.actions.tolist(), history.times.tolist(), strict=True))


def events(items: object, mask: int, times: object) -> History:
    return History(items=np.array(items), actions=np.full(len(items), mask), times=np.array(times, np.int64))


def joined(first: History, second: History) -> History:
    fields = ("items", "actions", "times")
    return History(**{name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in fields})


def infer(
    raw: grpcclient.InferenceServerClient, model: str, tensors: Mapping[str, np.ndarray], **options: object
) -> dict[str, np.ndarray]:
    inputs = []
    for name, values in tensors.items():
        inputs.append(grpcclient.InferInput(name, [1, len(values)], np_to_triton_dtype(values.dtype)))
        inputs[-1].set_data_from_numpy(values[None])
    result = raw.infer(model, inputs, client_timeout=30, **options)
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def named(name: str) -> dict[str, np.ndarray]:
    return {"USER": np.array([name.encode()], object)}


def append(raw: grpcclient.InferenceServerClient, name: str, history: History) -> int:
    fields = {"ITEMS": history.items, "ACTIONS": history.actions, "TIMES": history.times}
    return int(infer(raw, "gr_events", named(name) | fields)["NUM_EVENTS"][0, 0])


def by_user(
    raw: grpcclient.InferenceServerClient, name: str, at: int, k: int = 5, exclude: object = (), **options: object
) -> dict[str, np.ndarray]:
    fields = {"REQUEST_TIME": np.array([at]), "EXCLUDE": np.array(exclude, np.int64), "K": np.array([k], np.int32)}
    return infer(raw, "gr_user_recommender", named(name) | fields, **options)


def test_a_user_id_alone_gets_what_the_whole_history_gets(raw, client):
    base = user(0, 60)
    at = int(base.times[-1]) + 10**7
    for num_new in (0, 1, 3):
        if num_new:
            new = events(np.arange(1000, 1000 + num_new), 1, base.times[-1] + 1000 * np.arange(1, num_new + 1))
            assert append(raw, "x", new) == 60 + num_new
            whole = joined(base, new)
        else:
            whole = base
        found = by_user(raw, "x", at, exclude=[1007])
        expected = client.recommend(whole, k=5, request_time=at, exclude=[1007])
        assert found["ITEMS"][0].tolist() == expected.items.tolist()
        np.testing.assert_allclose(found["SCORES"][0], expected.scores, rtol=1e-4)
    assert by_user(raw, "x", at)["CACHED_TOKENS"][0, 0] > 60


def test_an_unknown_user_is_answered_and_grows_a_history(raw):
    assert len(by_user(raw, "nobody \u00e9", NOW_MS)["ITEMS"][0]) == 5
    new = user(30, 4)
    assert [append(raw, "nobody \u00e9", new) for _ in range(2)] == [4, 4]
    assert by_user(raw, "nobody \u00e9", NOW_MS)["CACHED_TOKENS"][0, 0] == 0
    assert by_user(raw, "nobody \u00e9", NOW_MS)["CACHED_TOKENS"][0, 0] > 4


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda raw: by_user(raw, "x", NOW_MS, k=0), "K is 0"),
        (lambda raw: by_user(raw, "x" * 2000, NOW_MS), "USER[0] has 2000 bytes"),
        (lambda raw: append(raw, "x", events([1000], 8, [5])), "ACTIONS[0] is 8"),
        (lambda raw: append(raw, "x", events([1000], 1, [NOW_MS + 10**9])), "TIMES[0] is"),
        (lambda raw: append(raw, "x", events([1000, 1001], 1, [5])), "equally long"),
    ],
    ids=["k", "user", "mask", "future", "lengths"],
)
def test_a_broken_request_is_an_invalid_argument_through_both_calls(raw, ask, message):
    with pytest.raises(grpcclient.InferenceServerException, match="INVALID_ARGUMENT") as failed:
        ask(raw)
    assert message in failed.value.message()
    assert "/" not in failed.value.message()


def test_a_request_whose_deadline_has_passed_is_refused_and_one_with_time_left_answered(raw):
    assert len(by_user(raw, "x", NOW_MS, timeout=20_000_000)["ITEMS"][0]) == 5
    with pytest.raises(grpcclient.InferenceServerException, match=r"CANCELLED.*deadline has passed"):
        by_user(raw, "x", NOW_MS, timeout=1)


def test_what_was_served_is_logged_with_the_challengers_scores_and_without_the_user(raw, home):
    folder = serving_state.served_folder(home, DS)
    answer = by_user(raw, "y", NOW_MS, request_id="the request")

    def row() -> dict | None:
        return next((row for row in rows_in(folder) if row["request_id"] == "the request"), None)

    until(lambda: row() is not None)
    logged = row()
    assert logged["items"] == answer["ITEMS"][0].tolist()
    np.testing.assert_allclose(logged["scores"], answer["SCORES"][0])
    assert logged["user_hash"] == serving_state.user_hash(serving_state.hash_key(home), DS, "y")
    assert (logged["request_ts"], 0 < logged["latency_ms"] < 30_000) == (NOW_MS, True)
    configs = {
        name: raw.get_model_config(name).config.parameters["model_digest"].string_value
        for name in ("gr_retriever", "gr_ranker", "gr_ranker_shadow")
    }
    assert list(configs.values()) == [logged[f"{name}_digest"] for name in ("retriever", "ranker", "shadow")]
    history = user(1, 60)
    fields = {
        "HISTORY_ITEMS": history.items,
        "HISTORY_ACTIONS": history.actions,
        "HISTORY_TIMES": history.times,
        "HISTORY_OFFSET": np.array([0]),
        "CANDIDATES": answer["ITEMS"][0],
        "REQUEST_TIME": np.array([NOW_MS]),
    }
    np.testing.assert_allclose(logged["shadow_scores"], infer(raw, "gr_ranker_shadow", fields)["SCORES"][0], rtol=1e-4)
    assert not np.allclose(logged["shadow_scores"], logged["scores"])


def test_new_sequences_are_picked_up_while_serving_and_change_no_answer(raw, home):
    base, at = user(2, 60), NOW_MS
    new = events([1005, 1006], 2, base.times[-1] + np.array([10, 20]))
    assert append(raw, "z", new) == 62
    before = by_user(raw, "z", at)
    rows = {name: rows_of(user(seed, 60)) for seed, name in enumerate("xyz")}
    rows["z"] += rows_of(new)
    rows["new"] = rows_of(user(40, 9))
    write_sequences(home, DS, rows, user_id_type="string")
    # The 9 events of the user whom only the new sequences know.
    until(lambda: append(raw, "new", events([5], 1, [BASE_MS])) == 9)
    assert append(raw, "z", new) == 62
    time.sleep(1.2)
    after = by_user(raw, "z", at)
    assert after["ITEMS"].tolist() == before["ITEMS"].tolist()
    np.testing.assert_allclose(after["SCORES"], before["SCORES"], rtol=1e-4)


def test_many_users_at_once_are_all_answered(raw, server):
    def visit(number: int) -> tuple[int, int]:
        name = f"visitor-{number % 16}"
        with grpcclient.InferenceServerClient(server.grpc_address) as own:
            append(own, name, user(50 + number % 16, 1 + number // 16))
            return len(by_user(own, name, NOW_MS)["ITEMS"][0]), number

    with ThreadPoolExecutor(32) as pool:
        assert [count for count, _ in pool.map(visit, range(160))] == [5] * 160
    assert append(raw, "visitor-3", user(53, 10)) == 10


def test_a_model_that_is_gone_makes_its_callers_unavailable_and_no_worse(raw, server):
    raw.unload_model("gr_ranker", headers=server.admin_headers)
    try:
        until(lambda: not raw.is_model_ready("gr_ranker"))
        with pytest.raises(grpcclient.InferenceServerException, match=r"UNAVAILABLE.*gr_ranker is not available"):
            by_user(raw, "x", NOW_MS)
    finally:
        raw.load_model("gr_ranker", headers=server.admin_headers)
    assert len(by_user(raw, "x", NOW_MS)["ITEMS"][0]) == 5


def test_what_waits_to_be_logged_is_written_when_the_server_stops(raw, server, home):
    for number in range(5):
        by_user(raw, "x", NOW_MS, request_id=f"last {number}")
    server.stop()
    logged = {row["request_id"] for row in rows_in(serving_state.served_folder(home, DS))}
    assert {f"last {number}" for number in range(5)} <= logged

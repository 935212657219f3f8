"""What callers of the real model server get: the offline model's scores, or a named error."""

import json
import math
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from gr_platform.bundle import golden
from serving.client import Client, History, ServingError
from serving.figures import PERIOD_S
from serving.repository import ServingOptions
from tests.serving.conftest import NUM_ITEMS, Offline, after, user

pytestmark = pytest.mark.e2e
ALL_ITEMS = np.arange(1000, 1000 + NUM_ITEMS)
# The offline ranking model does one full forward a candidate.
SOME = np.arange(0, NUM_ITEMS, 20)
KINDS = ("ranking", "retrieval")


def assert_close(actual: np.ndarray, reference: np.ndarray) -> None:
    """The precision that serving promises in fp32."""
    assert actual.shape == reference.shape
    assert np.abs(actual - reference).max() <= 1e-5 * np.abs(reference).max()


def assert_as_offline(scores: np.ndarray, model: Offline, history: History, request_time: int) -> None:
    assert_close(scores[SOME], model.scores(history, ALL_ITEMS[SOME], request_time))


def served(client: Client, kind: str, history: History, request_time: int) -> tuple[np.ndarray, int]:
    """Scores of all items in item order, and how many tokens were cached."""
    if kind == "ranking":
        answer = client.score(history, ALL_ITEMS, request_time=request_time)
        return answer.scores, answer.cached_tokens
    answer = client.retrieve(history, k=NUM_ITEMS, request_time=request_time)
    assert len(answer.items) == NUM_ITEMS
    return answer.scores[np.argsort(answer.items)], answer.cached_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_golden_requests_get_the_scores_that_the_bundle_promises(client, offline_models, kind):
    bundle = offline_models[kind].bundle
    for request, expected in golden.load(bundle.folder / "golden.safetensors"):
        history = History(items=bundle.vocabulary.ids(request.items), actions=request.actions, times=request.times)
        scores, _ = served(client, kind, history, request.request_time)
        assert_close(scores[request.candidates - bundle.vocabulary.first_item], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_events", [0, 1, 9, 39, 40, 41, 130])
def test_cold_cached_appended_and_edited_histories_score_as_offline(client, offline_models, kind, num_events):
    model = offline_models[kind]
    seed = 100 + num_events
    past = user(seed, num_events)
    cached_tokens = []
    edited = user(seed, num_events + 1)
    edited.actions[-1:] ^= 1
    grown = user(seed, num_events + 3)
    for history in (past, past, user(seed, num_events + 1), edited, grown):
        scores, cached = served(client, kind, history, after(history))
        assert_as_offline(scores, model, history, after(history))
        cached_tokens.append(cached)
    visible = num_events if num_events <= 40 else num_events - 8 * -(-(num_events - 40) // 8)
    assert cached_tokens[0] == 0
    if num_events:
        assert cached_tokens[1] == (2 * visible + 1 if kind == "ranking" else visible)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_history_at_another_time_is_scored_for_that_time(client, offline_models, kind):
    history = user(500, 20)
    for delay_ms in (0, 1_000, 86_400_000):
        scores, _ = served(client, kind, history, after(history, delay_ms))
        assert_as_offline(scores, offline_models[kind], history, after(history, delay_ms))


@pytest.mark.parametrize("kind", KINDS)
def test_users_batched_with_others_of_other_lengths_score_as_alone(client, server, offline_models, kind):
    model_name = "gr_ranker" if kind == "ranking" else "gr_retriever"
    statistics = grpcclient.InferenceServerClient(server.grpc_address)

    def counts() -> tuple[int, int]:
        stats = statistics.get_inference_statistics(model_name, as_json=False).model_stats[0]
        return stats.inference_count, stats.execution_count

    def visit(seed: int) -> list[tuple[History, np.ndarray]]:
        lengths = (seed % 7, seed % 7, seed % 7 + 1, 5 * (seed % 11), 130)
        histories = [user(1000 + seed, num_events) for num_events in lengths]
        return [(history, served(client, kind, history, after(history))[0]) for history in histories]

    before = counts()
    with ThreadPoolExecutor(16) as pool:
        visits = list(pool.map(visit, range(32)))
    # The server counts an inference after it has answered it.
    deadline = time.monotonic() + 10
    while (after_all := counts())[0] < before[0] + 32 * 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    inferences, executions = (now - then for now, then in zip(after_all, before, strict=True))
    statistics.close()
    assert inferences == 32 * 5
    assert executions < inferences
    some, model = SOME[:2], offline_models[kind]
    asked = [answer for answers in visits for answer in answers]
    reference = np.stack([model.scores(history, ALL_ITEMS[some], after(history)) for history, _ in asked])
    assert_close(np.stack([scores[some] for _, scores in asked]), reference)


def test_the_recommender_returns_the_best_of_the_retrieved_by_mean_probability(client):
    history = user(7, 25)
    request_time = after(history)
    answer = client.recommend(history, k=10, request_time=request_time, exclude=[1000, 1001])
    depth = ServingOptions().retrieval_depth
    retrieved = client.retrieve(history, k=depth, request_time=request_time, exclude=[1000, 1001])
    assert len(retrieved.items) == depth
    ranked = client.score(history, retrieved.items, request_time=request_time)
    best = np.argsort(-ranked.scores.mean(axis=1), kind="stable")[:10]
    assert answer.items.tolist() == retrieved.items[best].tolist()
    assert_close(answer.scores, ranked.scores[best])
    again = client.recommend(history, k=10, request_time=request_time)
    assert again.cached_tokens == 25 + 51


def test_many_callers_at_once_are_all_answered_within_the_clients_default_deadline(server):
    def ask(seed: int) -> int:
        history = user(700 + seed % 8, 20)
        return len(client.recommend(history, k=5, request_time=after(history)).items)

    with Client(server.grpc_address) as client, ThreadPoolExecutor(64) as pool:
        assert list(pool.map(ask, range(320))) == [5] * 320


def test_defined_answers_of_odd_requests(client):
    history = user(8, 5)
    nothing = user(8, 0)
    assert client.score(history, [], request_time=after(history)).scores.shape == (0, 2)
    assert client.score(nothing, [1000, 99], request_time=1).scores.shape == (2, 2)
    assert len(client.recommend(nothing, k=3, request_time=1).items) == 3
    assert len(client.retrieve(history, k=5, exclude=ALL_ITEMS, request_time=after(history)).items) == 0
    assert len(client.recommend(history, k=5, exclude=ALL_ITEMS, request_time=after(history)).items) == 0
    unknown = client.retrieve(replace(history, items=history.items + 10**6), k=500, request_time=after(history))
    assert sorted(unknown.items.tolist()) == ALL_ITEMS.tolist()


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"request_time": 5}, "REQUEST_TIME is 5, earlier than the last event"),
        ({"times": np.array([3, 2, 1, 0])}, {}, "HISTORY_TIMES[1] is 2, earlier"),
        ({"times": np.array([1, 2])}, {}, "must be equally long, got 4, 4 and 2"),
        ({"actions": np.array([1, 1, 9, 1])}, {}, "HISTORY_ACTIONS[2] is 9"),
        ({"actions": np.array([1, -1, 1, 1])}, {}, "HISTORY_ACTIONS[1] is -1"),
        ({"offset": -4}, {}, "HISTORY_OFFSET is -4"),
        ({}, {"k": 0}, "K is 0"),
        ({}, {"candidates": np.full(10_001, 1000)}, "CANDIDATES holds 10001 entries"),
    ],
)
def test_a_broken_request_is_an_invalid_argument_that_names_the_field(client, changes, arguments, message):
    history = replace(user(9, 4), **changes)
    request_time = arguments.get("request_time", after(user(9, 4)))
    calls = []
    if "k" not in arguments:
        calls.append(lambda: client.score(history, arguments.get("candidates", [1000]), request_time=request_time))
    if "candidates" not in arguments:
        k = arguments.get("k", 3)
        calls.append(lambda: client.retrieve(history, k=k, request_time=request_time))
        calls.append(lambda: client.recommend(history, k=k, request_time=request_time))
    for call in calls:
        with pytest.raises(ServingError) as failed:
            call()
        assert failed.value.code == "INVALID_ARGUMENT"
        assert message in str(failed.value)
        assert "/" not in str(failed.value)


def test_metadata_says_what_is_served(client, offline_models):
    metadata = client.metadata()
    assert metadata.dataset == "random"
    assert metadata.item_id_type == "int64"
    assert metadata.actions == ("view", "like", "purchase")
    assert metadata.tasks == ("like", "purchase")
    assert metadata.model_digests["gr_ranker"] == offline_models["ranking"].bundle.digest


def test_metrics_count_requests_and_tokens(client, server):
    def figures() -> dict[str, float]:
        time.sleep(2.5 * PERIOD_S)
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith("gr_")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    history = user(600, 10)
    client.score(history, [5], request_time=after(history))
    before = figures()
    client.score(history, [1000, 5, 6], request_time=after(history))
    now, label = figures(), '{model="gr_ranker"}'
    assert now[f"gr_requests_total{label}"] - before[f"gr_requests_total{label}"] == 1
    assert now[f"gr_cache_hit_tokens_total{label}"] - before[f"gr_cache_hit_tokens_total{label}"] == 21
    assert now[f"gr_unknown_ids_total{label}"] - before[f"gr_unknown_ids_total{label}"] == 2
    assert now[f"gr_cache_bytes{label}"] > 0


def test_metrics_tell_how_old_a_model_is_and_what_it_scores(client, server, pair):
    history = user(601, 10)
    scores = client.score(history, [1000, 1001], request_time=after(history)).scores
    time.sleep(2.5 * PERIOD_S)
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    for kind, model in (("retrieval", "gr_retriever"), ("ranking", "gr_ranker")):
        exported = re.search(rf'gr_model_exported_seconds{{model="{model}"}} (\S+)', text)
        assert float(exported[1]) == pytest.approx((pair[kind] / "manifest.json").stat().st_mtime, abs=1)
    until = re.search(r'gr_model_trained_until_seconds{model="gr_ranker"} (\S+)', text)
    assert math.isnan(float(until[1])), "these bundles do not say so"
    means = dict(re.findall(r'gr_score_mean{model="gr_ranker",task="(\w+)"} (\S+)', text))
    assert set(means) == {"like", "purchase"}
    assert all(0 < float(value) < 1 for value in means.values())
    assert scores.shape == (2, 2)


def test_model_control_needs_the_key(server):
    with grpcclient.InferenceServerClient(server.grpc_address) as raw:
        with pytest.raises(grpcclient.InferenceServerException, match="admin-key"):
            raw.unload_model("gr_ranker")
        assert raw.is_model_ready("gr_ranker")
    post = urllib.request.Request(
        f"http://{server.http_address}/v2/repository/models/gr_ranker/unload", data=json.dumps({}).encode()
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(post, timeout=5)
    assert refused.value.code == 403


def test_the_client_says_what_to_do():
    with Client("127.0.0.1:9", deadline_s=1) as nobody, pytest.raises(ServingError, match="start it with gr serve"):
        nobody.metadata()


def test_ids_of_the_wrong_type_are_refused(client):
    history = user(9, 4)
    with pytest.raises(ServingError, match="item ids must be int64, got 'x'"):
        client.score(history, ["x"], request_time=after(history))
    with pytest.raises(ServingError, match="must be int64"):
        client.score(history, np.array([1000.0]), request_time=after(history))


@pytest.mark.parametrize(
    ("field", "changes", "k"),
    [
        ("HISTORY_TIMES", {"times": [1000.9]}, 3),
        ("HISTORY_TIMES", {"times": [None]}, 3),
        ("HISTORY_TIMES", {"times": np.array(["2026-01-01"], "datetime64[ms]")}, 3),
        ("HISTORY_ACTIONS", {"actions": [1.9]}, 3),
        ("HISTORY_ACTIONS", {"actions": [True]}, 3),
        ("HISTORY_ACTIONS", {"actions": np.array([[1]])}, 3),
        ("item ids", {"items": [1000, "x"]}, 3),
        ("K", {}, 2.9),
    ],
)
def test_what_is_no_integer_is_refused_and_never_cut(client, field, changes, k):
    history = replace(user(3, 1), **changes)
    with pytest.raises(ServingError, match=rf"^{field} must be ") as error:
        client.recommend(history, k=k, request_time=after(user(3, 1)))
    assert error.value.code == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("changes", "k", "field"),
    [
        ({}, 1 << 40, "K"),
        ({"times": np.array([1 << 63], np.uint64)}, 5, "HISTORY_TIMES"),
        ({"times": [1 << 70]}, 5, "HISTORY_TIMES"),
        ({"items": np.array([1 << 63], np.uint64)}, 5, "item ids"),
        ({"offset": 1 << 64}, 5, "HISTORY_OFFSET"),
    ],
)
def test_numbers_that_the_wire_cannot_carry_are_refused_and_never_wrapped(client, changes, k, field):
    history = replace(user(3, 1), **changes)
    with pytest.raises(ServingError, match=rf"^{field} holds a value beyond int") as error:
        client.recommend(history, k=k, request_time=after(user(3, 1)))
    assert error.value.code == "INVALID_ARGUMENT"

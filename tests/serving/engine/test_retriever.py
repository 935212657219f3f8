"""Next-time caching is exact, and the list holds what it must and nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from gr_platform.models.tokens import retrieval_tokens
from serving.engine.requests import History, RetrieveRequest
from serving.engine.retriever import Retriever, top_k
from tests.serving.engine.toy import FIRST_ITEM, NUM_ITEMS, history, some_history, toy_bundle

NONE = np.zeros(0, np.int64)
LATE = 10**7


def ask(retriever: Retriever, past: History, *, k: int = 5, exclude: np.ndarray = NONE, request_time: int = LATE):
    return retriever.retrieve(RetrieveRequest(history=past, k=k, exclude=exclude, request_time=request_time))


def fresh(cache_bytes: int = 1 << 20, **options: object) -> Retriever:
    return Retriever(toy_bundle("retrieval", **options), cache_bytes=cache_bytes, num_threads=1)  # type: ignore[arg-type]


def test_all_tokens_but_the_last_are_cached() -> None:
    retriever = fresh()
    cold, warm = ask(retriever, some_history(9)), ask(retriever, some_history(9), request_time=LATE + 1)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 9)
    assert retriever._bundle.toy.encoded_tokens == [10, 1]
    assert np.array_equal(warm.scores, ask(fresh(), some_history(9), request_time=LATE + 1).scores)


def test_a_delta_of_j_events_is_j_plus_one_rows() -> None:
    retriever = fresh()
    ask(retriever, some_history(6))
    appended = ask(retriever, some_history(9))
    assert retriever._bundle.toy.encoded_tokens == [7, 4]
    assert np.array_equal(appended.scores, ask(fresh(), some_history(9)).scores)


def test_equal_tokens_with_another_next_event_time_do_not_share() -> None:
    retriever = fresh()
    first = [(110, 1, 10), (111, 1, 20)]
    ask(retriever, history([*first, (112, 1, 30)]))
    other = ask(retriever, history([*first, (112, 1, 31)]))
    # Event 1 looks from the next event's time, which differs, and the partial page they are in is keyed as a whole.
    assert other.cached_tokens == 0
    assert np.array_equal(other.scores, ask(fresh(), history([*first, (112, 1, 31)])).scores)


def test_inactive_excluded_and_padding_rows_are_never_returned() -> None:
    exclude = np.array([106, 107, 123_456])
    result = ask(fresh(), some_history(4), k=10_000, exclude=exclude)
    available = set(range(100 + FIRST_ITEM, 100 + FIRST_ITEM + NUM_ITEMS - 1)) - {106, 107}
    assert set(result.items.tolist()) == available
    assert len(result.items) == len(available)
    assert (np.diff(result.scores) <= 0).all()


@pytest.mark.parametrize("rule", ["none", "all"])
def test_seen_items_are_withheld_as_the_data_set_declares(rule: str) -> None:
    past = some_history(30)
    result = ask(fresh(exclude_seen=rule), past, k=1000)
    assert bool(set(result.items.tolist()) & set(past.items.tolist())) == (rule == "none")


def test_an_empty_history_is_answered_and_not_cached() -> None:
    retriever = fresh()
    assert len(ask(retriever, history([])).items) == 5
    assert ask(retriever, history([])).cached_tokens == 0
    assert retriever.cache.counters.num_entries == 0


def test_scores_are_dot_products_over_the_temperature() -> None:
    bundle = toy_bundle("retrieval")
    past = history([(110, 1, 5)])
    result = ask(Retriever(bundle, cache_bytes=0, num_threads=1), past, k=NUM_ITEMS)
    tokens = retrieval_tokens(past.items - 100, past.actions, past.times, LATE)
    user = bundle.toy.encode(tokens, bundle.toy.empty())[0][-1]
    expected = bundle.item_vectors[result.items - 100] @ user / np.linalg.norm(user) / bundle.config.temperature
    np.testing.assert_allclose(result.scores, expected, rtol=1e-5)


@given(strategies.lists(strategies.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0]), min_size=1), strategies.integers(1, 9))
def test_top_k_is_the_head_of_a_stable_sort(values: list[float], k: int) -> None:
    scores = np.array(values, np.float32)
    expected = [i for i in np.argsort(-scores, kind="stable") if scores[i] > -np.inf][:k]
    assert top_k(scores, k).tolist() == expected


requests = strategies.tuples(
    strategies.integers(0, 3), strategies.integers(0, 40), strategies.booleans(), strategies.integers(0, 5)
)


@given(strategies.lists(requests, max_size=25), strategies.sampled_from([0, 3_000, 1 << 20]))
@settings(max_examples=60, deadline=None)
def test_any_stream_of_requests_equals_an_engine_without_a_cache(stream: list[tuple], cache_bytes: int) -> None:
    cached, recomputing = fresh(cache_bytes), fresh(0)
    for user, num_events, shift, delay in stream:
        past = some_history(num_events, seed=user)
        if shift and num_events:
            past.times[-1] += 1
        request_time = int(past.times[-1]) + delay if num_events else delay
        got, expected = (ask(engine, past, k=7, request_time=request_time) for engine in (cached, recomputing))
        assert np.array_equal(got.items, expected.items)
        assert np.array_equal(got.scores, expected.scores)
        cached.cache.check_integrity()

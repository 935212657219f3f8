"""Next-time caching is exact, and the list holds what it must and nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from gr_platform.bundle.compute import Piece
from gr_platform.models.tokens import retrieval_tokens
from serving.engine.engine import Engine
from serving.engine.requests import History, RetrieveRequest
from serving.engine.top_k import best_items, top_k
from tests.serving.engine.toy import FIRST_ITEM, NUM_ITEMS, history, some_history, toy_engine

NONE = np.zeros(0, np.int64)
LATE = 10**7


def ask(retriever: Engine, past: History, *, k: int = 5, exclude: np.ndarray = NONE, request_time: int = LATE):
    return retriever.ask(RetrieveRequest(history=past, k=k, exclude=exclude, request_time=request_time))


def fresh(cache_bytes: int = 1 << 20, **options: object) -> Engine:
    return toy_engine("retrieval", cache_bytes=cache_bytes, **options)


def test_all_tokens_but_the_last_are_cached() -> None:
    retriever = fresh()
    cold, warm = ask(retriever, some_history(9)), ask(retriever, some_history(9), request_time=LATE + 1)
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 9)
    assert retriever.model.compute.encoded_tokens == [10, 1]
    assert np.array_equal(warm.scores, ask(fresh(), some_history(9), request_time=LATE + 1).scores)


def test_a_delta_of_j_events_is_j_plus_one_rows() -> None:
    retriever = fresh()
    ask(retriever, some_history(6))
    appended = ask(retriever, some_history(9))
    assert retriever.model.compute.encoded_tokens == [7, 4]
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
    assert retriever.model.cache.counters.num_entries == 0


def test_scores_are_dot_products_over_the_temperature() -> None:
    engine, past = fresh(0), history([(110, 1, 5)])
    result, bundle = ask(engine, past, k=NUM_ITEMS), engine.model.bundle
    tokens = retrieval_tokens(past.items - 100, past.actions, past.times, LATE)
    (user,) = engine.model.compute.encode([Piece(tokens=tokens, past=0, pages=np.zeros(1, np.int32), keep=1)])
    expected = bundle.item_vectors[result.items - 100] @ user / np.linalg.norm(user) / bundle.config.temperature
    np.testing.assert_allclose(result.scores, expected, rtol=1e-5)


@given(strategies.lists(strategies.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0]), min_size=1), strategies.integers(1, 9))
def test_top_k_is_the_head_of_a_stable_sort(values: list[float], k: int) -> None:
    scores = np.array(values, np.float32)
    expected = [i for i in np.argsort(-scores, kind="stable") if scores[i] > -np.inf][:k]
    assert top_k(scores, k).tolist() == expected


@given(
    strategies.lists(strategies.integers(-3, 3), min_size=1, max_size=40),
    strategies.lists(
        strategies.tuples(strategies.integers(1, 9), strategies.sets(strategies.integers(0, 39))), max_size=3
    ),
    strategies.integers(1, 9),
)
def test_a_list_found_block_by_block_is_the_head_of_the_whole(levels, users, block) -> None:
    items = np.array(levels, np.float32)[:, None]
    withheld = [np.array(sorted(r for r in rows if r < len(items)), np.int64) for _, rows in users]
    vectors = np.ones((len(users), 1), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serving.engine.top_k.BLOCK_ITEMS", block)
        found = best_items(vectors, items, [k for k, _ in users], withheld)
    for (k, _), never, (rows, scores) in zip(users, withheld, found, strict=True):
        whole = items[:, 0].copy()
        whole[never] = -np.inf
        assert rows.tolist() == top_k(whole, k).tolist()
        assert scores.tolist() == whole[rows].tolist()


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
        cached.model.cache.check_integrity()

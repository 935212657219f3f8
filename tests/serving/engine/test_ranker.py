"""Cached scoring equals scoring from nothing, in every situation a history can be in."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from serving.engine.engine import Engine
from serving.engine.requests import History, InvalidRequestError, RankRequest
from tests.serving.engine.toy import history, some_history, toy_engine

CANDIDATES = np.arange(105, 130)
LATE = 10**7


def ask(ranker: Engine, past: History, *, candidates: np.ndarray = CANDIDATES, request_time: int = LATE):
    return ranker.ask(RankRequest(history=past, candidates=candidates, request_time=request_time))


def fresh(cache_bytes: int = 1 << 20, **options: object) -> Engine:
    return toy_engine("ranking", cache_bytes=cache_bytes, **options)


def test_a_repeated_request_is_served_from_the_cache_and_equal() -> None:
    ranker = fresh()
    cold, warm = ask(ranker, some_history(9)), ask(ranker, some_history(9))
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 19)
    assert np.array_equal(cold.scores, warm.scores)
    assert ranker.model.compute.encoded_tokens == [19]


def test_an_appended_event_costs_its_two_tokens() -> None:
    ranker = fresh()
    ask(ranker, some_history(9))
    appended = ask(ranker, some_history(10))
    assert appended.cached_tokens == 19
    assert ranker.model.compute.encoded_tokens == [19, 2]
    assert np.array_equal(appended.scores, ask(fresh(), some_history(10)).scores)


def test_the_request_time_never_enters_the_cache() -> None:
    ranker = fresh()
    ask(ranker, some_history(5), request_time=LATE)
    later = ask(ranker, some_history(5), request_time=LATE + 5)
    assert later.cached_tokens == 11
    assert np.array_equal(later.scores, ask(fresh(), some_history(5), request_time=LATE + 5).scores)
    empty = history([])
    assert ask(ranker, empty).cached_tokens == 0
    assert ask(ranker, empty, request_time=LATE + 1).cached_tokens == 0
    assert ask(ranker, empty).cached_tokens == 0


@pytest.mark.parametrize("num_events", [12, 13, 16, 17, 30])
def test_only_the_window_is_seen_and_a_trimmed_history_with_offset_is_the_same(num_events: int) -> None:
    whole = some_history(num_events)
    start = 0 if num_events <= 12 else 4 * -(-(num_events - 12) // 4)
    window = History(items=whole.items[start:], actions=whole.actions[start:], times=whole.times[start:], offset=start)
    ranker = fresh()
    cold, trimmed = ask(ranker, whole), ask(ranker, window)
    assert np.array_equal(cold.scores, trimmed.scores)
    assert trimmed.cached_tokens == 1 + 2 * (num_events - start)


def test_the_window_moves_once_a_chunk() -> None:
    ranker, reused = fresh(), []
    for num_events in range(12, 21):
        reused.append(ask(ranker, some_history(num_events)).cached_tokens > 0)
    # 13 and 17 events begin a new window.
    assert reused == [False, False, True, True, True, False, True, True, True]


def test_a_history_that_begins_after_the_window_is_used_as_sent() -> None:
    whole = some_history(30)
    short = History(items=whole.items[28:], actions=whole.actions[28:], times=whole.times[28:], offset=28)
    alone = History(items=whole.items[28:], actions=whole.actions[28:], times=whole.times[28:])
    assert np.array_equal(ask(fresh(), short).scores, ask(fresh(), alone).scores)


@pytest.mark.parametrize("num_candidates", [0, 1, 7, 8, 9, 24])
def test_scores_do_not_depend_on_microbatches_or_on_other_candidates(num_candidates: int) -> None:
    ranker = fresh()
    together = ask(ranker, some_history(4), candidates=CANDIDATES[:num_candidates])
    assert together.scores.shape == (num_candidates, 2)
    assert together.scores.dtype == np.float32
    for index in range(num_candidates):
        alone = ask(ranker, some_history(4), candidates=CANDIDATES[index : index + 1])
        assert np.array_equal(alone.scores[0], together.scores[index])
    assert max(ranker.model.compute.scored, default=0) <= 8


def test_unknown_ids_are_scored_and_counted() -> None:
    result = ask(fresh(), history([(106, 1, 1), (9_999, 1, 2)]), candidates=np.array([107, 8_888, 7_777]))
    assert result.num_unknown == 3
    assert np.isfinite(result.scores).all()


def test_a_broken_request_leaves_the_cache_alone() -> None:
    ranker = fresh()
    with pytest.raises(InvalidRequestError):
        ask(ranker, some_history(5), request_time=-1)
    assert ranker.model.cache.counters.prefill_tokens == 0


def test_warm_up_leaves_the_cache_empty() -> None:
    ranker = fresh()
    ranker.model.warm_up()
    assert ranker.model.cache.counters.num_entries == 0


requests = strategies.tuples(
    strategies.integers(0, 3), strategies.integers(0, 40), strategies.integers(0, 3), strategies.integers(0, 5)
)


@given(strategies.lists(requests, max_size=25), strategies.sampled_from([0, 3_000, 9_000, 1 << 20]))
@settings(max_examples=60, deadline=None)
def test_any_stream_of_requests_equals_an_engine_without_a_cache(stream: list[tuple], cache_bytes: int) -> None:
    cached, recomputing = fresh(cache_bytes), fresh(0)
    for user, num_events, edit, delay in stream:
        past = some_history(num_events, seed=user)
        if edit and num_events:
            past.actions[-min(edit, num_events)] ^= 1
        request_time = int(past.times[-1]) + delay if num_events else delay
        got = ask(cached, past, request_time=request_time)
        expected = ask(recomputing, past, request_time=request_time)
        assert np.array_equal(got.scores, expected.scores)
        assert expected.cached_tokens == 0
        cached.model.cache.check_integrity()

"""Made-up visitors come as often, ask for as much and remember as much as the benchmark says."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_platform.sequences.window import window_start
from serving.bench.traffic import Population, Traffic, arrivals

TRAFFIC = Traffic(
    first_id=1000, num_items=50, num_actions=3, max_events=24, chunk=8, num_users=20, first_events=(2, 20)
)


def visits(traffic: Traffic, count: int) -> list:
    population = Population(traffic)
    return [population.visit() for _ in range(count)]


def facts(visit) -> tuple:
    history = visit.history
    return (visit.kind, history.items.tolist(), history.times.tolist(), visit.candidates.tolist(), visit.request_time)


def test_one_seed_gives_the_same_visits_and_another_one_others():
    first, again = (list(map(facts, visits(TRAFFIC, 60))) for _ in range(2))
    assert first == again
    assert first != list(map(facts, visits(replace(TRAFFIC, seed=1), 60)))


@given(seed=st.integers(0, 1000), mean=st.floats(0, 4))
def test_every_visit_is_one_that_a_server_may_be_asked(seed, mean):
    for visit in visits(replace(TRAFFIC, seed=seed, events_per_visit=mean), 30):
        history = visit.history
        total = history.offset + len(history.items)
        assert len(history.items) == len(history.actions) == len(history.times) == min(total, TRAFFIC.max_events)
        assert (np.diff(history.times) >= 0).all()
        assert visit.request_time > history.times[-1]
        assert set(history.actions.tolist()) <= {1, 2, 4}
        ids = np.concatenate([history.items, visit.candidates])
        assert ((ids >= 1000) & (ids < 1050)).all()
        visible = total - window_start(total, TRAFFIC.max_events, TRAFFIC.chunk)
        assert visit.cacheable == 2 * visible + 1 + (visible if visit.kind == "recommend" else 0)


def test_what_a_visit_leaves_behind_is_in_the_users_next_history():
    alone = replace(TRAFFIC, num_users=1, max_events=10_000, events_per_visit=2.0)
    histories = [visit.history for visit in visits(alone, 50)]
    for before, after in pairwise(histories):
        assert after.items[: len(before.items)].tolist() == before.items.tolist()
    grown = len(histories[-1].items) - len(histories[0].items)
    assert 49 < grown < 150


def test_popular_users_come_more_often_by_zipf_and_requests_are_as_mixed_as_told():
    traffic = replace(TRAFFIC, num_users=50, zipf=1.0, num_items=10**9, max_events=10**6)
    drawn = visits(traffic, 4000)
    # A user is told by the first item, which no append moves.
    counts = np.sort(np.unique([visit.history.items[0] for visit in drawn], return_counts=True)[1])[::-1]
    shares = 1 / np.arange(1, 51)
    assert counts[0] / 4000 == pytest.approx(shares[0] / shares.sum(), rel=0.15)
    assert counts[:10].sum() / 4000 == pytest.approx(shares[:10].sum() / shares.sum(), rel=0.1)
    scored = [len(visit.candidates) for visit in drawn if visit.kind == "score"]
    assert len(scored) / 4000 == pytest.approx(1 - traffic.recommend_share, rel=0.05)
    for size, weight in zip(traffic.num_candidates, traffic.weights, strict=True):
        assert scored.count(size) / len(scored) == pytest.approx(weight, abs=0.03)


def test_weights_that_are_no_distribution_are_refused():
    with pytest.raises(ValueError, match="sum to 1"):
        replace(TRAFFIC, weights=(0.5, 0.3, 0.15, 0.1))


@given(rate=st.floats(0.5, 200), seconds=st.floats(0.1, 20), seed=st.integers(0, 99))
def test_arrivals_lie_in_order_within_the_time_and_repeat(rate, seconds, seed):
    times = arrivals(rate, seconds, seed)
    assert (np.diff(times) >= 0).all()
    assert ((times >= 0) & (times < seconds)).all()
    assert times.tolist() == arrivals(rate, seconds, seed).tolist()


def test_arrivals_are_as_many_and_as_irregular_as_a_poisson_process():
    gaps = np.diff(arrivals(100, 100, seed=3))
    assert len(gaps) == pytest.approx(10_000, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.05)

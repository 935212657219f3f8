"""Steps: what several requests at once get, who waits for whom, and how requests end that are not answered."""

import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from serving.engine import recent
from serving.engine.engine import MAX_ASKED, Engine, Limits
from serving.engine.jobs import CANCEL_POLL_S, CancelledError, LateError, QueueFullError, Terms
from serving.engine.pace import Ratio
from serving.engine.requests import History, InvalidRequestError, RankRequest, RetrieveRequest
from serving.engine.scheduler import share
from tests.serving.engine.toy import history, some_history, toy_engine

LATE = 10**7
NONE = np.zeros(0, np.int64)


def rank(past: History, num_candidates: int = 5, at: int = LATE) -> RankRequest:
    return RankRequest(history=past, candidates=105 + np.arange(num_candidates) % 30, request_time=at)


def submit(engine: Engine, request: Any, terms: Terms | None = None) -> list:
    outcomes: list = []
    engine.submit(request, lambda job, outcome: outcomes.append(outcome), terms)
    return outcomes


def run(engine: Engine, *waiting: list, most_steps: int = 10_000) -> int:
    steps = 0
    while not all(waiting):
        engine.step()
        steps += 1
        assert steps <= most_steps
    return steps


def test_requests_of_one_step_get_what_each_gets_alone() -> None:
    engine = toy_engine("ranking", limits=Limits(step_tokens=7))
    requests = [rank(some_history(n, seed=n), m, LATE + n) for n, m in ((9, 5), (0, 3), (12, 40), (1, 0), (9, 5))]
    outcomes = [submit(engine, request) for request in requests]
    run(engine, *outcomes)
    for request, (outcome,) in zip(requests, outcomes, strict=True):
        assert np.array_equal(outcome.scores, toy_engine("ranking", cache_bytes=0).ask(request).scores)
    assert max(engine.model.compute.encoded_tokens) <= 7
    engine.model.cache.check_integrity()


def test_a_short_request_passes_one_of_ten_thousand_candidates() -> None:
    engine = toy_engine("ranking")
    long = submit(engine, rank(some_history(5), 10_000))
    engine.step()
    short = submit(engine, rank(some_history(6, seed=1), 6))
    assert run(engine, short) <= 2
    assert not long
    steps = run(engine, long)
    assert steps <= 10_000 // 8 + 2


def test_many_short_requests_do_not_starve_a_long_one() -> None:
    engine = toy_engine("ranking")
    long = submit(engine, rank(some_history(5), 64))
    for _ in range(40):
        submit(engine, rank(some_history(1, seed=3), 8))
        engine.step()
    assert long


def test_a_long_history_does_not_hold_others() -> None:
    engine = toy_engine("ranking", limits=Limits(step_tokens=8))
    long = submit(engine, rank(some_history(12)))
    engine.step()
    short = submit(engine, rank(some_history(1, seed=4)))
    run(engine, short, most_steps=1)
    assert not long


def test_short_requests_pass_as_many_long_ones_as_a_step_takes() -> None:
    engine = toy_engine("ranking", limits=Limits(max_users=4, max_wait_s=100))
    long = [submit(engine, rank(some_history(5, seed=n), 2_000)) for n in range(8)]
    engine.step()
    short = submit(engine, rank(some_history(6, seed=9), 4))
    run(engine, short, most_steps=3)
    assert not any(long)


def test_who_waits_long_for_pages_comes_before_every_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engine.engine.PATIENCE_S", 0.05)
    # Room for one history at a time.
    engine = toy_engine("ranking", cache_bytes=0)
    held = submit(engine, rank(some_history(12), 100))
    engine.step()
    patient = submit(engine, rank(some_history(12, seed=1)), Terms(priority=5))
    engine.step()
    time.sleep(0.06)
    urgent = submit(engine, rank(some_history(12, seed=2)), Terms(priority=0))
    run(engine, held, patient)
    assert not urgent
    run(engine, urgent)


def test_a_caller_who_cannot_be_asked_ends_alone() -> None:
    engine = toy_engine("ranking")

    def broken() -> bool:
        raise OSError("no such request")

    lost = submit(engine, rank(some_history(5), 200), Terms(is_cancelled=broken))
    other = submit(engine, rank(some_history(6), 200))
    engine.step()
    time.sleep(0.05)
    run(engine, lost, other)
    assert isinstance(lost[0], OSError)
    assert other[0].scores.shape == (200, 2)
    assert not engine.model.cache._leases


def test_a_request_that_comes_while_the_engine_ends_is_refused_and_not_lost() -> None:
    engine = toy_engine("ranking")
    engine.start()
    prepare, reached, go_on = engine.model.prepare, threading.Event(), threading.Event()

    def slow(request: Any) -> Any:
        reached.set()
        go_on.wait(5)
        return prepare(request)

    engine.model.prepare = slow  # type: ignore[method-assign]
    ends: list = []

    def late() -> None:
        try:
            submit(engine, rank(some_history(2)))
        except QueueFullError as error:
            ends.append(str(error))

    caller = threading.Thread(target=late)
    caller.start()
    reached.wait(5)
    engine.close()
    go_on.set()
    caller.join()
    assert ends == ["the model is being unloaded; try again"]


def test_priorities_come_first() -> None:
    engine = toy_engine("ranking", limits=Limits(max_users=1))
    submit(engine, rank(some_history(5)))
    engine.step()
    later = [submit(engine, rank(some_history(5)), Terms(priority=p)) for p in (2, 1, 0)]
    run(engine, later[2])
    assert not later[0]
    run(engine, *later)


def test_no_more_requests_are_taken_than_the_bound_says() -> None:
    engine = toy_engine("ranking", limits=Limits(max_queue=2))
    kept = [submit(engine, rank(some_history(2))) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait for this model already"):
        submit(engine, rank(some_history(2)))
    run(engine, *kept)
    assert engine.ask(rank(some_history(2))).scores.shape == (5, 2)
    assert engine.totals.ended == {"ok": 3, "UNAVAILABLE": 1}


def paced(engine: Engine, *, token_s: float = 0.0, answer_s: float = 0.0, request_s: float = 0.0) -> Engine:
    """The engine, which believes that its work costs so much."""
    for ratio, seconds in zip(
        (engine._pace.token, engine._pace.answer, engine._pace.request), (token_s, answer_s, request_s), strict=True
    ):
        ratio.add(1e3 * seconds, 1e3)
    engine._pace.missed.add(1e3, 1e3)
    return engine


def test_what_would_wait_too_long_is_refused_at_once_but_not_for_longer_ones_that_it_passes() -> None:
    engine = paced(toy_engine("ranking", limits=Limits(max_wait_s=0.3)), answer_s=0.001)
    taken = [submit(engine, rank(some_history(2), 200)) for _ in range(4)]
    with pytest.raises(QueueFullError, match=r"4 requests wait for this model already, this one for 0\.8 s"):
        submit(engine, rank(some_history(2), 200))
    # Four times its own ten milliseconds, of each: what longer ones may take from it.
    taken.append(submit(engine, rank(some_history(2), 10)))
    # The most urgent are not asked: a supervisor's canary, a deployment's golden requests.
    taken.append(submit(engine, rank(some_history(2), 200), Terms(priority=0)))
    run(engine, *taken)


def test_what_cannot_begin_before_its_deadline_is_refused_at_once() -> None:
    engine = paced(toy_engine("ranking"), request_s=0.02)
    taken = [submit(engine, rank(some_history(2))) for _ in range(5)]
    with pytest.raises(QueueFullError, match=r"this one for 0\.1 s"):
        submit(engine, rank(some_history(2)), Terms(deadline=time.monotonic() + 0.05))
    taken.append(submit(engine, rank(some_history(2)), Terms(deadline=time.monotonic() + 5)))
    run(engine, *taken)


def test_nobody_is_refused_for_the_less_urgent_and_all_for_the_more_urgent() -> None:
    engine = paced(toy_engine("ranking", limits=Limits(max_wait_s=0.3)), answer_s=0.001)
    taken = [submit(engine, rank(some_history(2), 400), Terms(priority=3)) for _ in range(4)]
    taken.append(submit(engine, rank(some_history(2), 400), Terms(priority=2)))
    with pytest.raises(QueueFullError, match=r"this one for 0\.4 s"):
        submit(engine, rank(some_history(2), 1), Terms(priority=3))
    run(engine, *taken)


def test_a_history_counts_by_what_is_left_of_it_and_by_the_usual_hits_before_it_is_looked_for() -> None:
    engine = paced(toy_engine("ranking", limits=Limits(step_tokens=8)), token_s=0.01)
    first = submit(engine, rank(some_history(12), 1))
    (waiting,) = engine._arrived
    assert engine._pace.work_s(waiting) == pytest.approx(25 * 0.01, rel=0.01)
    engine.step()
    (running,) = engine._running
    assert engine._pace.work_s(running) == pytest.approx(engine._pace.token.value * 17, rel=0.1)
    run(engine, first)
    for _ in range(300):
        engine.ask(rank(some_history(12), 1))
    again = submit(engine, rank(some_history(12), 1))
    (waiting,) = engine._arrived
    assert engine._pace.missed.value < 0.01
    assert engine._pace.work_s(waiting) < engine._pace.token.value + engine._pace.request.value + 0.01
    run(engine, again)


def test_a_hiccup_hardly_moves_what_a_unit_of_work_is_taken_for_and_a_change_does() -> None:
    ratio = Ratio()
    assert ratio.value == 0
    ratio.add(1.0, 0)
    ratio.add(0.0, 50)
    for _ in range(100):
        ratio.add(0.5, 50)
    ratio.add(60.0, 50)
    assert 0.01 < ratio.value < 0.012
    for _ in range(100):
        ratio.add(1.0, 50)
    assert ratio.value == pytest.approx(0.02, rel=0.01)


def test_late_and_cancelled_requests_end_and_give_their_pages_back() -> None:
    engine = toy_engine("ranking")
    gone = threading.Event()
    late = submit(engine, rank(some_history(5), 100), Terms(deadline=time.monotonic() + 0.05))
    cancelled = submit(engine, rank(some_history(5), 100), Terms(is_cancelled=gone.is_set))
    engine.step()
    gone.set()
    time.sleep(0.08)
    engine.step()
    assert isinstance(late[0], LateError)
    assert isinstance(cancelled[0], CancelledError)
    assert engine.num_jobs == 0
    engine.model.cache.check_integrity()
    assert not engine.model.cache._leases
    assert engine.totals.ended == {"CANCELLED": 2}


def test_with_many_in_the_engine_few_are_asked_for_a_step_and_all_in_their_turn() -> None:
    engine = toy_engine("ranking", limits=Limits(max_users=8))
    asked: list[int] = []
    for number in range(20):
        submit(engine, rank(some_history(5), 100), Terms(is_cancelled=lambda n=number: asked.append(n) or False))
    time.sleep(CANCEL_POLL_S)
    for count in range(1, 3):
        engine.step()
        assert len(asked) == count * MAX_ASKED
    # Those that wait for a place cost nothing, so nobody asks for them.
    assert sorted(asked) == list(range(8))


def test_a_caller_who_went_while_the_request_waited_gets_nothing_computed() -> None:
    engine = toy_engine("ranking", limits=Limits(max_users=1))
    first = submit(engine, rank(some_history(5), 20))
    gone = submit(engine, rank(some_history(30), 20), Terms(is_cancelled=lambda: True))
    time.sleep(CANCEL_POLL_S)
    run(engine, first, gone)
    assert isinstance(gone[0], CancelledError)
    assert engine.totals.num_answers == 20
    assert engine.model.compute.encoded_tokens == [11]


def test_what_goes_wrong_between_computations_ends_the_requests_and_not_the_thread(caplog: Any) -> None:
    engine = toy_engine("ranking")
    result, engine.model.result = engine.model.result, lambda job: 1 / 0
    engine.start()
    broken = submit(engine, rank(some_history(5)))
    while not broken:
        time.sleep(0.001)
    assert isinstance(broken[0], ZeroDivisionError)
    assert "event=step_failed" in caplog.text
    engine.model.result = result
    right = submit(engine, rank(some_history(5)))
    engine.close()
    assert right[0].scores.shape == (5, 2)
    engine.model.cache.check_integrity()


def test_a_step_that_breaks_ends_its_requests_and_not_the_engine() -> None:
    engine = toy_engine("ranking")
    engine.model.compute.broken = True
    with pytest.raises(RuntimeError, match="secret"):
        engine.ask(rank(some_history(5)))
    engine.model.compute.broken = False
    engine.model.cache.check_integrity()
    assert not engine.model.cache._leases
    assert engine.ask(rank(some_history(5))).cached_tokens == 0


def test_a_broken_request_is_refused_before_it_is_queued() -> None:
    engine = toy_engine("ranking")
    with pytest.raises(InvalidRequestError, match="REQUEST_TIME"):
        submit(engine, rank(some_history(5), at=-1))
    assert engine.num_jobs == 0


def test_an_answer_that_cannot_be_sent_stops_nobody() -> None:
    engine = toy_engine("ranking")

    def gone(job: Any, outcome: Any) -> None:
        raise OSError("no reader")

    engine.submit(rank(some_history(5)), gone)
    assert engine.ask(rank(some_history(5))).scores.shape == (5, 2)


def test_the_thread_answers_what_is_there_before_it_ends() -> None:
    engine = toy_engine("retrieval")
    engine.start()
    request = RetrieveRequest(history=some_history(4), k=3, exclude=NONE, request_time=LATE)
    outcomes = [submit(engine, request) for _ in range(20)]
    engine.close()
    assert all(len(outcome[0].items) == 3 for outcome in outcomes)
    assert not engine.alive
    with pytest.raises(QueueFullError):
        submit(engine, request)


def test_shares_add_up_to_the_budget_and_the_oldest_gets_some() -> None:
    jobs = [toy_engine("ranking").model.prepare(rank(some_history(1), n)) for n in (100, 3, 50, 7)]
    for budget in (1, 4, 20, 60, 1000):
        parts = share(jobs, lambda job: job.answers_left, budget)
        assert parts[0][0] is jobs[0]
        assert parts[0][1] >= min(100, max(1, budget // 4))
        assert sum(count for _, count in parts) == min(budget, 160)
        assert all(0 < count <= job.answers_left for job, count in parts)
    assert [count for _, count in share(jobs, lambda job: job.answers_left, 20)] == [5, 3, 5, 7]


class EngineAgainstOracle(RuleBasedStateMachine):
    """Histories grow, are cut, edited and get other next times; requests of all of them are in the engine at once, in a
    cache of a few pages, and models are swapped; each answer is held against an engine that recomputes everything."""

    users = strategies.integers(0, 3)

    @initialize(kind=strategies.sampled_from(["ranking", "retrieval"]), cache_bytes=strategies.integers(0, 9_000))
    def begin(self, kind: str, cache_bytes: int) -> None:
        self.kind, self.cache_bytes, self.version = kind, cache_bytes, 0
        self.histories: dict[int, list[tuple[int, int, int]]] = {user: [] for user in range(4)}
        self.waiting: list[tuple[list, Any]] = []
        self.swap()

    @rule()
    def swap(self) -> None:
        # The old model answers what it has; its cache goes with it.
        asked: list[Any] = []
        if self.version:
            self.settle()
            asked = list(self.engine.recent._histories.values())
        self.version += 1
        own = {"digest": f"model {self.version}", "salt": self.version}
        limits = Limits(max_users=3, step_tokens=9)
        self.engine = toy_engine(self.kind, cache_bytes=self.cache_bytes, limits=limits, **own)
        self.oracle = toy_engine(self.kind, cache_bytes=0, **own)
        # A new model begins with what the old one was asked for, computed by its own weights.
        recent.encode_ahead(self.engine.model, self.engine.recent, asked, 60.0)

    @rule(user=users, num_events=strategies.integers(1, 24), item=strategies.integers(0, 2))
    def append(self, user: int, num_events: int, item: int) -> None:
        events = self.histories[user]
        start = len(events)
        events.extend((105 + item, 1, 10 * (start + i)) for i in range(num_events))
        del events[40:]

    @rule(user=users, share=strategies.floats(0, 1))
    def edit(self, user: int, share: float) -> None:
        if events := self.histories[user]:
            at = int(share * (len(events) - 1))
            events[at] = (105 + (events[at][0] - 104) % 3, 2, events[at][2])

    @rule(user=users, share=strategies.floats(0, 1))
    def other_next_time(self, user: int, share: float) -> None:
        if events := self.histories[user]:
            at = int(share * (len(events) - 1))
            item, action, happened = events[at]
            events[at] = (item, action, happened - happened % 10 + (happened + 1) % 10)

    @rule(user=users, share=strategies.floats(0, 1))
    def cut(self, user: int, share: float) -> None:
        del self.histories[user][int(share * len(self.histories[user])) :]

    @rule(user=users, num_candidates=strategies.integers(0, 20), delay=strategies.integers(0, 3))
    def ask(self, user: int, num_candidates: int, delay: int) -> None:
        past = history(self.histories[user])
        at = (int(past.times[-1]) if len(past.times) else 0) + delay
        request = rank(past, num_candidates, at)
        if self.kind == "retrieval":
            request = RetrieveRequest(history=past, k=1 + num_candidates, exclude=NONE, request_time=at)
        self.waiting.append((submit(self.engine, request), request))

    @rule()
    def step(self) -> None:
        self.engine.step()

    @rule()
    def settle(self) -> None:
        run(self.engine, *(outcomes for outcomes, _ in self.waiting))
        for (outcome,), request in self.waiting:
            expected = self.oracle.ask(request)
            if self.kind == "ranking":
                assert np.array_equal(outcome.scores, expected.scores)
            else:
                # The product with the catalogue is one of all users of a step: it rounds by their number.
                np.testing.assert_allclose(outcome.scores, expected.scores, rtol=1e-6, atol=1e-6)
                assert np.array_equal(outcome.items, expected.items)
        self.waiting.clear()

    @invariant()
    def integrity(self) -> None:
        self.engine.model.cache.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.settle()


TestEngineAgainstOracle = EngineAgainstOracle.TestCase
TestEngineAgainstOracle.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)

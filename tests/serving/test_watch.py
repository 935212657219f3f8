"""When the supervisor takes a model for dead, and when it does not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from serving.canary import Check, Outcome, inputs_for, outcome_of, work_done
from serving.watch import ModelWatch, Policy

POLICY = Policy(num_failed=3, num_missed=5, stalled_s=20.0, blind_s=120.0)
WANTED = {"model_digest": "a"}


def check(outcome: Outcome, **parameters: str) -> Check:
    return Check(model="gr_ranker", outcome=outcome, milliseconds=1.0, error="", parameters=parameters or WANTED)


def judged(outcomes: list[Outcome], *, work: list[float | None], period_s: float = 1.0) -> list[str | None]:
    """What is said of one canary after the other, `period_s` apart, when the model's own figures are these."""
    watch, done = ModelWatch(POLICY), iter(work)
    return [watch.judge(check(o), WANTED, at * period_s, lambda: next(done)) for at, o in enumerate(outcomes)]


def test_the_servers_word_that_a_process_died_counts_at_once() -> None:
    assert judged([Outcome.DEAD], work=[]) == ["stub_died"]


def test_a_model_that_answers_late_but_works_is_never_taken_for_dead() -> None:
    assert set(judged([Outcome.LATE] * 300, work=[float(at // 15) for at in range(300)])) == {None}


def test_a_model_that_does_no_work_for_anybody_is_stalled_after_the_time_that_is_allowed() -> None:
    reasons = judged([Outcome.LATE] * 30, work=[7.0] * 30)
    assert reasons.index("stalled") == 20


def test_few_canaries_never_make_a_model_stalled_however_far_apart() -> None:
    assert set(judged([Outcome.LATE] * 4, work=[7.0] * 4, period_s=60.0)) == {None}


def test_without_figures_more_patience_is_had() -> None:
    reasons = judged([Outcome.LATE] * 150, work=[None] * 150)
    assert reasons.index("stalled") == 120


def test_an_answer_makes_all_before_it_forgotten() -> None:
    row = [Outcome.LATE] * 19 + [Outcome.ANSWERS] + [Outcome.LATE] * 19
    assert set(judged(row, work=[7.0] * len(row))) == {None}
    assert judged([Outcome.FAILS, Outcome.FAILS, Outcome.ANSWERS, Outcome.FAILS], work=[])[-1] is None


@pytest.mark.parametrize(("outcome", "reason"), [(Outcome.FAILS, "internal_errors"), (Outcome.ABSENT, "not_loaded")])
def test_errors_of_the_model_itself_count_when_they_stay(outcome: Outcome, reason: str) -> None:
    assert judged([outcome] * 3, work=[]) == [None, None, reason]


def test_another_model_than_the_repositorys_counts_when_it_stays() -> None:
    watch = ModelWatch(POLICY)
    other = check(Outcome.ANSWERS, model_digest="b")
    assert [watch.judge(other, WANTED, 0.0, lambda: None) for _ in range(3)][-1] == "other_model_than_the_repository"
    assert watch.judge(check(Outcome.ANSWERS), WANTED, 0.0, lambda: None) is None
    assert watch.judge(other, WANTED, 0.0, lambda: None) is None
    assert watch.judge(other, None, 0.0, lambda: None) is None


@given(st.lists(st.sampled_from([Outcome.ANSWERS, Outcome.LATE, Outcome.FAILS, Outcome.ABSENT]), max_size=40))
def test_nothing_is_done_before_the_third_canary_without_an_answer(row: list[Outcome]) -> None:
    unanswered = 0
    for outcome, reason in zip(row, judged(row, work=[7.0] * len(row), period_s=100.0), strict=True):
        unanswered = 0 if outcome is Outcome.ANSWERS else unanswered + 1
        assert reason is None or unanswered >= 3


@pytest.mark.parametrize(
    ("status", "message", "outcome"),
    [
        ("StatusCode.INTERNAL", "Stub process 'gr_ranker_0_0' is not healthy.", Outcome.DEAD),
        ("StatusCode.INTERNAL", "internal error", Outcome.FAILS),
        ("StatusCode.NOT_FOUND", "Request for unknown model: 'm' has no available versions", Outcome.ABSENT),
        ("StatusCode.UNAVAILABLE", "Request for unknown model: 'm' is not found", Outcome.ABSENT),
        ("StatusCode.UNAVAILABLE", "512 requests wait for this model already; try again later", Outcome.LATE),
        ("StatusCode.DEADLINE_EXCEEDED", "Deadline Exceeded", Outcome.LATE),
        ("StatusCode.INVALID_ARGUMENT", "USER must not be empty", Outcome.ANSWERS),
    ],
)
def test_an_error_says_whether_the_model_lives(status: str, message: str, outcome: Outcome) -> None:
    assert outcome_of(status, message) is outcome


def test_a_canary_fits_any_configuration_and_carries_nothing() -> None:
    config = model_config_pb2.ModelConfig()
    for name, kind, dims in [
        ("HISTORY_ITEMS", "TYPE_STRING", [-1]),
        ("HISTORY_TIMES", "TYPE_INT64", [-1]),
        ("USER", "TYPE_STRING", [1]),
        ("K", "TYPE_INT32", [1]),
        ("REQUEST_TIME", "TYPE_INT64", [1]),
    ]:
        config.input.add(name=name, data_type=model_config_pb2.DataType.Value(kind), dims=dims)
    inputs = {each.name(): each for each in inputs_for(config)}
    assert {name: each.shape() for name, each in inputs.items()} == {
        "HISTORY_ITEMS": [1, 0],
        "HISTORY_TIMES": [1, 0],
        "USER": [1, 1],
        "K": [1, 1],
        "REQUEST_TIME": [1, 1],
    }
    assert inputs["HISTORY_ITEMS"].datatype() == "BYTES"
    assert np.frombuffer(inputs["K"]._get_content(), np.int32).tolist() == [1]
    assert np.frombuffer(inputs["REQUEST_TIME"]._get_content(), np.int64).tolist() == [0]


METRICS = """# HELP gr_requests_total Requests
gr_requests_total{model="gr_ranker"} 5
gr_requests_total{model="gr_ranker_shadow"} 100
gr_steps_total{model="gr_ranker"} 7
gr_rejected_total{model="gr_ranker"} 1000
gr_request_seconds_count{model="gr_ranker"} 5
gr_queue_requests{model="gr_ranker"} 64
nv_inference_request_success{model="gr_ranker",version="1"} 9000
nv_inference_request_success{model="other",version="1"} 9
"""


@pytest.mark.parametrize(("model", "figure"), [("gr_ranker", 17.0), ("other", 9.0), ("absent", None)])
def test_work_is_what_the_model_did_not_what_it_took_or_refused(
    monkeypatch: pytest.MonkeyPatch, model: str, figure: float | None
) -> None:
    class Opened:
        def open(self, url: str, timeout: float) -> "Opened":
            assert url == "http://127.0.0.1:8002/metrics"
            return self

        def __enter__(self) -> "Opened":
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def read(self) -> bytes:
            return METRICS.encode()

    monkeypatch.setattr("urllib.request.build_opener", lambda *_: Opened())
    assert work_done("127.0.0.1:8002", model) == figure


def test_a_server_without_metrics_tells_of_no_work() -> None:
    assert work_done("127.0.0.1:9", "gr_ranker") is None

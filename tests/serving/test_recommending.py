"""Recommendations with other models that are functions: what is asked, returned, logged and scored by a challenger."""

import time

import numpy as np
import pytest

from gr_platform import serving_state
from serving import backend, history_base, recommending
from serving.answering import calls
from serving.engine.requests import InvalidRequestError
from serving.recommending import RecommenderModel
from serving.user_models import EventsModel, UserRecommenderModel
from tests.serving.fake_server import InferenceResponse, Request, Tensor, TritonError, arguments, fake_pb_utils
from tests.serving.sequences import write_sequences
from tests.serving.test_served_log import rows_in, until

DS = "made"
NO_IDS = np.zeros((1, 0), np.int64)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(backend.np, "__version__", "1.26.4")
    monkeypatch.setattr(history_base, "CHECK_S", 0.0)
    monkeypatch.setenv("GR_HOME", str(tmp_path))
    return tmp_path


def scalar(value, dtype=np.int64):
    return np.array([[value]], dtype)


def retriever(request):
    count = int(request.inputs["K"][0, 0])
    return InferenceResponse(
        [
            Tensor("ITEMS", np.arange(100, 100 + count)[None]),
            Tensor("CACHED_TOKENS", scalar(3)),
            Tensor("MODEL_DIGEST", np.array([[b"r1"]], object)),
        ]
    )


def ranker(request):
    """Probabilities that rise with the candidate."""
    scores = request.inputs["CANDIDATES"][0].astype(np.float32)[:, None] / 1000 * [1.0, 0.5]
    return InferenceResponse(
        [
            Tensor("SCORES", scores[None].astype(np.float32)),
            Tensor("CACHED_TOKENS", scalar(4)),
            Tensor("MODEL_DIGEST", np.array([[b"k2"]], object)),
        ]
    )


def shadow(request):
    scores = -request.inputs["CANDIDATES"][0].astype(np.float32)[:, None]
    return InferenceResponse([Tensor("SCORES", scores[None]), Tensor("MODEL_DIGEST", np.array([[b"s2"]], object))])


def loaded(kind, models, **parameters):
    model = type("Tested", (kind,), {"pb_utils": fake_pb_utils(models)})()
    facts = {
        "dataset": DS,
        "item_id_type": "int64",
        "user_id_type": "int64",
        "actions": ["view", "like", "purchase"],
        "tasks": ["like", "purchase"],
        "retrieval_depth": 20,
        "retriever_digest": "r1",
        "ranker_digest": "k1",
        "shadow_digest": "",
        "shadow_tasks": [],
        "shadow_share": 0.0,
        "log_bytes": 1 << 20,
        "log_seconds": 60,
        "history_bytes": 1 << 20,
        "history_events": 3,
        "exclude_seen": "none",
    }
    model.initialize(arguments(**(facts | parameters)))
    return model


def asked(*, k=5, times=(10, 20), timeout_us=0, exclude=NO_IDS, **parameters):
    inputs = {
        "HISTORY_ITEMS": np.arange(len(times))[None],
        "HISTORY_ACTIONS": np.ones((1, len(times)), np.int64),
        "HISTORY_TIMES": np.array([times], np.int64),
        "HISTORY_OFFSET": scalar(0),
        "REQUEST_TIME": scalar(30),
        "EXCLUDE": exclude,
        "K": scalar(k, np.int32),
    }
    return Request(inputs, timeout_us=timeout_us, **parameters)


def answered(model, request):
    model.execute([request])
    return request.answer()


PAIR = {"gr_retriever": retriever, "gr_ranker": ranker, recommending.CHALLENGER: shadow}


def test_the_best_of_the_retrieved_are_returned_and_logged_without_the_users_id(home):
    model = loaded(RecommenderModel, PAIR)
    answer = answered(model, asked(user="person-7"))
    assert answer.outputs["ITEMS"].tolist() == [[119, 118, 117, 116, 115]]
    assert answer.outputs["CACHED_TOKENS"].tolist() == [[7]]
    answered(model, asked(k=1))
    model.finalize()
    rows = sorted(rows_in(serving_state.served_folder(home, DS)), key=lambda row: -len(row["items"]))
    assert rows[0]["user_hash"] == serving_state.user_hash(serving_state.hash_key(home), DS, "person-7")
    assert [row["items"] for row in rows] == [[119, 118, 117, 116, 115], [119]]
    assert rows[0]["scores"] == answer.outputs["SCORES"][0].tolist()
    assert (rows[0]["request_id"], rows[0]["request_ts"]) == ("request 1", 30)
    # Of the models that answered: the ranker has been swapped already, the recommender not yet.
    assert (rows[0]["retriever_digest"], rows[0]["ranker_digest"]) == ("r1", "k2")
    assert rows[1]["user_hash"] is None
    assert abs(rows[0]["served_ts"] - 1000 * time.time()) < 60_000
    assert all(b"person-7" not in path.read_bytes() for path in home.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "K is 0"),
        ({"k": 10_001}, "K is 10001, must be from 1 to 10000"),
        ({"times": (20, 10)}, "HISTORY_TIMES[1] is 10, earlier"),
        ({"user": 1.5}, "the parameter user must be a text"),
        ({"user": "x" * 2000}, "the parameter user must be a text"),
        ({"user": "\ud800"}, "the parameter user must be a text"),
        ({"request_id": "x" * 2000}, "the request id must be a text of at most 1024 bytes"),
    ],
    ids=["none", "many", "times", "fraction", "long", "half", "id"],
)
def test_a_broken_request_is_refused_before_any_call(changes, message):
    model = loaded(RecommenderModel, {})
    request = asked(**changes)
    model.execute([request])
    text, code = request.refusal()
    assert message in text
    assert code == "INVALID_ARG"
    model.finalize()


def test_a_share_of_the_requests_is_scored_by_the_challenger_after_the_answer(home):
    model = loaded(RecommenderModel, PAIR, shadow_digest="s1", shadow_tasks=["like"], shadow_share=1.0)
    answered(model, asked(k=3))
    until(lambda: model._shadow.totals["gr_shadow_total"] == 1)
    answered(model, asked(k=2))
    until(lambda: model._shadow.totals["gr_shadow_total"] == 2)
    model.finalize()
    first, second = rows_in(serving_state.served_folder(home, DS))
    assert first["shadow_scores"] == [[-119.0], [-118.0], [-117.0]]
    assert (first["shadow_digest"], len(second["shadow_scores"])) == ("s2", 2)
    assert model.pb_utils.counters["gr_shadow_total"] >= 1


def test_a_challenger_that_fails_or_lags_costs_no_answer_and_no_row(home, monkeypatch):
    monkeypatch.setattr(recommending, "MAX_SHADOWS", 1)

    def broken(_):
        time.sleep(0.3)
        return InferenceResponse(error=TritonError("/opt/shadow is gone"))

    model = loaded(
        RecommenderModel,
        PAIR | {recommending.CHALLENGER: broken},
        shadow_digest="s1",
        shadow_tasks=["like"],
        shadow_share=1,
    )
    began = time.monotonic()
    for _ in range(3):
        assert not answered(model, asked()).has_error()
    assert time.monotonic() - began < 0.25
    until(lambda: model._shadow.totals["gr_shadow_failed_total"] == 1)
    model.finalize()
    rows = rows_in(serving_state.served_folder(home, DS))
    assert [row["shadow_scores"] for row in rows] == [None] * 3
    assert sorted(row["shadow_digest"] or "" for row in rows) == ["", "", "s1"]
    assert model._shadow.totals == {"gr_shadow_total": 0, "gr_shadow_dropped_total": 2, "gr_shadow_failed_total": 1}


def test_a_challenger_that_failed_is_asked_about_the_next_one(home, monkeypatch):
    monkeypatch.setattr(recommending, "MAX_SHADOWS", 1)
    broken = PAIR | {recommending.CHALLENGER: lambda _: InferenceResponse(error=TritonError("gone"))}
    model = loaded(RecommenderModel, broken, shadow_digest="s1", shadow_tasks=["like"], shadow_share=1)
    for number in (1, 2, 3):
        answered(model, asked())
        until(lambda: model._shadow._places._value == 1 and model._shadow.totals["gr_shadow_failed_total"] == number)  # noqa: B023
    model.finalize()
    assert model._shadow.totals["gr_shadow_dropped_total"] == 0


def test_the_platforms_own_requests_are_not_logged(home):
    model = loaded(RecommenderModel, PAIR)
    for request_id in ("gr-canary", "gr-golden", "a caller's"):
        answered(model, asked(request_id=request_id))
    model.finalize()
    assert [row["request_id"] for row in rows_in(serving_state.served_folder(home, DS))] == ["a caller's"]


def test_a_log_of_no_bytes_is_none(home):
    model = loaded(RecommenderModel, PAIR, log_bytes=0, shadow_digest="s1", shadow_share=1.0)
    assert not answered(model, asked()).has_error()
    model.finalize()
    assert list(home.iterdir()) == []


def user_asks(user=1, *, at=100, exclude=NO_IDS):
    return Request({"USER": scalar(user), "REQUEST_TIME": scalar(at), "EXCLUDE": exclude, "K": scalar(2, np.int32)})


def appended(user, items, actions, times):
    rows = {"ITEMS": items, "ACTIONS": actions, "TIMES": times}
    return Request({"USER": scalar(user)} | {name: np.array([row], np.int64) for name, row in rows.items()})


@pytest.fixture
def seen():
    """Requests that reach gr_recommender."""
    return []


@pytest.fixture
def by_user(seen):
    def below(request):
        seen.append(request)
        outputs = {"ITEMS": np.array([[7, 8]]), "SCORES": np.zeros((1, 2, 2), np.float32), "CACHED_TOKENS": scalar(1)}
        return InferenceResponse([Tensor(name, value) for name, value in outputs.items()])

    return {"gr_recommender": below}


def test_a_recommendation_by_user_id_is_asked_for_with_the_kept_history(home, by_user, seen):
    write_sequences(home, DS, {1: [(1000 + at, 1, at) for at in range(5)]})
    events = loaded(EventsModel, {})
    (length,) = events.execute([appended(1, [50, 51], [2, 4], [90, 101])])
    assert length.outputs["NUM_EVENTS"].tolist() == [[7]]
    model = loaded(UserRecommenderModel, by_user)
    assert answered(model, user_asks()).outputs["ITEMS"].tolist() == [[7, 8]]
    inputs = seen[0].inputs
    assert inputs["HISTORY_ITEMS"].tolist() == [[1003, 1004, 50]]
    assert inputs["HISTORY_ACTIONS"].tolist() == [[1, 1, 2]]
    assert inputs["HISTORY_TIMES"].tolist() == [[3, 4, 90]]
    assert inputs["HISTORY_OFFSET"].tolist() == [[3]]
    assert seen[0].fields["parameters"]["user"] == "1"
    answered(model, user_asks(999))
    assert seen[1].inputs["HISTORY_ITEMS"].shape == (1, 0)
    model.finalize()
    events.finalize()


def test_where_seen_items_are_withheld_those_before_the_visible_history_are_excluded_too(home, by_user, seen):
    write_sequences(home, DS, {1: [(1000 + at % 4, 1, at) for at in range(8)]})
    model = loaded(UserRecommenderModel, by_user, exclude_seen="all", history_events=2)
    answered(model, user_asks(exclude=np.array([[5]])))
    assert seen[0].inputs["HISTORY_ITEMS"].tolist() == [[1002, 1003]]
    assert seen[0].inputs["HISTORY_OFFSET"].tolist() == [[6]]
    assert seen[0].inputs["EXCLUDE"].tolist() == [[5, 1000, 1001, 1002, 1003]]
    model.finalize()


def test_actions_that_the_served_models_do_not_know_are_left_out(home, by_user, seen):
    write_sequences(home, DS, {1: [(1000, 7, 1)]})
    model = loaded(UserRecommenderModel, by_user, actions=["view", "like"])
    answered(model, user_asks())
    assert seen[0].inputs["HISTORY_ACTIONS"].tolist() == [[3]]
    model.finalize()


def test_the_error_of_the_recommender_reaches_the_caller_with_its_code(home):
    def below(request):
        return calls.error_response(fake_pb_utils({}), coded, *calls.described(InvalidRequestError("K is 0")))

    coded = asked(**{calls.CODED: "1"})
    model = loaded(UserRecommenderModel, {"gr_recommender": below})
    request = user_asks()
    model.execute([request])
    assert request.refusal() == ("K is 0", "INVALID_ARG")
    model.finalize()


def test_of_a_batch_of_events_the_bad_ones_are_named_and_the_good_ones_stored(home):
    model = loaded(EventsModel, {})
    batch = [
        appended(1, [5], [1], [10]),
        appended(1, [5], [9], [10]),
        appended(2, [5, 6], [1], [10]),
        appended(2, [5], [1], [10**15]),
        Request({"USER": np.array([[1, 2]]), "ITEMS": NO_IDS, "ACTIONS": NO_IDS, "TIMES": NO_IDS}),
        appended(1, [6], [1], [11]),
        appended(3, [], [], []),
    ]
    answers = model.execute(batch)
    lengths = [None if answer.has_error() else answer.outputs["NUM_EVENTS"][0, 0] for answer in answers]
    assert lengths == [1, None, None, None, None, 2, 0]
    errors = [answer.error() for answer in answers if answer.has_error()]
    assert {error.code for error in errors} == {"INVALID_ARG"}
    named = ["ACTIONS[0] is 9", "must be equally long", "s ahead of the server's clock", "USER holds 2 values"]
    assert all(text in error.message() for text, error in zip(named, errors, strict=True))
    model.finalize()
    counted = model.pb_utils.counters
    assert [counted[name] for name in ("gr_requests_total", "gr_events_appended_total", "gr_failed_total")] == [3, 2, 0]


def test_histories_that_cannot_be_reached_are_unavailable_until_they_can(home, by_user, monkeypatch, caplog):
    monkeypatch.setattr("serving.user_models.REOPEN_S", 0.3)
    file = serving_state.histories_file(home, DS)
    file.parent.mkdir()
    file.write_bytes(b"no database" * 1000)
    events, model = loaded(EventsModel, {}), loaded(UserRecommenderModel, by_user)
    (refused,) = events.execute([appended(1, [5], [1], [10])])
    assert (refused.error().message(), refused.error().code) == (
        "the histories are not available now; try again",
        "UNAVAILABLE",
    )
    request = user_asks()
    model.execute([request])
    assert request.refusal()[1] == "UNAVAILABLE"
    assert "histories/made.sqlite is damaged" in caplog.text
    file.unlink()
    (soon,) = events.execute([appended(1, [5], [1], [10])])
    assert soon.error().code == "UNAVAILABLE", "the store is tried for every request"
    time.sleep(0.3)
    (stored,) = events.execute([appended(1, [5], [1], [10])])
    assert stored.outputs["NUM_EVENTS"].tolist() == [[1]]
    assert not answered(model, user_asks()).has_error()
    model.finalize()
    events.finalize()

"""Every request is answered once, with the code that fits, and none waits for another's calls."""

import threading
import time

import numpy as np
import pytest

from serving import backend, calls
from serving.answering import Answer, AnsweringModel
from serving.calls import CalledModelError, RefusedError
from serving.engine.requests import InvalidRequestError
from tests.serving.fake_server import (
    InferenceResponse,
    Request,
    Tensor,
    TritonError,
    TritonModelException,
    arguments,
    fake_pb_utils,
)


@pytest.fixture(autouse=True)
def _any_numpy(monkeypatch):
    """The server's Python has numpy 1, which these tests do not need."""
    monkeypatch.setattr(backend.np, "__version__", "1.26.4")


@pytest.fixture
def serve():
    """Return serve(answer, below, **parameters) -> a loaded model that answers so and calls `below`."""
    loaded = []

    def make(answer, below=None, **parameters):
        class Model(AnsweringModel):
            pb_utils = fake_pb_utils({"below": below})

            def open(self, parameters):
                self.closed = False

            def answer(self, call):
                return answer(call)

            def close(self):
                self.closed = True

        model = Model()
        model.initialize(arguments(**parameters))
        loaded.append(model)
        return model

    yield make
    for model in loaded:
        model.finalize()
        assert model.closed


def asking(value=0, **options):
    return Request({"X": np.array([[value]])}, **options)


def twice(call):
    return Answer(outputs={"Y": call.arrays(["X"])["X"] * 2})


def through(call):
    (found,) = call.ask("below", {"X": np.array([[1]])}, ["Y"])
    return Answer(outputs={"Y": found})


def test_requests_are_answered_one_by_one_and_a_slow_one_holds_no_other(serve):
    go = threading.Event()

    def answer(call):
        value = call.arrays(["X"])["X"][0, 0]
        if value == 9:
            go.wait(10)
        if value == 3:
            raise KeyError("/secret/path")
        return twice(call)

    model = serve(answer)
    slow, good, broken = asking(9), asking(5), asking(3)
    assert model.execute([slow, good, broken]) == [None] * 3
    assert good.answer().outputs["Y"].tolist() == [[10]]
    assert broken.refusal() == ("internal error", "INTERNAL")
    assert slow.num_answers == 0
    go.set()
    assert slow.answer().outputs["Y"].tolist() == [[18]]
    model.finalize()
    counted = model.pb_utils.counters
    assert [counted[f"gr_{end}"] for end in ("requests_total", "failed_total", "request_seconds")] == [2, 1, 2]


def test_more_than_may_be_in_flight_are_refused_at_once_and_room_is_given_back(serve):
    go = threading.Event()

    def answer(call):
        go.wait(10)
        return twice(call)

    model = serve(answer, max_in_flight=3)
    requests = [asking(number) for number in range(5)]
    model.execute(requests)
    for refused in requests[3:]:
        assert refused.refusal() == ("too many requests are in flight; try again", "UNAVAILABLE")
    go.set()
    assert [request.answer().outputs["Y"][0, 0] for request in requests[:3]] == [0, 2, 4]
    model._figures._show()
    assert model.pb_utils.counters["gr_rejected_total"] == 2
    for number in range(20):
        again = asking(number)
        model.execute([again])
        assert again.answer().outputs["Y"].tolist() == [[2 * number]]
    assert {request.num_answers for request in requests} == {1}


@pytest.mark.parametrize(
    ("text", "message", "code"),
    [
        ("INVALID_ARGUMENT: K is 0", "K is 0", "INVALID_ARG"),
        ("UNAVAILABLE: the queue is full", "the queue is full", "UNAVAILABLE"),
        ("CANCELLED: given up", "given up", "CANCELLED"),
        ("INTERNAL: internal error", "internal error", "INTERNAL"),
        ("internal error", "internal error", "INTERNAL"),
        ("Stub process '/opt/x' is not healthy.", "below is not available now; try again", "UNAVAILABLE"),
        ("in ensemble: /a/b: no version", "below is not available now; try again", "UNAVAILABLE"),
    ],
)
def test_the_code_of_a_called_models_error_is_kept_and_no_text_that_was_not_for_callers(
    serve, caplog, text, message, code
):
    failing = serve(through, lambda request: InferenceResponse(error=TritonError(text)))
    request = asking()
    failing.execute([request])
    assert request.refusal() == (message, code)
    coded = asking(**{calls.CODED: "1"})
    failing.execute([coded])
    name = "INVALID_ARGUMENT" if code == "INVALID_ARG" else code
    assert coded.refusal() == (f"{name}: {message}", code)
    if "/" in text:
        assert text in caplog.text


def test_a_server_that_does_not_take_a_call_is_unavailable(serve):
    def below(_):
        raise TritonModelException("model 'below' is not ready, see /opt/x")

    request = asking()
    serve(through, below).execute([request])
    assert request.refusal() == ("below is not available now; try again", "UNAVAILABLE")


def test_a_calls_timeout_is_what_is_left_and_a_request_whose_time_has_passed_makes_none(serve):
    timeouts = []

    def below(request):
        timeouts.append(request.fields["timeout"])
        assert request.fields["parameters"][calls.CODED]
        time.sleep(0.06)
        return InferenceResponse([Tensor("Y", request.inputs["X"])])

    def answer(call):
        through(call)
        return through(call)

    model = serve(answer, below)
    for timeout_us, made in ((0, [0, 0]), (5_000_000, None), (50_000, None)):
        timeouts.clear()
        request = asking(timeout_us=timeout_us)
        model.execute([request])
        if timeout_us == 50_000:
            assert request.refusal() == ("the request's deadline has passed", "CANCELLED")
            assert len(timeouts) == 1
        else:
            assert request.answer().outputs["Y"].tolist() == [[1]]
            assert made in (None, timeouts)
    assert 0 < timeouts[0] <= 50_000


def test_a_called_model_gets_the_priority_of_the_request(serve):
    priorities = []

    def below(request):
        priorities.append(request.fields["parameters"].get("gr_priority"))
        return InferenceResponse([Tensor("Y", request.inputs["X"])])

    model = serve(through, below)
    for options in ({}, {"gr_priority": 0}):
        request = asking(**options)
        model.execute([request])
        request.answer()
    assert priorities == [None, 0]


def test_a_request_that_was_given_up_between_two_calls_makes_no_second(serve):
    made = []

    def below(request):
        made.append(request)
        asked.cancelled = True
        return InferenceResponse([Tensor("Y", request.inputs["X"])])

    def answer(call):
        through(call)
        call.check_wanted()
        return through(call)

    asked = asking()
    serve(answer, below).execute([asked])
    assert asked.refusal() == ("the request was cancelled", "CANCELLED")
    assert len(made) == 1


def test_a_request_that_was_given_up_while_it_waited_is_not_begun(serve, monkeypatch):
    monkeypatch.setattr("serving.answering.ASK_AFTER_S", -1.0)
    asked = asking()
    asked.cancelled = True
    serve(lambda call: pytest.fail("begun")).execute([asked])
    assert asked.refusal()[1] == "CANCELLED"


def test_an_answer_that_cannot_be_sent_becomes_an_error_that_can(serve, monkeypatch):
    real = Request.send

    def send(self, response, flags):
        if not response.has_error():
            raise MemoryError("no room in shared memory")
        real(self, response, flags)

    monkeypatch.setattr(Request, "send", send)
    request = asking()
    serve(twice).execute([request])
    assert request.refusal() == ("internal error", "INTERNAL")


def test_what_comes_after_the_answer_cannot_harm_it(serve, caplog):
    def answer(call):
        def afterwards(latency_ms):
            assert request.num_answers == 1
            assert latency_ms > 0
            raise OSError("disk is gone")

        return Answer(outputs={}, afterwards=afterwards)

    model = serve(answer)
    request = asking()
    model.execute([request])
    assert not request.answer().has_error()
    again = asking()
    request = again
    model.execute([again])
    again.answer()
    deadline = time.monotonic() + 5
    while "disk is gone" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "event=afterwards_failed" in caplog.text


def test_an_exception_is_described_as_callers_may_see_it():
    assert calls.described(InvalidRequestError("K is 0")) == ("K is 0", "INVALID_ARGUMENT")
    assert calls.described(RefusedError("later", "CANCELLED")) == ("later", "CANCELLED")
    assert calls.described(CalledModelError("/a/b")) == ("internal error", "INTERNAL")

"""One answer per request, whatever happens, and nothing of the server's inside in an error."""

import json
import logging
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from gr_platform.errors import UserError
from serving import backend, calls, wire
from serving.backend import EngineModel, ModelSettings
from serving.engine.engine import Engine, Limits
from serving.engine.ranker import Ranker
from serving.engine.requests import MAX_EVENTS, History, InvalidRequestError, RankRequest
from serving.engine_metrics import ScoreMoments
from serving.wire import MAX_ID_BYTES, decode_ids, decode_rank, encode_ids
from tests.serving.engine.toy import some_history, toy_engine

LATE = 10**7


class FakeTritonError:
    INVALID_ARG, INTERNAL, UNAVAILABLE, CANCELLED = "INVALID_ARG", "INTERNAL", "UNAVAILABLE", "CANCELLED"

    def __init__(self, message, code):
        self.message, self.code = message, code


class FakeFamily:
    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

    def __init__(self, name, description, kind):
        self.name = name
        self.metrics = {}

    def Metric(self, labels, buckets=None):
        self.metrics[tuple(labels.values())] = FakeMetric()
        return self.metrics[tuple(labels.values())]


class FakeMetric:
    value = 0.0

    def increment(self, by):
        self.value += by

    def set(self, to):
        self.value = to

    def observe(self, value):
        self.value += 1


class FakeRequest:
    """A request with the inputs of gr_ranker; the answer comes to `answer()`."""

    def __init__(self, tensors, *, timeout_us=0, parameters=None, cancelled=False, wanted=("SCORES",), id=""):
        self.tensors, self.parameters_json = tensors, json.dumps(parameters or {})
        self.wanted, self.id = wanted, id
        self.timeout_us, self.cancelled = timeout_us, cancelled
        self.answers, self.answered = [], threading.Event()
        self.fails = 0

    def get_response_sender(self):
        return self

    def send(self, response, flags):
        if self.fails:
            self.fails -= 1
            raise MemoryError("no shared memory at /dev/shm")
        assert flags == "final"
        self.answers.append(response)
        self.answered.set()

    def inputs(self):
        return [
            SimpleNamespace(name=lambda name=name: name, as_numpy=lambda value=value: value)
            for name, value in self.tensors.items()
        ]

    def requested_output_names(self):
        return list(self.wanted)

    def timeout(self):
        return self.timeout_us

    def parameters(self):
        return self.parameters_json

    def request_id(self):
        return self.id

    def is_cancelled(self):
        return self.cancelled

    def answer(self):
        assert self.answered.wait(5)
        (answer,) = self.answers
        return answer


PB_UTILS = SimpleNamespace(
    TritonError=FakeTritonError,
    MetricFamily=FakeFamily,
    TRITONSERVER_RESPONSE_COMPLETE_FINAL="final",
    Logger=SimpleNamespace(log_error=logging.getLogger("fake").error),
    Tensor=lambda name, value: (name, value),
    InferenceResponse=lambda output_tensors=None, error=None: SimpleNamespace(outputs=output_tensors, error=error),
)


def tensors(num_events=3, candidates=(105, 106), at=LATE):
    past = some_history(num_events)
    return {
        "HISTORY_ITEMS": past.items[None],
        "HISTORY_ACTIONS": past.actions[None],
        "HISTORY_TIMES": past.times[None],
        "HISTORY_OFFSET": np.array([[0]]),
        "CANDIDATES": np.array([candidates], np.int64),
        "REQUEST_TIME": np.array([[at]]),
    }


class RankerModel(EngineModel):
    pb_utils = PB_UTILS

    def __init__(self, engine: Engine):
        self._engine = engine
        self._metrics = backend.EngineMetrics(PB_UTILS, "gr_ranker", engine)
        self._senders = ThreadPoolExecutor(2)
        engine.start()

    def decode(self, tensors):
        return decode_rank(tensors)

    def encode(self, result):
        return wire.encode_rank(result)


@pytest.fixture
def model():
    made = RankerModel(toy_engine("ranking", limits=Limits(max_queue=8)))
    yield made
    made._engine.close()
    made._senders.shutdown()
    made._metrics.close()


def test_each_request_of_a_batch_gets_its_own_answer_or_error(model, caplog):
    broken = FakeRequest(tensors())
    del broken.tensors["CANDIDATES"]
    requests = [FakeRequest(tensors(at=-5)), FakeRequest(tensors()), broken]
    assert model.execute(requests) == [None] * 3
    invalid, good, failed = (request.answer() for request in requests)
    assert "REQUEST_TIME is -5" in invalid.error.message
    assert invalid.error.code == "INVALID_ARG"
    assert good.error is None
    expected = toy_engine("ranking").ask(decode_rank(tensors()))
    assert np.array_equal(good.outputs[0][1][0], expected.scores)
    assert (failed.error.message, failed.error.code) == ("internal error", "INTERNAL")
    assert "CANDIDATES" in caplog.text


def test_who_asks_for_it_is_told_which_bundle_answered(model):
    told = []
    for wanted in (("SCORES",), ("SCORES", "MODEL_DIGEST")):
        request = FakeRequest(tensors(), wanted=wanted)
        model.execute([request])
        told.append(dict(request.answer().outputs).get("MODEL_DIGEST"))
    assert told[0] is None
    assert told[1].tolist() == [[b"model"]]


def test_what_breaks_inside_is_logged_and_not_told(model, caplog):
    model._engine.model.compute.broken = True
    request = FakeRequest(tensors())
    model.execute([request])
    assert (request.answer().error.message, request.answer().error.code) == ("internal error", "INTERNAL")
    assert "/secret/path" in caplog.text


def test_a_full_queue_a_passed_deadline_and_a_gone_caller_have_their_codes(model):
    gate = threading.Event()
    encode = model._engine.model.compute.encode
    model._engine.model.compute.encode = lambda pieces: (gate.wait(5), encode(pieces))[1]
    held = FakeRequest(tensors())
    model.execute([held])
    time.sleep(0.05)
    late = FakeRequest(tensors(), timeout_us=20_000)
    gone = FakeRequest(tensors(), cancelled=True)
    others = [FakeRequest(tensors(4)) for _ in range(9)]
    model.execute([late, gone, *others])
    refused = [request for request in others if request.answered.is_set()]
    time.sleep(0.05)
    gate.set()
    assert held.answer().error is None
    assert late.answer().error.code == gone.answer().error.code == "CANCELLED"
    assert "deadline passed" in late.answer().error.message
    assert len(refused) == 4
    assert {request.answer().error.code for request in refused} == {"UNAVAILABLE"}
    assert all(request.answer().error is None for request in others if request not in refused)


def test_a_model_whose_engine_has_ended_is_not_ready_and_takes_nothing(model):
    assert model.is_ready()
    engine = model._engine
    engine._thread = threading.Thread(target=lambda: None)
    engine._thread.start()
    engine._thread.join()
    assert not model.is_ready()
    request = FakeRequest(tensors())
    model.execute([request])
    assert (request.answer().error.code, engine.num_jobs) == ("UNAVAILABLE", 0)


@pytest.fixture
def own(tmp_path, random_bundle, monkeypatch):
    """The settings of a model of a random bundle, in a state folder of its own."""
    monkeypatch.setenv("GR_HOME", str(tmp_path))
    parameters = {
        "cache_bytes": str(1 << 20),
        "compute": "onnx",
        "cache_dtype": "fp32",
        "max_queue": "8",
        "max_wait_s": "1",
        "max_batch_size": "4",
    }
    bundle = random_bundle(tmp_path / "bundle", "ranking")
    return ModelSettings(name="gr_ranker", bundle=bundle, parameters=parameters, num_threads=1)


def unloaded():
    made = object.__new__(RankerModel)
    made.model = Ranker
    return made


def test_a_path_that_scores_otherwise_than_the_offline_model_is_not_served(own, monkeypatch):
    measured = SimpleNamespace(ok=False, max_abs_error=0.5, max_abs_reference=1.0)
    monkeypatch.setattr(backend, "parity", lambda *_: measured)
    with pytest.raises(UserError, match=r"differ from those of its golden requests by 5\.00e-01 of 1\.00e\+00"):
        unloaded()._loaded(own)


def test_a_model_begins_with_the_histories_that_the_one_before_it_kept(own, monkeypatch):
    monkeypatch.setattr(backend, "KEEP_EVERY_S", 0.01)
    first = unloaded()._loaded(own)
    past = History(items=np.arange(9), actions=np.ones(9, np.int64), times=np.arange(9))
    request = RankRequest(history=past, candidates=np.arange(3), request_time=LATE)
    first.ask(request)
    keeper = backend.Keeper(first, own)
    until = time.monotonic() + 10
    while not own.recent_histories.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    keeper.close()
    second = unloaded()._loaded(own)
    assert second.ask(request).cached_tokens == 19


@pytest.mark.parametrize("priority", ["high", True, -1, 0.5])
def test_a_priority_that_is_no_number_is_refused_by_name(model, priority):
    request = FakeRequest(tensors(), parameters={calls.PRIORITY: priority})
    model.execute([request])
    assert request.answer().error.code == "INVALID_ARG"
    assert request.answer().error.message == "the parameter gr_priority must be a whole number from 0"


def test_an_answer_that_finds_no_shared_memory_becomes_an_error(model, caplog):
    request = FakeRequest(tensors())
    request.fails = 1
    model.execute([request])
    assert request.answer().error.code == "INTERNAL"
    assert "/dev/shm" not in request.answer().error.message


def test_metrics_follow_what_the_engine_did(model):
    for _ in range(3):
        request = FakeRequest(tensors(6))
        model.execute([request])
        request.answer()
    model._engine.close()
    model._senders.shutdown()
    model._metrics.close()
    figures = model._metrics._figures
    values = {name: metric.value for name, metric in figures._counters.items()}
    assert values["gr_requests_total"] == 3
    assert values["gr_cache_hit_tokens_total"] == 2 * 13
    assert values["gr_cache_prefill_tokens_total"] == 13
    assert values["gr_answers_total"] == 6
    assert figures._latency.value == 3


def test_settings_refuse_numpy_2(monkeypatch):
    monkeypatch.setattr(backend.np, "__version__", "2.4.6")
    with pytest.raises(RuntimeError, match=r"numpy is 2\.4\.6"):
        ModelSettings.of({})


def test_text_ids_survive_the_wire_and_invalid_utf8_is_named():
    ids = np.array(["a", "\u00e9", ""], dtype=object)
    assert decode_ids(encode_ids(ids), "ITEMS").tolist() == ids.tolist()
    assert encode_ids(np.array([1, 2])).dtype == np.int64
    with pytest.raises(InvalidRequestError, match=r"CANDIDATES\[1\] is not valid UTF-8"):
        decode_ids(np.array([b"a", b"\xff"], dtype=object), "CANDIDATES")


def test_a_text_longer_than_an_id_may_be_is_named_and_never_decoded():
    good, long = b"x" * MAX_ID_BYTES, b"x" * (MAX_ID_BYTES + 1)
    assert len(decode_ids(np.array([good], dtype=object), "CANDIDATES")[0]) == MAX_ID_BYTES
    with pytest.raises(InvalidRequestError, match=r"CANDIDATES\[1\] has 1025 bytes"):
        decode_ids(np.array([good, long], dtype=object), "CANDIDATES")


def test_more_entries_than_allowed_are_refused_before_any_is_decoded():
    undecodable = np.full((1, MAX_EVENTS + 1), b"\xff", dtype=object)
    with pytest.raises(InvalidRequestError, match="HISTORY_ITEMS holds 100001 entries, at most 100000"):
        decode_rank({"HISTORY_ITEMS": undecodable})


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 3, 1), (0, 3)])
def test_a_wrong_shape_is_refused_by_name(shape):
    with pytest.raises(InvalidRequestError, match="HISTORY_ITEMS has shape"):
        decode_rank({"HISTORY_ITEMS": np.zeros(shape, np.int64)})


def _shown(metrics, name):
    return {labels: metric.value for labels, metric in metrics._families[name].metrics.items()}


def test_gauges_tell_until_when_the_model_learned_only_if_that_is_known():
    engine = toy_engine("ranking")
    known = backend.EngineMetrics(PB_UTILS, "m", engine, {"trained_until_ms": "1500", "exported_ms": "2000"})
    unknown = backend.EngineMetrics(PB_UTILS, "m", engine, {"trained_until_ms": "", "exported_ms": "2000"})
    assert _shown(known, "gr_model_trained_until_seconds") == {("m",): 1.5}
    assert _shown(unknown, "gr_model_exported_seconds") == {("m",): 2.0}
    assert math.isnan(_shown(unknown, "gr_model_trained_until_seconds")["m",])
    known.close()
    unknown.close()


def test_gauges_of_scores_are_those_of_the_answers(model):
    request = FakeRequest(tensors())
    model.execute([request])
    scores = dict(request.answer().outputs)["SCORES"][0]
    golden = FakeRequest(tensors(candidates=(107, 108, 109)), id="gr-golden")
    model.execute([golden])
    golden.answer()
    while not model._metrics._scores:
        time.sleep(0.01)
    model._metrics.close()
    for at, task in enumerate(("like", "buy")):
        assert _shown(model._metrics, "gr_score_mean")["gr_ranker", task] == pytest.approx(scores[:, at].mean())
        assert _shown(model._metrics, "gr_score_std")["gr_ranker", task] == pytest.approx(scores[:, at].std(), abs=1e-4)


def test_a_retrieval_model_has_no_gauges_of_scores():
    metrics = backend.EngineMetrics(PB_UTILS, "m", toy_engine("retrieval"))
    assert not {"gr_score_mean", "gr_score_std"} & set(metrics._families)
    metrics.close()


def test_moments_of_scores_follow_what_is_answered_and_forget_what_was():
    moments = ScoreMoments(1, look_back=50)
    for value in [0.1] * 1000 + [0.5] * 1000:
        moments.add(np.array([[value - 0.05], [value + 0.05]], np.float32))
    moments.add(np.full((3, 1), np.nan, np.float32))
    moments.add(np.zeros((0, 1), np.float32))
    figures = moments.figures()
    assert figures["gr_score_mean"] == pytest.approx(0.5, abs=1e-6)
    assert figures["gr_score_std"] == pytest.approx(0.05, abs=1e-3)
    assert ScoreMoments(1).figures() == {}

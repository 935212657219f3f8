"""One response per request, whatever happens, and nothing of the server's inside in an error."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from serving import backend
from serving.backend import DownstreamError, ModelSettings
from serving.engine.requests import MAX_EVENTS, InvalidRequestError
from serving.wire import MAX_ID_BYTES, decode_ids, decode_rank, encode_ids


class FakeTritonError:
    INVALID_ARG, INTERNAL, UNAVAILABLE = "INVALID_ARG", "INTERNAL", "UNAVAILABLE"

    def __init__(self, message, code):
        self.message, self.code = message, code


PB_UTILS = SimpleNamespace(
    TritonError=FakeTritonError,
    Logger=SimpleNamespace(log_error=logging.getLogger("fake").error),
    Tensor=lambda name, value: (name, value),
    InferenceResponse=lambda output_tensors=None, error=None: SimpleNamespace(outputs=output_tensors, error=error),
    get_input_tensor_by_name=lambda request, name: SimpleNamespace(as_numpy=lambda: request[name]),
)


def test_each_request_of_a_batch_gets_its_own_answer_or_error(caplog):
    def handler(tensors):
        value = tensors["X"][0]
        if value == 1:
            raise InvalidRequestError("X is 1")
        if value == 2:
            raise KeyError("/secret/path")
        if value == 3:
            raise DownstreamError("gr_ranker: /secret/path")
        return {"Y": tensors["X"] * 2}

    requests = [{"X": np.array([value])} for value in (1, 5, 2, 3)]
    invalid, good, broken, downstream = backend.answer(PB_UTILS, requests, ["X"], handler)
    assert (invalid.error.message, invalid.error.code) == ("X is 1", "INVALID_ARG")
    assert good.error is None
    assert good.outputs[0][1].tolist() == [10]
    assert (broken.error.message, broken.error.code) == ("internal error", "INTERNAL")
    assert (downstream.error.message, downstream.error.code) == ("retrieval or ranking is not available", "UNAVAILABLE")
    assert "/secret/path" in caplog.text


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

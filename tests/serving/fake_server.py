"""The server's Python module as far as models that answer through response senders use it, without a server."""

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np


class TritonModelException(Exception):
    """What `exec` raises where the server cannot even take a request."""


class TritonError:
    """An error with the name of its code."""

    INVALID_ARG, INTERNAL, UNAVAILABLE, CANCELLED = "INVALID_ARG", "INTERNAL", "UNAVAILABLE", "CANCELLED"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self._message, self.code = message, code

    def message(self) -> str:
        return self._message


class Tensor:
    """A named array."""

    def __init__(self, name: str, value: np.ndarray) -> None:
        self.name, self._value = name, value

    def as_numpy(self) -> np.ndarray:
        return self._value


class InferenceResponse:
    """Outputs by name, or an error."""

    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.outputs = {tensor.name: tensor.as_numpy() for tensor in output_tensors or []}
        self._error = error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Request:
    """A request of a caller: what it asks, and the answer once it was sent."""

    def __init__(
        self,
        inputs: Mapping[str, np.ndarray],
        *,
        timeout_us: int = 0,
        request_id: str = "request 1",
        **parameters: Any,
    ) -> None:
        self.inputs, self._timeout_us, self._parameters = inputs, timeout_us, parameters
        self._request_id = request_id
        self.cancelled = False
        self._sent = threading.Event()
        self.num_answers = 0

    def request_id(self) -> str:
        return self._request_id

    def timeout(self) -> int:
        return self._timeout_us

    def parameters(self) -> str:
        return json.dumps(self._parameters) if self._parameters else ""

    def requested_output_names(self) -> list[str]:
        return []

    def is_cancelled(self) -> bool:
        return self.cancelled

    def get_response_sender(self) -> "Request":
        return self

    def send(self, response: InferenceResponse, flags: int) -> None:
        assert flags == 1
        self._response = response
        self.num_answers += 1
        self._sent.set()

    def answer(self, timeout_s: float = 10.0) -> InferenceResponse:
        assert self._sent.wait(timeout_s), "no answer"
        return self._response

    def refusal(self) -> tuple[str, str]:
        error = self.answer().error()
        assert error is not None
        return error.message(), error.code


def fake_pb_utils(models: Mapping[str, Callable[[Any], InferenceResponse]]) -> Any:
    """Return the module of a server with these other models: each a function of a called request."""

    class InferenceRequest:
        def __init__(self, **fields: Any) -> None:
            self.fields = fields
            self.inputs = {tensor.name: tensor.as_numpy() for tensor in fields["inputs"]}

        def exec(self) -> InferenceResponse:
            return models[self.fields["model_name"]](self)

    counters: dict[str, float] = {}

    class MetricFamily:
        COUNTER, HISTOGRAM = "counter", "histogram"

        def __init__(self, name: str, description: str, kind: str) -> None:
            self._name = name
            counters[name] = 0

        def Metric(self, labels: Mapping[str, str], buckets: Sequence[float] = ()) -> Any:
            def increment(count: float) -> None:
                counters[self._name] += count

            return SimpleNamespace(increment=increment, observe=lambda value: increment(1))

    log = logging.getLogger("fake")
    return SimpleNamespace(
        TritonError=TritonError,
        TritonModelException=TritonModelException,
        Tensor=Tensor,
        InferenceResponse=InferenceResponse,
        InferenceRequest=InferenceRequest,
        MetricFamily=MetricFamily,
        Logger=SimpleNamespace(log_error=log.error, log_warn=log.warning),
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        get_input_tensor_by_name=lambda request, name: Tensor(name, request.inputs[name]),
        get_output_tensor_by_name=lambda response, name: Tensor(name, response.outputs[name]),
        counters=counters,
    )


def arguments(**parameters: object) -> dict[str, str]:
    """Return what the server hands to `initialize`."""
    given = {"num_threads": 1, "max_in_flight": 8} | parameters
    values = {
        name: {"string_value": value if isinstance(value, str) else json.dumps(value)} for name, value in given.items()
    }
    return {
        "model_name": "gr_tested",
        "model_repository": "/nowhere",
        "model_version": "1",
        "model_config": json.dumps({"parameters": values}),
    }

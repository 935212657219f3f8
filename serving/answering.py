"""Server models that answer by asking other models: threads, deadlines, cancellation and one answer for each request.

Invariant: `execute` returns at once and every request is answered exactly once, by a thread that its own calls alone
hold up. More requests than `max_in_flight` are refused at once, so that waiting ones keep their deadlines. No call is
made for a request whose time has passed, or between two calls for one that its caller gave up.
"""

import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from serving import calls
from serving.backend import ModelSettings, priority_of
from serving.calls import CANCELLED, RefusedError
from serving.figures import REQUESTS, Figures

# The server itself runs at most this many calls of one model at once unless it is told otherwise (thread-pool-size).
NUM_THREADS = 64
# Asking whether a request was cancelled takes .1-.3 ms: one that has hardly waited is not asked.
ASK_AFTER_S = 0.05


class Call:
    """One request on its way: its tensors, how long it may take, and the calls it leads to."""

    def __init__(self, pb_utils: Any, request: Any, arrived_s: float) -> None:
        self._pb_utils, self._request = pb_utils, request
        timeout_us = request.timeout()
        self._deadline_s = arrived_s + timeout_us / 1e6 if timeout_us else None
        self.request_id = request.request_id()
        self.parameters = calls.parameters_of(request)
        self._arrived_s = arrived_s

    def tensor(self, name: str) -> Any:
        """Return an input as the server's tensor, ready to be handed on."""
        return self._pb_utils.get_input_tensor_by_name(self._request, name)

    def arrays(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return inputs as arrays."""
        return {name: self.tensor(name).as_numpy() for name in names}

    def check_wanted(self, *, waited: bool = False) -> None:
        """Raise RefusedError if the caller gave the request up; `waited`: ask only if it has waited for its turn."""
        if waited and time.monotonic() - self._arrived_s < ASK_AFTER_S:
            return
        if self._request.is_cancelled():
            raise RefusedError("the request was cancelled", CANCELLED)

    def ask(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray] | Sequence[Any],
        outputs: Sequence[str],
        **parameters: str | int,
    ) -> list[np.ndarray]:
        """Return outputs of another model, which gets what is left of the request's time, and its priority.

        inputs: arrays by name, or the server's tensors. Raises InvalidRequestError, RefusedError or CalledModelError.
        """
        if isinstance(inputs, Mapping):
            inputs = [self._pb_utils.Tensor(name, value) for name, value in inputs.items()]
        if calls.PRIORITY in self.parameters:
            parameters[calls.PRIORITY] = priority_of(self.parameters)
        timeout_us = self._left_us()
        return ask(self._pb_utils, model, inputs, outputs, self.request_id, timeout_us, **parameters)

    def _left_us(self) -> int:
        """Return the microseconds left, 0 without a deadline. Raises RefusedError if there are none."""
        if self._deadline_s is None:
            return 0
        left_us = int(1e6 * (self._deadline_s - time.monotonic()))
        if left_us <= 0:
            raise RefusedError("the request's deadline has passed", CANCELLED)
        return left_us


def ask(
    pb_utils: Any,
    model: str,
    inputs: Sequence[Any],
    outputs: Sequence[str],
    request_id: str = "",
    timeout_us: int = 0,
    **parameters: str | int,
) -> list[np.ndarray]:
    """Return outputs of another model. Raises InvalidRequestError, RefusedError or CalledModelError."""
    request = pb_utils.InferenceRequest(
        model_name=model,
        request_id=request_id,
        requested_output_names=list(outputs),
        inputs=list(inputs),
        timeout=timeout_us,
        parameters={calls.CODED: "1", **parameters},
    )
    try:
        answer = request.exec()
    except pb_utils.TritonModelException as error:
        raise calls.error_of(model, str(error)) from None
    if answer.has_error():
        raise calls.error_of(model, answer.error().message())
    return [pb_utils.get_output_tensor_by_name(answer, name).as_numpy() for name in outputs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The outputs of a request, and what to do after they were sent: it is told the milliseconds since the arrival."""

    outputs: Mapping[str, np.ndarray]
    afterwards: Callable[[float], None] | None = None


class AnsweringModel(ABC):
    """The server's Python model interface around `answer`. A model names `pb_utils`, the server's own module."""

    pb_utils: Any
    # Counters of the model's own: name -> what it counts.
    counters: Mapping[str, str] = {}

    def initialize(self, args: dict[str, str]) -> None:
        """Read the parameters of the model's configuration."""
        own = ModelSettings.of(args)
        self._places = threading.BoundedSemaphore(int(own.parameters["max_in_flight"]))
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix=own.name)
        self.open(own.parameters)
        self._figures = Figures(self.pb_utils, own.name, {**REQUESTS, **self.counters}, self.counted)

    def execute(self, requests: list[Any]) -> list[None]:
        """Hand requests to the threads; their answers leave through response senders."""
        arrived_s = time.monotonic()
        for request in requests:
            sender = request.get_response_sender()
            if self._places.acquire(blocking=False):
                self._threads.submit(self._serve, request, sender, arrived_s)
            else:
                refused = RefusedError("too many requests are in flight; try again")
                calls.send(self.pb_utils, sender, self._failure(request, refused))
        return [None] * len(requests)

    def finalize(self) -> None:
        """Answer what is in flight, then close."""
        self._threads.shutdown()
        self.close()
        self._figures.close()

    @abstractmethod
    def open(self, parameters: Mapping[str, str]) -> None:
        """Make ready to answer."""

    @abstractmethod
    def answer(self, call: Call) -> Answer:
        """Return the answer to one request; called by several threads at once."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what `open` took."""

    def counted(self) -> Mapping[str, float]:
        """Return totals of `counters` that are counted elsewhere; asked twice a second, after `close` too."""
        return {}

    def _serve(self, request: Any, sender: Any, arrived_s: float) -> None:
        answer = None
        try:
            call = Call(self.pb_utils, request, arrived_s)
            call.check_wanted(waited=True)
            answer = self.answer(call)
            tensors = [self.pb_utils.Tensor(name, value) for name, value in answer.outputs.items()]
            response = self.pb_utils.InferenceResponse(output_tensors=tensors)
        except Exception as error:
            # The process boundary: a traceback would reach the caller, and an unanswered request would never end.
            answer, response = None, self._failure(request, error)
        self._places.release()
        calls.send(self.pb_utils, sender, response)
        if answer is not None:
            self._figures.add_answer(time.monotonic() - arrived_s)
            if answer.afterwards is not None:
                self._after(answer.afterwards, 1e3 * (time.monotonic() - arrived_s))

    def _after(self, afterwards: Callable[[float], None], latency_ms: float) -> None:
        try:
            afterwards(latency_ms)
        except Exception:
            # The answer has left: what went wrong since is nobody's error, and the thread goes on to the next request.
            self.pb_utils.Logger.log_error("event=afterwards_failed " + traceback.format_exc())

    def _failure(self, request: Any, error: Exception) -> Any:
        message, code = calls.described(error)
        self._figures.add_failure(code)
        if code == calls.INTERNAL or error.__cause__ is not None:
            self.pb_utils.Logger.log_error("event=request_failed " + "".join(traceback.format_exception(error)))
        return calls.error_response(self.pb_utils, request, message, code)

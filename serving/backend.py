"""gr_ranker and gr_retriever behind the server's Python model interface: decode, one engine, encode.

Invariant: `execute` hands requests to the engine's thread and returns; each is answered once through its response
sender. A caller sees a message that was written for callers, or "internal error"; a traceback or a path goes to the
server's log only. Imported inside the model server, so `pb_utils` (its own module) comes with the model.
"""

import json
import os
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from gr_platform import settings
from gr_platform.bundle.compute import CacheType, ComputePath, Tunable
from gr_platform.bundle.load import load
from gr_platform.bundle.verify import SHORT_TOLERANCE, TOLERANCE, parity
from gr_platform.errors import UserError
from gr_platform.serving_state import recent_folder
from serving import calls
from serving.engine import recent
from serving.engine.engine import Engine, Limits
from serving.engine.jobs import DEFAULT_PRIORITY, Job, Terms
from serving.engine.model import Model
from serving.engine.requests import InvalidRequestError
from serving.engine_metrics import EngineMetrics
from serving.wire import MODEL_DIGEST

# Sending an answer is a round trip to the server's process: the engine computes on meanwhile.
NUM_SENDERS = 4
# Of the thread that loads and warms up: the old model of a swap goes on serving on the same cores.
LOADING_NICENESS = 10
KEEP_EVERY_S = 5.0
# How long a model may take to encode the histories asked for last before it answers.
ENCODE_AHEAD_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """A loaded model's own folder and the parameters of its config.pbtxt."""

    name: str
    bundle: Path
    parameters: dict[str, str]
    num_threads: int

    @staticmethod
    def of(args: Mapping[str, str]) -> "ModelSettings":
        """Return the settings in the arguments of `initialize`; threads: as configured, 0 = what the machine has."""
        # An old pybind11 in the server's Python stub hands out empty arrays under numpy 2, without an error.
        if int(np.__version__.split(".")[0]) >= 2:
            raise RuntimeError(f"numpy is {np.__version__}, the model server's environment needs numpy < 2: make setup")
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        return ModelSettings(
            name=args["model_name"],
            bundle=Path(args["model_repository"]) / args["model_version"] / "bundle",
            parameters=parameters,
            num_threads=int(parameters["num_threads"]) or settings.num_threads(),
        )

    @property
    def recent_histories(self) -> Path:
        """The file of the histories that this model was asked for last, whatever pair it belonged to."""
        return recent_folder(settings.home()) / f"{self.name}.safetensors"

    def limits(self) -> Limits:
        """Return what the engine takes at once."""
        return Limits(
            max_queue=int(self.parameters["max_queue"]),
            max_wait_s=float(self.parameters["max_wait_s"]),
            max_users=int(self.parameters["max_batch_size"]),
        )


class Keeper:
    """Saves the histories asked for last every few seconds, so that the next model may begin with them."""

    def __init__(self, engine: Engine, own: ModelSettings) -> None:
        self._engine, self._path, self._closing = engine, own.recent_histories, threading.Event()
        self._thread = threading.Thread(target=self._run, name="gr-keeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End, without saving: the next model has loaded by now."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(KEEP_EVERY_S):
            self._engine.recent.save(self._path, self._engine.model.bundle.declaration.name)


class EngineModel(ABC):
    """A bundle's engine as a server model.

    A model names `pb_utils` (the server's own module) and its kind of engine `model`.
    """

    pb_utils: Any
    model: type[Model]

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle beside the model's file, hold it against its golden requests, and warm up.

        The server goes on with what it served before if this raises.
        """
        own = ModelSettings.of(args)
        try:
            self._engine = _aside(self._loaded, own)
        except UserError as error:
            raise self.pb_utils.TritonModelException(str(error)) from None
        self._metrics = EngineMetrics(self.pb_utils, own.name, self._engine, own.parameters)
        self._keeper = Keeper(self._engine, own)
        self._senders = ThreadPoolExecutor(NUM_SENDERS, thread_name_prefix="gr-sender")
        self._engine.start()

    def execute(self, requests: list[Any]) -> list[None]:
        """Hand the requests to the engine; their answers leave through response senders."""
        arrived = time.monotonic()
        for request in requests:
            sender = request.get_response_sender()

            def done(job: Job, outcome: Any, request: Any = request, sender: Any = sender) -> None:
                if self._engine.num_jobs:
                    self._senders.submit(self._answer, request, sender, job, outcome)
                else:
                    # The engine has nothing else to do: waking another thread would only take time.
                    self._answer(request, sender, job, outcome)

            try:
                # In one pass: each look for an input by its name would make objects of all of them.
                arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                self._engine.submit(self.decode(arrays), done, _terms(request, arrived))
            except Exception as error:
                # The process boundary: re-raising would fail the whole batch and show the traceback to callers.
                calls.send(self.pb_utils, sender, self._failure(request, error))
        return [None] * len(requests)

    def is_ready(self) -> bool:
        """Return whether requests are being answered; asked by releases of the server that know this function."""
        return self._engine.alive

    def finalize(self) -> None:
        """Answer what is in the engine, then drop the cache with the model."""
        self._engine.close()
        self._senders.shutdown()
        self._metrics.close()
        self._keeper.close()
        del self._engine

    @abstractmethod
    def decode(self, tensors: dict[str, np.ndarray]) -> Any:
        """Return the request in the input tensors. Raises InvalidRequestError."""

    @abstractmethod
    def encode(self, result: Any) -> Mapping[str, np.ndarray]:
        """Return the output tensors of a result."""

    def _loaded(self, own: ModelSettings) -> Engine:
        """Return the engine of a model that passed the parity gate, warmed up, and with the histories asked for last in
        its cache. Raises UserError."""
        bundle = load(own.bundle)
        cache_dtype = cast(CacheType, own.parameters["cache_dtype"])
        model = self.model(
            bundle,
            cache_bytes=int(own.parameters["cache_bytes"]),
            num_threads=own.num_threads,
            path=cast(ComputePath, own.parameters["compute"]),
            cache_dtype=cache_dtype,
        )
        tolerance = TOLERANCE if cache_dtype == "fp32" else SHORT_TOLERANCE
        # Every path that may score is held against the golden requests, whichever is chosen later.
        for compute in model.compute.paths() if isinstance(model.compute, Tunable) else (model.compute,):
            measured = parity(bundle, compute, tolerance)
            if not measured.ok:
                raise UserError(
                    f"the bundle's scores differ from those of its golden requests by {measured.max_abs_error:.2e} of "
                    f"{measured.max_abs_reference:.2e}, at most {tolerance:.0e} of it is allowed; export it again"
                )
        model.warm_up()
        engine = Engine(model, own.limits())
        histories = recent.load(
            own.recent_histories,
            bundle.declaration.name,
            num_rows=bundle.vocabulary.num_rows,
            num_actions=len(bundle.declaration.actions),
            most_tokens=model.longest,
        )
        try:
            recent.encode_ahead(model, engine.recent, histories, ENCODE_AHEAD_S)
        except Exception:
            # A cache that starts empty costs time alone.
            self.pb_utils.Logger.log_error("event=histories_not_encoded_ahead " + traceback.format_exc())
        return engine

    def _answer(self, request: Any, sender: Any, job: Job, outcome: Any) -> None:
        try:
            if isinstance(outcome, Exception):
                raise outcome
            outputs = dict(self.encode(outcome))
            if MODEL_DIGEST in request.requested_output_names():
                outputs[MODEL_DIGEST] = np.array([[self._engine.model.bundle.digest.encode()]], object)
            tensors = [self.pb_utils.Tensor(name, value) for name, value in outputs.items()]
            response = self.pb_utils.InferenceResponse(output_tensors=tensors)
        except Exception as error:
            # The process boundary, in a thread of its own: what is raised here nobody would hear of.
            response = self._failure(request, error)
        else:
            if request.request_id() not in calls.PROBES:
                self._metrics.observe(job)
        calls.send(self.pb_utils, sender, response)

    def _failure(self, request: Any, error: Exception) -> Any:
        message, code = calls.described(error)
        if code == calls.INTERNAL:
            self.pb_utils.Logger.log_error("event=request_failed " + "".join(traceback.format_exception(error)))
        return calls.error_response(self.pb_utils, request, message, code)


def _aside(load_model: Callable[[ModelSettings], Engine], own: ModelSettings) -> Engine:
    """Return what `load_model` returns, from a thread that yields the CPU to the models that serve meanwhile.

    Threads that torch and ONNX Runtime start would stay as yielding, and only root could change it back: so it is done
    where they start none.
    """

    def run() -> Engine:
        if own.num_threads == 1:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOADING_NICENESS)
        return load_model(own)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def priority_of(parameters: Mapping[str, Any]) -> int:
    """Return the priority that a request carries, or the default. Raises InvalidRequestError for what is no number."""
    priority = parameters.get(calls.PRIORITY, DEFAULT_PRIORITY)
    if not isinstance(priority, int) or isinstance(priority, bool) or priority < 0:
        raise InvalidRequestError(f"the parameter {calls.PRIORITY} must be a whole number from 0")
    return priority


def _terms(request: Any, arrived: float) -> Terms:
    """Return how the caller wants to be served."""
    timeout_us = request.timeout()
    return Terms(
        priority=priority_of(calls.parameters_of(request)),
        deadline=arrived + timeout_us / 1e6 if timeout_us else None,
        is_cancelled=request.is_cancelled,
    )

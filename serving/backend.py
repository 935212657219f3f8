"""What the model.py files share: settings, metrics, an engine, and one response or one error per request.

Invariant: a caller sees a message that was written for callers, or "internal error"; a traceback or a path goes to the
server's log only. Imported inside the model server, so `pb_utils` (its own module) is handed in.
"""

import json
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gr_platform import settings
from gr_platform.bundle.load import load
from gr_platform.errors import UserError
from serving.engine.cache import CacheCounters
from serving.engine.requests import InvalidRequestError

Handler = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]


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
    def cache_bytes(self) -> int:
        """The bound of the K/V cache."""
        return int(self.parameters["cache_bytes"])


class EngineModel(ABC):
    """What gr_ranker and gr_retriever have in common: a bundle's engine behind the server's Python model interface.

    A model names `pb_utils` (the server's own module), its `inputs` and what builds its engine.
    """

    pb_utils: Any
    inputs: Sequence[str]
    build_engine: Callable[..., Any]

    def initialize(self, args: dict[str, str]) -> None:
        """Load and warm up the bundle beside the model's file."""
        own = ModelSettings.of(args)
        try:
            bundle = load(own.bundle)
        except UserError as error:
            raise self.pb_utils.TritonModelException(str(error)) from None
        self._engine = type(self).build_engine(bundle, cache_bytes=own.cache_bytes, num_threads=own.num_threads)
        self._engine.warm_up()
        self._metrics = Metrics(self.pb_utils, own.name)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return one response per request."""
        return answer(self.pb_utils, requests, self.inputs, self._handle)

    def finalize(self) -> None:
        """Drop the cache with the model."""
        del self._engine

    def _handle(self, tensors: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        num_unknown, outputs = self._answer(tensors)
        self._metrics.count(num_unknown=num_unknown, cache=self._engine.cache.counters)
        return outputs

    @abstractmethod
    def _answer(self, tensors: dict[str, np.ndarray]) -> tuple[int, Mapping[str, np.ndarray]]:
        """Return how many ids were unknown, and the output tensors. Raises InvalidRequestError."""


class DownstreamError(RuntimeError):
    """A model that this one calls did not answer; the text goes to the log, not to callers."""


def answer(pb_utils: Any, requests: Sequence[Any], inputs: Sequence[str], handler: Handler) -> list[Any]:
    """Return one server response per request: what `handler` makes of its tensors, or an error with a code."""
    responses = []
    for request in requests:
        try:
            responses.append(response(pb_utils, handler(tensors(pb_utils, request, inputs))))
        except Exception as error:
            # The process boundary: re-raising would fail the whole batch and show the traceback to callers.
            responses.append(failure(pb_utils, error))
    return responses


def tensors(pb_utils: Any, request: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the named inputs of a server request."""
    return {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names}


def response(pb_utils: Any, outputs: Mapping[str, np.ndarray]) -> Any:
    """Return a server response with these outputs."""
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(name, value) for name, value in outputs.items()])


def failure(pb_utils: Any, error: Exception) -> Any:
    """Return the error response for an exception; anything but a request's own fault is logged and not explained."""
    codes = pb_utils.TritonError
    if isinstance(error, InvalidRequestError):
        return pb_utils.InferenceResponse(error=codes(str(error), codes.INVALID_ARG))
    pb_utils.Logger.log_error("event=request_failed " + "".join(traceback.format_exception(error)))
    if isinstance(error, DownstreamError):
        message, code = "retrieval or ranking is not available", codes.UNAVAILABLE
    else:
        message, code = "internal error", codes.INTERNAL
    return pb_utils.InferenceResponse(error=codes(message, code))


class Metrics:
    """The model's figures on the server's metrics endpoint, labelled with the model's name."""

    def __init__(self, pb_utils: Any, model: str) -> None:
        """Create the families once per loaded model."""
        kinds = pb_utils.MetricFamily
        described = {
            "gr_requests_total": ("Requests answered with a result", kinds.COUNTER),
            "gr_unknown_ids_total": ("Item ids in requests that the vocabulary does not know", kinds.COUNTER),
            "gr_cache_hit_tokens_total": ("Tokens found in the K/V cache", kinds.COUNTER),
            "gr_cache_prefill_tokens_total": ("Tokens looked for in the K/V cache and not found", kinds.COUNTER),
            "gr_cache_evictions_total": ("Pages dropped from the K/V cache for room", kinds.COUNTER),
            "gr_cache_bytes": ("Bytes held by the K/V cache", kinds.GAUGE),
        }
        # The server forgets a metric whose family object is collected.
        self._families = {n: kinds(name=n, description=d, kind=kind) for n, (d, kind) in described.items()}
        self._metrics = {name: family.Metric(labels={"model": model}) for name, family in self._families.items()}
        self._seen = CacheCounters(hit_tokens=0, prefill_tokens=0, evictions=0, num_entries=0, size_bytes=0)

    def count(self, *, num_unknown: int, cache: CacheCounters) -> None:
        """Record one answered request and what the cache did since the last one."""
        self._metrics["gr_requests_total"].increment(1)
        self._metrics["gr_unknown_ids_total"].increment(num_unknown)
        self._metrics["gr_cache_hit_tokens_total"].increment(cache.hit_tokens - self._seen.hit_tokens)
        self._metrics["gr_cache_prefill_tokens_total"].increment(cache.prefill_tokens - self._seen.prefill_tokens)
        self._metrics["gr_cache_evictions_total"].increment(cache.evictions - self._seen.evictions)
        self._metrics["gr_cache_bytes"].set(cache.size_bytes)
        self._seen = cache

"""gr_recommender: retrieve widely, rank precisely, return the best k. Calls the two other models inside the server.

The final order is that of the mean of the task probabilities; CACHED_TOKENS adds up both models' caches.
"""

import asyncio
import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from serving import backend, wire
from serving.engine.requests import MAX_CANDIDATES, InvalidRequestError, check_retrieve

_SHARED = ("HISTORY_ITEMS", "HISTORY_ACTIONS", "HISTORY_TIMES", "HISTORY_OFFSET", "REQUEST_TIME")


class TritonPythonModel:
    """The server's Python model interface."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read how many items to retrieve for ranking, and what makes a request valid."""
        parameters = backend.ModelSettings.of(args).parameters
        self._depth = int(parameters["retrieval_depth"])
        self._num_actions = len(json.loads(parameters["actions"]))

    async def execute(self, requests: list) -> list:
        """Return one response per request; all requests of a batch run at once, so the models below batch them too."""
        return await asyncio.gather(*(self._respond(request) for request in requests))

    async def _respond(self, request: Any) -> Any:
        try:
            return await self._recommend(request)
        except Exception as error:
            # The process boundary: re-raising would fail the whole batch and show the traceback to callers.
            return backend.failure(pb_utils, error)

    async def _recommend(self, request: Any) -> Any:
        k = self._checked_k(request)
        shared = [pb_utils.get_input_tensor_by_name(request, name) for name in _SHARED]
        depth = pb_utils.Tensor("K", np.array([[max(k, self._depth)]], np.int32))
        exclude = pb_utils.get_input_tensor_by_name(request, "EXCLUDE")
        items, found = await _call("gr_retriever", [*shared, exclude, depth], "ITEMS")
        candidates = pb_utils.Tensor("CANDIDATES", items)
        scores, reused = await _call("gr_ranker", [*shared, candidates], "SCORES")
        # A stable sort keeps the retriever's order among equals.
        best = np.argsort(-scores[0].mean(axis=1), kind="stable")[:k]
        return backend.response(
            pb_utils, {"ITEMS": items[:, best], "SCORES": scores[:, best], "CACHED_TOKENS": found + reused}
        )

    def _checked_k(self, request: Any) -> int:
        # Checked here, because a called model's error arrives without its code.
        decoded = wire.decode_retrieve(backend.tensors(pb_utils, request, wire.RETRIEVER_INPUTS))
        check_retrieve(decoded, self._num_actions)
        if decoded.k > MAX_CANDIDATES:
            raise InvalidRequestError(f"K is {decoded.k}, at most {MAX_CANDIDATES} items can be ranked")
        return decoded.k


async def _call(model: str, inputs: list, output: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the named output and CACHED_TOKENS of another model."""
    names = [output, "CACHED_TOKENS"]
    request = pb_utils.InferenceRequest(model_name=model, requested_output_names=names, inputs=inputs)
    answer = await request.async_exec()
    if answer.has_error():
        raise backend.DownstreamError(f"{model}: {answer.error().message()}")
    values = [pb_utils.get_output_tensor_by_name(answer, name).as_numpy() for name in names]
    return values[0], values[1]

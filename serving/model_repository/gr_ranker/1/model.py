"""gr_ranker: probabilities of every task for the candidates of one user. All logic is in serving.engine."""

import numpy as np
import triton_python_backend_utils as pb_utils

from gr_platform.bundle.load import load
from gr_platform.errors import UserError
from serving import backend, wire
from serving.engine.ranker import Ranker


class TritonPythonModel:
    """The server's Python model interface."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load and warm up the bundle beside this file."""
        settings = backend.ModelSettings.of(args)
        try:
            bundle = load(settings.bundle)
        except UserError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._ranker = Ranker(bundle, cache_bytes=settings.cache_bytes, num_threads=settings.num_threads)
        self._ranker.warm_up()
        self._metrics = backend.Metrics(pb_utils, settings.name)

    def execute(self, requests: list) -> list:
        """Return one response per request."""
        return backend.answer(pb_utils, requests, wire.RANKER_INPUTS, self._score)

    def finalize(self) -> None:
        """Drop the cache with the model."""
        del self._ranker

    def _score(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        result = self._ranker.score(wire.decode_rank(tensors))
        self._metrics.count(num_unknown=result.num_unknown, cache=self._ranker.cache.counters)
        return wire.encode_rank(result)

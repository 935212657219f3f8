"""gr_retriever: the best k items of the catalogue for one user. All logic is in serving.engine."""

import numpy as np
import triton_python_backend_utils as pb_utils

from gr_platform.bundle.load import load
from gr_platform.errors import UserError
from serving import backend, wire
from serving.engine.retriever import Retriever


class TritonPythonModel:
    """The server's Python model interface."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load and warm up the bundle beside this file."""
        settings = backend.ModelSettings.of(args)
        try:
            bundle = load(settings.bundle)
        except UserError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._retriever = Retriever(bundle, cache_bytes=settings.cache_bytes, num_threads=settings.num_threads)
        self._retriever.warm_up()
        self._metrics = backend.Metrics(pb_utils, settings.name)

    def execute(self, requests: list) -> list:
        """Return one response per request."""
        return backend.answer(pb_utils, requests, wire.RETRIEVER_INPUTS, self._retrieve)

    def finalize(self) -> None:
        """Drop the cache with the model."""
        del self._retriever

    def _retrieve(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        result = self._retriever.retrieve(wire.decode_retrieve(tensors))
        self._metrics.count(num_unknown=result.num_unknown, cache=self._retriever.cache.counters)
        return wire.encode_retrieve(result)

"""gr_retriever: the best k items of the catalogue for one user. All logic is in serving.engine."""

import triton_python_backend_utils as pb_utils

from serving import backend, wire
from serving.engine.requests import RetrieveRequest
from serving.engine.retriever import Retriever, RetrieveResult


class TritonPythonModel(backend.EngineModel):
    """The server's Python model interface."""

    pb_utils = pb_utils
    model = Retriever

    def decode(self, tensors: wire.Tensors) -> RetrieveRequest:
        """Return the request in the input tensors."""
        return wire.decode_retrieve(tensors)

    def encode(self, result: RetrieveResult) -> wire.Tensors:
        """Return the output tensors."""
        return wire.encode_retrieve(result)

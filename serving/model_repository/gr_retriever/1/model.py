"""gr_retriever: the best k items of the catalogue for one user. All logic is in serving.engine."""

import triton_python_backend_utils as pb_utils

from serving import backend, wire
from serving.engine.retriever import Retriever


class TritonPythonModel(backend.EngineModel):
    """The server's Python model interface."""

    pb_utils = pb_utils
    inputs = wire.RETRIEVER_INPUTS
    build_engine = Retriever

    def _answer(self, tensors: wire.Tensors) -> tuple[int, wire.Tensors]:
        result = self._engine.retrieve(wire.decode_retrieve(tensors))
        return result.num_unknown, wire.encode_retrieve(result)

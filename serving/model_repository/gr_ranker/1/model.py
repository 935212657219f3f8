"""gr_ranker: probabilities of every task for the candidates of one user. All logic is in serving.engine."""

import triton_python_backend_utils as pb_utils

from serving import backend, wire
from serving.engine.ranker import Ranker, RankResult
from serving.engine.requests import RankRequest


class TritonPythonModel(backend.EngineModel):
    """The server's Python model interface."""

    pb_utils = pb_utils
    model = Ranker

    def decode(self, tensors: wire.Tensors) -> RankRequest:
        """Return the request in the input tensors."""
        return wire.decode_rank(tensors)

    def encode(self, result: RankResult) -> wire.Tensors:
        """Return the output tensors."""
        return wire.encode_rank(result)

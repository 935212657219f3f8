"""gr_ranker: probabilities of every task for the candidates of one user. All logic is in serving.engine."""

import triton_python_backend_utils as pb_utils

from serving import backend, wire
from serving.engine.ranker import Ranker


class TritonPythonModel(backend.EngineModel):
    """The server's Python model interface."""

    pb_utils = pb_utils
    inputs = wire.RANKER_INPUTS
    build_engine = Ranker

    def _answer(self, tensors: wire.Tensors) -> tuple[int, wire.Tensors]:
        result = self._engine.score(wire.decode_rank(tensors))
        return result.num_unknown, wire.encode_rank(result)

"""`Compute` by ONNX Runtime: the graphs of a bundle, with no torch in the process.

Invariant: a session is stateless; past K/V go in, new K/V come out.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort

from gr_platform.bundle.compute import KV
from gr_platform.models.config import ModelConfig
from gr_platform.models.tokens import Tokens


def _session(path: Path, num_threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Several server processes share the cores: a thread that spins while it waits steals them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class OnnxCompute:
    """The exported graphs behind the `Compute` protocol."""

    def __init__(self, folder: Path, config: ModelConfig, num_tasks: int, *, num_threads: int = 1) -> None:
        self.config, self.num_tasks = config, num_tasks
        self._encode = _session(folder / "encode.onnx", num_threads)
        self._score = _session(folder / "score.onnx", num_threads) if config.kind == "ranking" else None

    def empty(self) -> KV:
        """Return the K/V of no tokens."""
        shape = (self.config.num_layers, 0, self.config.num_heads)
        return KV(
            times=np.zeros(0, np.int64),
            k=np.zeros((*shape, self.config.qk_dim), np.float32),
            v=np.zeros((*shape, self.config.v_dim), np.float32),
        )

    def encode(self, tokens: Tokens, past: KV) -> tuple[np.ndarray, KV]:
        """Return rows float32 [L, d] and the K/V of the L new tokens."""
        if not len(tokens):
            return np.zeros((0, self.config.embedding_dim), np.float32), self.empty()
        feeds = {
            "kinds": tokens.kinds,
            "items": tokens.items,
            "actions": tokens.actions,
            "times": tokens.times,
            "query_times": tokens.query_times,
        }
        rows, k, v = self._encode.run(None, feeds | _feeds(past))
        return rows, KV(times=tokens.times, k=k, v=v)

    def score(self, candidates: np.ndarray, request_time: int, past: KV) -> np.ndarray:
        """Return probabilities float32 [C, tasks] of dense item indices int64 [C]."""
        if self._score is None:
            raise RuntimeError("score() needs a ranking bundle; a retrieval bundle has no score.onnx")
        if not len(candidates):
            return np.zeros((0, self.num_tasks), np.float32)
        feeds = {"candidates": candidates, "request_time": np.array([request_time], np.int64)}
        return self._score.run(None, feeds | _feeds(past))[0]


def _feeds(past: KV) -> dict[str, np.ndarray]:
    return {"past_times": past.times, "past_k": past.k, "past_v": past.v}

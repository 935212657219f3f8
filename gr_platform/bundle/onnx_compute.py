"""`Compute` by ONNX Runtime: the graphs of a bundle, with no torch in the process; one user after the other.

Invariant: a session is stateless; past K/V are copied out of the pages, and new K/V back into them.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from gr_platform.bundle.compute import PAGE_TOKENS, Ask, Piece, pages_for
from gr_platform.models.config import ModelConfig


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

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        num_tasks: int,
        num_pages: int,
        *,
        num_threads: int = 1,
        shared: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """shared: pages (k, v, times) of another path, which encodes into them; this one then scores alone."""
        self.config, self.num_tasks, self.num_pages = config, num_tasks, num_pages
        self._encode = None if shared else _session(folder / "encode.onnx", num_threads)
        self._score = _session(folder / "score.onnx", num_threads) if config.kind == "ranking" else None
        shape = (config.num_layers, num_pages, PAGE_TOKENS, config.num_heads)
        self.k, self.v, self.times = shared or (
            np.empty((*shape, config.qk_dim), np.float32),
            np.empty((*shape, config.v_dim), np.float32),
            np.empty((num_pages, PAGE_TOKENS), np.int64),
        )

    def encode(self, pieces: Sequence[Piece]) -> np.ndarray:
        """Write the kept tokens' K/V and return the rows float32 [R, d] of the pieces that want one."""
        if self._encode is None:
            raise RuntimeError("encode() needs pages of its own")
        rows = [np.zeros((0, self.config.embedding_dim), np.float32)]
        for piece in pieces:
            *row, k, v = self._encode.run(None, _fields(piece) | self._past(piece.pages, piece.past))
            slots, keep = piece.slots(), piece.keep
            for pool, new in ((self.k, k), (self.v, v)):
                pool.reshape(len(pool), -1, *pool.shape[3:])[:, slots] = new[:, :keep]
            self.times.reshape(-1)[slots] = piece.tokens.times[:keep]
            if piece.wants_row:
                rows.append(row[0])
        return np.concatenate(rows)

    def score(self, asks: Sequence[Ask]) -> list[np.ndarray]:
        """Return probabilities float32 [C, tasks] of each ask's candidates."""
        return [self._score_one(ask) for ask in asks]

    def _score_one(self, ask: Ask) -> np.ndarray:
        if self._score is None:
            raise RuntimeError("score() needs a ranking bundle; a retrieval bundle has no score.onnx")
        if not len(ask.candidates):
            return np.zeros((0, self.num_tasks), np.float32)
        feeds = {"candidates": ask.candidates, "request_time": np.array([ask.request_time], np.int64)}
        scores: np.ndarray = self._score.run(None, feeds | self._past(ask.pages, ask.past))[0]
        return scores

    def _past(self, pages: np.ndarray, num_tokens: int) -> dict[str, np.ndarray]:
        own = pages[: pages_for(num_tokens)]
        k, v = (pool[:, own].reshape(len(pool), -1, *pool.shape[3:])[:, :num_tokens] for pool in (self.k, self.v))
        return {"past_times": self.times[own].reshape(-1)[:num_tokens], "past_k": k, "past_v": v}


def _fields(piece: Piece) -> dict[str, np.ndarray]:
    tokens = piece.tokens
    return {
        "kinds": tokens.kinds,
        "items": tokens.items,
        "actions": tokens.actions,
        "times": tokens.times,
        "query_times": tokens.query_times,
    }

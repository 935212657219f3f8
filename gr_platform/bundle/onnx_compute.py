"""`Compute` by ONNX Runtime: the graphs of a bundle, with no torch in the process.

Invariant: a session is stateless; past K/V are copied out of the pages, and new K/V back into them. Tokens are encoded
one user after the other; candidates of users with similar numbers of them are scored in one call, padded with zeros.

Legend: B users of a call, C the most candidates and P the most past tokens of one of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from gr_platform.bundle.compute import PAGE_TOKENS, Ask, Piece, pages_for
from gr_platform.bundle.groups import groups
from gr_platform.models.config import ModelConfig

# The graphs' name of the item vectors, by far their largest weights.
_ITEMS = "model.embedding.items.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What two paths of one bundle hold together: pages k, v, times, and the item vectors float32 [rows, d]."""

    k: np.ndarray
    v: np.ndarray
    times: np.ndarray
    items: np.ndarray


class _Room:
    """Where pages of a pool [layers, pages, page, H, D] are brought together; kept, as new memory costs more than the
    copy."""

    def __init__(self, pool: np.ndarray) -> None:
        self._pool, self._room = pool, np.empty(0, pool.dtype)

    def gather(self, pages: np.ndarray) -> np.ndarray:
        """Return the tokens [layers, B, P, H, D] of pages int64 [B, n], until the next call."""
        pool = self._pool
        shape = (len(pool), *pages.shape, *pool.shape[2:])
        if (size := math.prod(shape)) > self._room.size:
            self._room = np.empty(size, pool.dtype)
        gathered = self._room[:size].reshape(shape)
        # "clip": with checks numpy would go through a copy of its own; page numbers are the cache's.
        np.take(pool, pages, axis=1, out=gathered, mode="clip")
        return gathered.reshape(len(pool), len(pages), -1, *pool.shape[3:])


def _session(path: Path, num_threads: int, items: ort.OrtValue | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Several server processes share the cores: a thread that spins while it waits steals them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if items is not None:
        options.add_initializer(_ITEMS, items)
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
        shared: Shared | None = None,
    ) -> None:
        """shared: what another path of the same bundle lends, which reads and writes the same pages."""
        self.config, self.num_tasks, self.num_pages = config, num_tasks, num_pages
        # Kept, or the sessions would read memory that is gone.
        self._items = ort.OrtValue.ortvalue_from_numpy(shared.items) if shared else None
        self._encode = _session(folder / "encode.onnx", num_threads, self._items)
        self._score = _session(folder / "score.onnx", num_threads, self._items) if config.kind == "ranking" else None
        shape = (config.num_layers, num_pages, PAGE_TOKENS, config.num_heads)
        if shared is None:
            k, v = (np.empty((*shape, width), np.float32) for width in (config.qk_dim, config.v_dim))
            self.k, self.v, self.times = k, v, np.empty((num_pages, PAGE_TOKENS), np.int64)
        else:
            self.k, self.v, self.times = shared.k, shared.v, shared.times
        self._rooms = _Room(self.k), _Room(self.v)

    def encode(self, pieces: Sequence[Piece]) -> np.ndarray:
        """Write the kept tokens' K/V and return the rows float32 [R, d] of the pieces that want one."""
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
        if self._score is None:
            raise RuntimeError("score() needs a ranking bundle; a retrieval bundle has no score.onnx")
        found = [np.zeros((0, self.num_tasks), np.float32)] * len(asks)
        for group in groups(asks, self.config):
            own = [asks[place] for place in group.places]
            scores = self._score.run(None, self._asked(own, group.num_candidates))[0]
            for place, ask, each in zip(group.places, own, scores, strict=True):
                found[place] = each[: len(ask.candidates)]
        return found

    def _asked(self, asks: list[Ask], num_candidates: int) -> dict[str, np.ndarray]:
        """Return what score.onnx takes for these users."""
        candidates = np.zeros((len(asks), num_candidates), np.int64)
        pages = np.zeros((len(asks), max(1, *(pages_for(ask.past) for ask in asks))), np.int64)
        for row, table, ask in zip(candidates, pages, asks, strict=True):
            row[: len(ask.candidates)] = ask.candidates
            used = pages_for(ask.past)
            table[:used] = ask.pages[:used]
        k, v = (room.gather(pages) for room in self._rooms)
        times = self.times[pages].reshape(len(asks), -1)
        for user, ask in enumerate(asks):
            # What lies beyond a user's tokens is somebody else's, or was never written and may be no number.
            times[user, ask.past :], k[:, user, ask.past :], v[:, user, ask.past :] = 0, 0, 0
        return {
            "candidates": candidates,
            "request_times": np.array([ask.request_time for ask in asks], np.int64),
            "num_past": np.array([ask.past for ask in asks], np.int64),
            "past_times": times,
            **_layers("past_k", k),
            **_layers("past_v", v),
        }

    def _past(self, pages: np.ndarray, num_tokens: int) -> dict[str, np.ndarray]:
        """Return what encode.onnx takes of one user's past."""
        own = pages[: pages_for(num_tokens)]
        k, v = (room.gather(own[None])[:, 0, :num_tokens] for room in self._rooms)
        times = self.times[own].reshape(-1)[:num_tokens]
        return {"past_times": times, **_layers("past_k", k), **_layers("past_v", v)}


def _layers(name: str, kv: np.ndarray) -> dict[str, np.ndarray]:
    """Return the inputs of each layer, views of one array."""
    return {f"{name}_{layer}": each for layer, each in enumerate(kv)}


def _fields(piece: Piece) -> dict[str, np.ndarray]:
    tokens = piece.tokens
    return {
        "kinds": tokens.kinds,
        "items": tokens.items,
        "actions": tokens.actions,
        "times": tokens.times,
        "query_times": tokens.query_times,
    }

"""The histories asked for last, kept beside the model: a new model of them encodes them before its first request.

Invariant: what is kept are tokens, which no weight is part of, so nothing of an old model comes into a new one's cache;
a file that does not fit is passed over, because without it a cache only starts empty.

Item indices mean the same in the next model of a data set: its vocabulary grows at the end (sequences/vocabulary.py).
"""

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gr_platform.bundle.compute import PAGE_TOKENS, Piece, pages_for
from gr_platform.models.tokens import FEATURE, Tokens
from gr_platform.serving_state import histories_forgotten_at
from serving.engine.cache import Lease
from serving.engine.model import Model

log = logging.getLogger(__name__)
FIELDS = ("kinds", "items", "actions", "times", "query_times")
# 8 MB of tokens; a cache of as many tokens is larger than most.
MAX_TOKENS = 200_000
# The clock that files are stamped by lags behind the one that is read here.
CLOCK_LAG_S = 0.05


class RecentHistories:
    """The last tokens of each history, newest last, at most `max_tokens` in all; a history counts as a page at least.

    One thread notes, another may save.
    """

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self._histories: OrderedDict[bytes, Tokens] = OrderedDict()
        self._num_tokens, self._max_tokens, self._changed = 0, max_tokens, False
        self._since = time.time() - CLOCK_LAG_S
        self._lock = threading.Lock()

    def note(self, key: bytes, tokens: Tokens) -> None:
        """Remember a history under what tells it from others; a longer one of the same key takes its place."""
        with self._lock:
            if (before := self._histories.pop(key, None)) is not None:
                self._num_tokens -= _size(before)
            self._histories[key] = tokens
            self._num_tokens += _size(tokens)
            while self._num_tokens > self._max_tokens:
                self._num_tokens -= _size(self._histories.popitem(last=False)[1])
            self._changed = True

    def save(self, path: Path, dataset: str) -> None:
        """Write the histories, if any is new since the last time; the file shows itself whole, to its owner alone."""
        began = time.time() - CLOCK_LAG_S
        with self._lock:
            if (forgotten_at := histories_forgotten_at(path.parent)) > self._since:
                # A person was forgotten, and which of these is theirs nobody knows: none is kept.
                self._histories.clear()
                self._num_tokens, self._since = 0, forgotten_at
            if not self._changed or not self._histories:
                return
            self._changed = False
            histories = list(self._histories.values())
        arrays = {name: np.concatenate([getattr(tokens, name) for tokens in histories]) for name in FIELDS}
        lengths = np.array([len(tokens) for tokens in histories], np.int64)
        staged = path.with_name(f".{path.name}-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            staged.touch(mode=0o600)
            save_file(arrays | {"lengths": lengths}, staged, metadata={"dataset": dataset})
            os.replace(staged, path)
            if histories_forgotten_at(path.parent) >= began:
                path.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            # A full disk costs the next model a warm start, nobody an answer.
            staged.unlink(missing_ok=True)
            log.warning("event=recent_histories_not_saved reason=%s", type(error).__name__)


def _size(tokens: Tokens) -> int:
    """Return what a history counts for: one of few tokens takes as much memory as one of a page."""
    return max(len(tokens), PAGE_TOKENS)


def load(path: Path, dataset: str, *, num_rows: int, num_actions: int, most_tokens: int) -> list[Tokens]:
    """Return the saved histories of a data set, oldest first, without those that a model of this shape cannot read.

    num_rows: of its item table; num_actions: of the data set; most_tokens: of one history.
    """
    try:
        if path.stat().st_mtime <= histories_forgotten_at(path.parent):
            return []
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}).get("dataset") != dataset:
                return []
            arrays = {name: file.get_tensor(name) for name in (*FIELDS, "lengths")}
    except (OSError, SafetensorError):
        return []
    stops = np.cumsum(arrays["lengths"])
    if any(len(arrays[name]) != (stops[-1] if len(stops) else 0) for name in FIELDS):
        return []
    whole = Tokens(**{name: arrays[name] for name in FIELDS})
    found = [whole.slice(int(stop - length), int(stop)) for length, stop in zip(arrays["lengths"], stops, strict=True)]
    bounds = {"items": num_rows, "actions": 1 << num_actions, "kinds": FEATURE}
    return [
        tokens
        for tokens in found
        if 0 < len(tokens) <= most_tokens
        and all(
            0 <= getattr(tokens, name).min() <= getattr(tokens, name).max() < limit for name, limit in bounds.items()
        )
    ]


def encode_ahead(model: Model, kept: RecentHistories, histories: Sequence[Tokens], seconds: float) -> int:
    """Encode histories, oldest first, into a model's cache before anyone asks, and keep them; return how many.

    If time or room is short, the newest ones. As in the cache that they come from, the oldest will go first.
    """
    until, cache = time.monotonic() + seconds, model.cache
    room, encoded = cache.num_pages, list[tuple[Tokens, Lease]]()
    try:
        for tokens in reversed(histories):
            room -= pages_for(len(tokens))
            if room < 0 or time.monotonic() > until or (lease := cache.acquire(tokens)) is None:
                break
            encoded.append((tokens, lease))
            past = lease.num_cached
            piece = Piece(tokens=tokens.slice(past, len(tokens)), past=past, pages=lease.pages, keep=len(tokens) - past)
            if piece.keep:
                model.compute.encode([piece])
    except Exception:
        # What was not encoded whole must not be found.
        cache.release(encoded.pop()[1])
        raise
    finally:
        for tokens, lease in reversed(encoded):
            cache.commit(lease)
            kept.note(lease.first_key, tokens)
            cache.release(lease)
    return len(encoded)

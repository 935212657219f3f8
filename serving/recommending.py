"""Recommendations: retrieve widely, rank precisely, return the best k; log what was served and ask a challenger too.

Invariant: the log and the challenger cost a request nothing but a place in a bounded queue after its answer has left.
The final order is that of the mean of the task probabilities; CACHED_TOKENS adds up both models' caches.
"""

import json
import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from threading import BoundedSemaphore, Lock
from typing import Any

import numpy as np

from gr_platform import serving_state, settings
from serving import calls, wire
from serving.answering import Answer, AnsweringModel, Call, ask
from serving.engine.requests import InvalidRequestError, check_retrieve
from serving.served_log import LogBounds, ServedLog
from serving.served_rows import Served, ServedBy

HISTORY = ("HISTORY_ITEMS", "HISTORY_ACTIONS", "HISTORY_TIMES", "HISTORY_OFFSET")
CHALLENGER = "gr_ranker_shadow"
# Requests that may wait for the challenger, and how long it may take for one.
MAX_SHADOWS = 64
SHADOW_TIMEOUT_US = 10_000_000


class RecommenderModel(AnsweringModel):
    """gr_recommender."""

    counters = {
        "gr_served_rows_total": "Rows written to the served log",
        "gr_served_rows_dropped_total": "Rows of the served log that were dropped",
        "gr_served_writes_failed_total": "Writes of the served log that failed",
        "gr_served_parts_deleted_total": "Parts of the served log deleted for room",
        "gr_shadow_total": "Requests that the challenger scored too",
        "gr_shadow_dropped_total": "Requests not scored by the challenger because too many waited",
        "gr_shadow_failed_total": "Requests that the challenger failed to score",
    }

    def open(self, parameters: Mapping[str, str]) -> None:
        """Read how many items to rank and what makes a request valid; open the log."""
        self._depth = int(parameters["retrieval_depth"])
        self._num_actions = len(json.loads(parameters["actions"]))
        self._log = _open_log(parameters)
        share = float(parameters["shadow_share"]) if parameters["shadow_digest"] else 0.0
        self._shadow = _Shadow(self.pb_utils, share, self._log) if share and self._log else None

    def answer(self, call: Call) -> Answer:
        """Return the best k items with their scores."""
        arrays = call.arrays(wire.RETRIEVER_INPUTS)
        k = self._checked_k(arrays)
        user = _user_of(call)
        if not _is_short_text(call.request_id):
            raise InvalidRequestError(f"the request id must be a text of at most {wire.MAX_ID_BYTES} bytes")
        shared = [call.tensor(name) for name in (*HISTORY, "REQUEST_TIME")]
        depth = self.pb_utils.Tensor("K", np.array([[max(k, self._depth)]], np.int32))
        outputs = ["ITEMS", "CACHED_TOKENS", wire.MODEL_DIGEST]
        items, found, retriever = call.ask("gr_retriever", [*shared, call.tensor("EXCLUDE"), depth], outputs)
        call.check_wanted()
        candidates = self.pb_utils.Tensor("CANDIDATES", items)
        outputs = ["SCORES", "CACHED_TOKENS", wire.MODEL_DIGEST]
        scores, reused, ranker = call.ask("gr_ranker", [*shared, candidates], outputs)
        # A stable sort keeps the retriever's order among equals.
        best = np.argsort(-scores[0].mean(axis=1), kind="stable")[:k]
        chosen, chosen_scores = items[:, best], scores[:, best]

        def afterwards(latency_ms: float) -> None:
            entry = Served(
                request_id=call.request_id,
                served_ts=time.time_ns() // 1_000_000,
                request_ts=int(arrays["REQUEST_TIME"][0, 0]),
                user=user,
                items=wire.decode_ids(chosen[0], "ITEMS"),
                scores=chosen_scores[0],
                latency_ms=latency_ms,
                retriever_digest=_digest(retriever),
                ranker_digest=_digest(ranker),
            )
            self._record(entry, {name: arrays[name] for name in (*HISTORY, "REQUEST_TIME")} | {"CANDIDATES": chosen})

        return Answer(
            outputs={"ITEMS": chosen, "SCORES": chosen_scores, "CACHED_TOKENS": found + reused},
            afterwards=afterwards if self._log and call.request_id not in calls.PROBES else None,
        )

    def close(self) -> None:
        """End the challenger's requests, then write what the log still holds."""
        if self._shadow:
            self._shadow.close()
        if self._log:
            self._log.close()

    def _checked_k(self, arrays: wire.Tensors) -> int:
        decoded = wire.decode_retrieve(arrays)
        check_retrieve(decoded, self._num_actions)
        return decoded.k

    def _record(self, entry: Served, inputs: Mapping[str, np.ndarray]) -> None:
        """Log an answer; `inputs`: what a challenger is asked about it."""
        assert self._log is not None
        if self._shadow is None or not self._shadow.took(entry, inputs):
            self._log.record(entry)

    def counted(self) -> dict[str, float]:
        """Return what the log and the challenger count."""
        shadow: dict[str, float] = {} if self._shadow is None else {**self._shadow.totals}
        if self._log is None:
            return shadow
        now = self._log.counters
        return shadow | {
            "gr_served_rows_total": now.num_written,
            "gr_served_rows_dropped_total": now.num_dropped,
            "gr_served_writes_failed_total": now.num_failed,
            "gr_served_parts_deleted_total": now.num_deleted,
        }


class _Shadow:
    """Asks the challenger about a share of what was served, one request at a time, and logs its scores."""

    def __init__(self, pb_utils: Any, share: float, log: ServedLog) -> None:
        self._pb_utils, self._share, self._log = pb_utils, share, log
        self._places = BoundedSemaphore(MAX_SHADOWS)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shadow")
        self._lock = Lock()
        self._closing = False
        self.totals = dict.fromkeys(("gr_shadow_total", "gr_shadow_dropped_total", "gr_shadow_failed_total"), 0)

    def took(self, entry: Served, inputs: Mapping[str, np.ndarray]) -> bool:
        """Return whether the entry was taken, to be logged when the challenger has scored its items."""
        if not len(entry.items) or random.random() >= self._share:
            return False
        if not self._places.acquire(blocking=False):
            self._count("gr_shadow_dropped_total")
            return False
        self._thread.submit(self._score, entry, inputs)
        return True

    def close(self) -> None:
        """Log what waits without the challenger's scores."""
        self._closing = True
        self._thread.shutdown()

    def _score(self, entry: Served, inputs: Mapping[str, np.ndarray]) -> None:
        began = time.monotonic()
        try:
            if not self._closing:
                tensors = [self._pb_utils.Tensor(name, value) for name, value in inputs.items()]
                outputs, timeout_us = ["SCORES", wire.MODEL_DIGEST], SHADOW_TIMEOUT_US
                scores, digest = ask(self._pb_utils, CHALLENGER, tensors, outputs, entry.request_id, timeout_us)
                took_ms = _ms_since(began)
                entry = replace(entry, shadow_scores=scores[0], shadow_ms=took_ms, shadow_digest=_digest(digest))
                self._count("gr_shadow_total")
        except Exception as error:
            # Nobody waits for it: whatever the challenger's fault is, it is counted, and the row is logged without it.
            self._count("gr_shadow_failed_total")
            entry = replace(entry, shadow_ms=_ms_since(began))
            self._pb_utils.Logger.log_warn(f"event=shadow_failed reason={error.__cause__ or error}")
        finally:
            self._places.release()
            self._log.record(entry)

    def _count(self, name: str) -> None:
        with self._lock:
            self.totals[name] += 1


def _digest(output: np.ndarray) -> str:
    return str(output[0, 0].decode())


def _ms_since(began: float) -> float:
    return 1e3 * (time.monotonic() - began)


def _open_log(parameters: Mapping[str, str]) -> ServedLog | None:
    """Return the log of the served pair, or None where it is switched off."""
    if not int(parameters["log_bytes"]):
        return None
    home, ds = settings.home(), parameters["dataset"]
    by = ServedBy(
        item_id_type=parameters["item_id_type"],
        tasks=tuple(json.loads(parameters["tasks"])),
        retriever_digest=parameters["retriever_digest"],
        ranker_digest=parameters["ranker_digest"],
        shadow_digest=parameters["shadow_digest"],
        shadow_tasks=tuple(json.loads(parameters["shadow_tasks"])),
    )
    key = cache(lambda: serving_state.hash_key(home))
    return ServedLog(
        serving_state.served_folder(home, ds),
        by,
        hash_user=lambda user: serving_state.user_hash(key(), ds, user),
        bounds=LogBounds(total_bytes=int(parameters["log_bytes"]), part_s=float(parameters["log_seconds"])),
    )


def _user_of(call: Call) -> str | None:
    """Return the user that a request names in its parameter `user`. Raises InvalidRequestError for anything odd."""
    user = call.parameters.get("user")
    if user is None:
        return None
    if not isinstance(user, str | int) or isinstance(user, bool) or not _is_short_text(str(user)):
        raise InvalidRequestError(f"the parameter user must be a text of at most {wire.MAX_ID_BYTES} bytes or a number")
    return str(user)


def _is_short_text(text: str) -> bool:
    """Return whether the log takes a text: half of a surrogate pair, which JSON may hold, is no UTF-8."""
    try:
        return len(text.encode()) <= wire.MAX_ID_BYTES
    except UnicodeEncodeError:
        return False

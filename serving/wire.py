"""Tensors of the server's contract to requests of the engine and back, with no server in sight.

Invariant: every input and output begins with a batch dimension of 1, scalars are [1, 1]. Names and types here and in
the config.pbtxt templates are one contract.
"""

from collections.abc import Mapping

import numpy as np

from serving.engine.ranker import RankResult
from serving.engine.requests import History, InvalidRequestError, RankRequest, RetrieveRequest, check_length
from serving.engine.retriever import RetrieveResult

RANKER_INPUTS = (
    "HISTORY_ITEMS",
    "HISTORY_ACTIONS",
    "HISTORY_TIMES",
    "HISTORY_OFFSET",
    "CANDIDATES",
    "REQUEST_TIME",
)
RETRIEVER_INPUTS = (
    "HISTORY_ITEMS",
    "HISTORY_ACTIONS",
    "HISTORY_TIMES",
    "HISTORY_OFFSET",
    "REQUEST_TIME",
    "EXCLUDE",
    "K",
)

# Output of both: BYTES [1, 1], the digest of the bundle that answered; made where it is asked for.
MODEL_DIGEST = "MODEL_DIGEST"
MAX_ID_BYTES = 1024

Tensors = Mapping[str, np.ndarray]


def decode_rank(tensors: Tensors) -> RankRequest:
    """Return the request in the inputs of gr_ranker. Raises InvalidRequestError for a wrong shape or text."""
    return RankRequest(
        history=_history(tensors),
        candidates=_ids(tensors, "CANDIDATES"),
        request_time=_scalar(tensors, "REQUEST_TIME"),
    )


def encode_rank(result: RankResult) -> dict[str, np.ndarray]:
    """Return the outputs of gr_ranker: SCORES FP32 [1, C, tasks], CACHED_TOKENS INT32 [1, 1]."""
    return {"SCORES": result.scores.astype(np.float32, copy=False)[None], "CACHED_TOKENS": _int32(result.cached_tokens)}


def decode_retrieve(tensors: Tensors) -> RetrieveRequest:
    """Return the request in the inputs of gr_retriever. Raises InvalidRequestError for a wrong shape or text."""
    return RetrieveRequest(
        history=_history(tensors),
        k=_scalar(tensors, "K"),
        exclude=_ids(tensors, "EXCLUDE"),
        request_time=_scalar(tensors, "REQUEST_TIME"),
    )


def encode_retrieve(result: RetrieveResult) -> dict[str, np.ndarray]:
    """Return the outputs of gr_retriever: ITEMS ids [1, k], SCORES FP32 [1, k], CACHED_TOKENS INT32 [1, 1]."""
    return {
        "ITEMS": encode_ids(result.items)[None],
        "SCORES": result.scores.astype(np.float32, copy=False)[None],
        "CACHED_TOKENS": _int32(result.cached_tokens),
    }


def encode_ids(ids: np.ndarray) -> np.ndarray:
    """Return raw ids as the wire has them: int64 as it is, text as objects of UTF-8 bytes."""
    if ids.dtype.kind in "iu":
        return ids.astype(np.int64, copy=False)
    return np.array([item.encode() for item in ids], dtype=object)


def decode_ids(values: np.ndarray, field: str) -> np.ndarray:
    """Return int64 or str-object ids [n] from the wire.

    Raises InvalidRequestError naming the first text that is longer than MAX_ID_BYTES or no UTF-8.
    """
    if values.dtype.kind in "iu":
        return values
    texts = np.empty(len(values), dtype=object)
    for index, item in enumerate(values):
        if len(item) > MAX_ID_BYTES:
            raise InvalidRequestError(f"{field}[{index}] has {len(item)} bytes, an id has at most {MAX_ID_BYTES}")
        try:
            texts[index] = item.decode()
        except UnicodeDecodeError:
            raise InvalidRequestError(f"{field}[{index}] is not valid UTF-8") from None
    return texts


def _history(tensors: Tensors) -> History:
    return History(
        items=_ids(tensors, "HISTORY_ITEMS"),
        actions=row(tensors, "HISTORY_ACTIONS"),
        times=row(tensors, "HISTORY_TIMES"),
        offset=_scalar(tensors, "HISTORY_OFFSET"),
    )


def row(tensors: Tensors, field: str) -> np.ndarray:
    """Return the values [n] of an input [1, n]. Raises InvalidRequestError for another shape, or too many values."""
    values = tensors[field]
    if values.ndim != 2 or values.shape[0] != 1:
        raise InvalidRequestError(f"{field} has shape {list(values.shape)}, must be [1, n]: one user a request")
    check_length(field, values[0])
    return values[0]


def one(tensors: Tensors, field: str) -> np.ndarray:
    """Return the one value [1] of a scalar input. Raises InvalidRequestError unless there is one."""
    values = row(tensors, field)
    if len(values) != 1:
        raise InvalidRequestError(f"{field} holds {len(values)} values, must hold one")
    return values


def _ids(tensors: Tensors, field: str) -> np.ndarray:
    return decode_ids(row(tensors, field), field)


def _scalar(tensors: Tensors, field: str) -> int:
    return int(one(tensors, field)[0])


def _int32(value: int) -> np.ndarray:
    return np.array([[value]], np.int32)

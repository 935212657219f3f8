"""What both clients send and read: typed calls as tensors of the server's contract, and its errors as sentences.

Invariant: nothing here talks to a server, so the blocking and the asyncio client can differ in nothing but waiting.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import np_to_triton_dtype

from gr_platform.errors import UserError
from serving.engine.requests import History
from serving.wire import decode_ids, encode_ids

Ids = Sequence[int] | Sequence[str] | np.ndarray
Tensors = Mapping[str, np.ndarray]
T = TypeVar("T")

MAX_MESSAGE_BYTES = 64 << 20
MAX_PRIORITY = 1_000_000
DEFAULT_PRIORITY = 1
DESCRIBED_MODELS = ("gr_ranker", "gr_retriever")


class ServingError(UserError):
    """The server refused or could not answer; `code` is gRPC's name of the reason.

    INVALID_ARGUMENT: the request must change. UNAVAILABLE: not now (queue full, model not loaded, server stopping or
    gone). DEADLINE_EXCEEDED: not in time. CANCELLED: given up before it was answered. INTERNAL: see the server's log.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """How one call is made. deadline_s: None = the client's. priority: 0 is served first, then 1, the default, and on.

    request_id and user are written to the served log (the user hashed), request_id also to the server's own.
    """

    deadline_s: float | None = None
    priority: int = DEFAULT_PRIORITY
    request_id: str = ""
    user: int | str | None = None

    def __post_init__(self) -> None:
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ValueError(f"CallOptions.deadline_s is {self.deadline_s}, must be positive")
        if not 0 <= self.priority <= MAX_PRIORITY:
            raise ValueError(f"CallOptions.priority is {self.priority}, must be from 0 to {MAX_PRIORITY}")


DEFAULT_OPTIONS = CallOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What is served: data set, id type ("int64" or "string"), action and task names in order, digests by model."""

    dataset: str
    item_id_type: str
    actions: tuple[str, ...]
    tasks: tuple[str, ...]
    model_digests: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Items (raw ids) with their scores: float32 [n] (retrieve) or probabilities [n, tasks] (score, recommend).

    cached_tokens: how many tokens of the history the server had cached; for recommend in both models together.
    """

    items: np.ndarray
    scores: np.ndarray
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One inference: the model's name, its inputs [n] by name, and what makes a typed answer of its outputs."""

    model: str
    tensors: Tensors
    read: Callable[[Tensors], T]

    def arguments(self, options: CallOptions, deadline_s: float) -> dict[str, Any]:
        """Return the keyword arguments of tritonclient's `infer`, the same in both of its clients."""
        parameters: dict[str, int | str] = {}
        if options.priority != DEFAULT_PRIORITY:
            parameters["gr_priority"] = options.priority
        if options.user is not None:
            parameters["user"] = str(options.user)
        return {
            "model_name": self.model,
            "inputs": [_input(name, values) for name, values in self.tensors.items()],
            "request_id": options.request_id,
            # The server drops what nobody waits for any more; gRPC's own deadline does not reach the engine's queue.
            "timeout": max(1, int(1e6 * deadline_s)),
            "client_timeout": deadline_s,
            "parameters": parameters or None,
        }

    def answer(self, result: grpcclient.InferResult) -> T:
        """Return the typed answer in tritonclient's result."""
        return self.read({output.name: result.as_numpy(output.name) for output in result.get_response().outputs})


def score(history: History, candidates: Ids, request_time: int, *, id_type: str) -> Call[Answer]:
    """Return the call of gr_ranker. Raises ServingError for what the wire cannot carry."""
    ids = id_array(candidates, id_type)

    def read(outputs: Tensors) -> Answer:
        return Answer(items=ids, scores=outputs["SCORES"][0], cached_tokens=int(outputs["CACHED_TOKENS"][0, 0]))

    tensors = _history(history, request_time, id_type) | {"CANDIDATES": encode_ids(ids)}
    return Call(model="gr_ranker", tensors=tensors, read=read)


def ranked_list(model: str, history: History, k: int, request_time: int, exclude: Ids, *, id_type: str) -> Call[Answer]:
    """Return the call of gr_retriever or gr_recommender. Raises ServingError for what the wire cannot carry."""
    tensors = _history(history, request_time, id_type) | _limits(k, exclude, id_type)
    return Call(model=model, tensors=tensors, read=_listed)


def recommend_user(user: int | str, k: int, request_time: int, exclude: Ids, *, id_type: str) -> Call[Answer]:
    """Return the call of gr_user_recommender. Raises ServingError for what the wire cannot carry."""
    tensors = {"USER": _user(user), "REQUEST_TIME": integers("REQUEST_TIME", [request_time])}
    return Call(model="gr_user_recommender", tensors=tensors | _limits(k, exclude, id_type), read=_listed)


def append_events(
    user: int | str, items: Ids, actions: Sequence[int] | np.ndarray, times: Sequence[int] | np.ndarray, *, id_type: str
) -> Call[int]:
    """Return the call of gr_events. Raises ServingError for what the wire cannot carry."""
    tensors = {
        "USER": _user(user),
        "ITEMS": encode_ids(id_array(items, id_type)),
        "ACTIONS": integers("ACTIONS", actions),
        "TIMES": integers("TIMES", times),
    }
    return Call(model="gr_events", tensors=tensors, read=lambda outputs: int(outputs["NUM_EVENTS"][0, 0]))


def metadata(configs: Mapping[str, Any]) -> Metadata:
    """Return what the configurations of DESCRIBED_MODELS (tritonclient's answers by model) say."""
    parameters = {
        model: {key: value.string_value for key, value in answer.config.parameters.items()}
        for model, answer in configs.items()
    }
    ranker = parameters["gr_ranker"]
    return Metadata(
        dataset=ranker["dataset"],
        item_id_type=ranker["item_id_type"],
        actions=tuple(json.loads(ranker["actions"])),
        tasks=tuple(json.loads(ranker["tasks"])),
        model_digests={model: each["model_digest"] for model, each in parameters.items()},
    )


def id_array(ids: Ids, id_type: str) -> np.ndarray:
    """Return ids [n] in the type of the data set: an empty list does not tell, and the wire needs to know."""
    if id_type == "int64":
        return integers("item ids", cast("Sequence[int] | np.ndarray", ids))
    for item in ids:
        try:
            str.encode(cast("str", item))
        except (TypeError, UnicodeEncodeError):
            raise invalid(f"item ids must be text, got {item!r}") from None
    return np.array(ids, dtype=object)


def integers(field: str, values: Sequence[int] | np.ndarray, dtype: type[np.signedinteger] = np.int64) -> np.ndarray:
    """Return values [n] in the wire's integer type. Raises ServingError for one that is none or does not fit."""
    limits = np.iinfo(dtype)
    # As objects: numpy by itself would make floats of some integers.
    given = values if isinstance(values, np.ndarray) else np.array(list(values), dtype=object)
    if given.ndim != 1:
        raise invalid(f"{field} must be one row of values, got the shape {list(given.shape)}")
    for value in () if given.dtype.kind in "iu" else given.tolist():
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise invalid(f"{field} must be {limits.dtype}, got {value!r}")
    if len(given) and not (given.min() >= limits.min and given.max() <= limits.max):
        raise invalid(f"{field} holds a value beyond {limits.dtype}; it must lie from {limits.min} to {limits.max}")
    return given.astype(dtype, copy=False)


def invalid(message: str) -> ServingError:
    """Return the error of a request that must change."""
    return ServingError(message, "INVALID_ARGUMENT")


def _input(name: str, values: np.ndarray) -> grpcclient.InferInput:
    tensor = grpcclient.InferInput(name, [1, len(values)], np_to_triton_dtype(values.dtype))
    return tensor.set_data_from_numpy(values[None])


def _history(history: History, request_time: int, id_type: str) -> dict[str, np.ndarray]:
    return {
        "HISTORY_ITEMS": encode_ids(id_array(history.items, id_type)),
        "HISTORY_ACTIONS": integers("HISTORY_ACTIONS", history.actions),
        "HISTORY_TIMES": integers("HISTORY_TIMES", history.times),
        "HISTORY_OFFSET": integers("HISTORY_OFFSET", [history.offset]),
        "REQUEST_TIME": integers("REQUEST_TIME", [request_time]),
    }


def _limits(k: int, exclude: Ids, id_type: str) -> dict[str, np.ndarray]:
    return {"EXCLUDE": encode_ids(id_array(exclude, id_type)), "K": integers("K", [k], np.int32)}


def _user(user: int | str) -> np.ndarray:
    """Return a user's id as [1]; one value tells its own type, and the server refuses the other one."""
    if isinstance(user, str):
        return encode_ids(id_array([user], "string"))
    return integers("USER", [user])


def _listed(outputs: Tensors) -> Answer:
    return Answer(
        items=decode_ids(outputs["ITEMS"][0], "ITEMS"),
        scores=outputs["SCORES"][0],
        cached_tokens=int(outputs["CACHED_TOKENS"][0, 0]),
    )

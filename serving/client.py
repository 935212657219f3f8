"""Ask the model server: typed calls over gRPC for people who do not want to know tensors.

Invariant: a call ends by its deadline, with an answer or a `ServingError` that says what to do; only a server that is
not available is asked again, by gRPC's own retry policy and within the same deadline.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import np_to_triton_dtype

from gr_platform.errors import UserError
from serving.engine.requests import History
from serving.wire import decode_ids, encode_ids

__all__ = ["Answer", "Client", "History", "Metadata", "ServingError"]

_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 1),
    (
        "grpc.service_config",
        json.dumps(
            {
                "methodConfig": [
                    {
                        "name": [{"service": "inference.GRPCInferenceService"}],
                        "retryPolicy": {
                            "maxAttempts": 4,
                            "initialBackoff": "0.05s",
                            "maxBackoff": "1s",
                            "backoffMultiplier": 3,
                            "retryableStatusCodes": ["UNAVAILABLE"],
                        },
                    }
                ]
            }
        ),
    ),
]
Ids = Sequence[int] | Sequence[str] | np.ndarray


class ServingError(UserError):
    """The server refused or could not answer; `code` is gRPC's name of the reason, INVALID_ARGUMENT for instance."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


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


class Client:
    """A connection to one model server; use it as a context manager or `close` it. Safe to share between threads."""

    def __init__(self, address: str, *, deadline_s: float = 5.0) -> None:
        """`address` is host:port of the server's gRPC endpoint; `deadline_s` bounds every call, retries included."""
        self._address = address
        self._deadline_s = deadline_s
        self._client = grpcclient.InferenceServerClient(address, channel_args=_CHANNEL)
        self._metadata: Metadata | None = None

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def score(self, history: History, candidates: Ids, *, request_time: int) -> Answer:
        """Return the candidates, in the order given, with the probability of every task. Raises ServingError."""
        ids = self._id_array(candidates)
        tensors = self._history(history, request_time) | {"CANDIDATES": encode_ids(ids)}
        outputs = self._infer("gr_ranker", tensors)
        return Answer(items=ids, scores=outputs["SCORES"][0], cached_tokens=int(outputs["CACHED_TOKENS"][0, 0]))

    def retrieve(self, history: History, *, k: int, request_time: int, exclude: Ids = ()) -> Answer:
        """Return the best k items of the catalogue, best first. Raises ServingError."""
        return self._list("gr_retriever", history, k, request_time, exclude)

    def recommend(self, history: History, *, k: int, request_time: int, exclude: Ids = ()) -> Answer:
        """Return the best k of the retrieved items by mean task probability, best first. Raises ServingError."""
        return self._list("gr_recommender", history, k, request_time, exclude)

    def metadata(self) -> Metadata:
        """Return what is served, asked anew. Raises ServingError."""
        configs = {name: self._config(name) for name in ("gr_ranker", "gr_retriever")}
        ranker = configs["gr_ranker"]
        self._metadata = Metadata(
            dataset=ranker["dataset"],
            item_id_type=ranker["item_id_type"],
            actions=tuple(json.loads(ranker["actions"])),
            tasks=tuple(json.loads(ranker["tasks"])),
            model_digests={name: config["model_digest"] for name, config in configs.items()},
        )
        return self._metadata

    def _list(self, model: str, history: History, k: int, request_time: int, exclude: Ids) -> Answer:
        tensors = self._history(history, request_time) | {
            "EXCLUDE": encode_ids(self._id_array(exclude)),
            "K": _integers("K", [k], np.int32),
        }
        outputs = self._infer(model, tensors)
        return Answer(
            items=decode_ids(outputs["ITEMS"][0], "ITEMS"),
            scores=outputs["SCORES"][0],
            cached_tokens=int(outputs["CACHED_TOKENS"][0, 0]),
        )

    def _history(self, history: History, request_time: int) -> dict[str, np.ndarray]:
        return {
            "HISTORY_ITEMS": encode_ids(self._id_array(history.items)),
            "HISTORY_ACTIONS": _integers("HISTORY_ACTIONS", history.actions),
            "HISTORY_TIMES": _integers("HISTORY_TIMES", history.times),
            "HISTORY_OFFSET": _integers("HISTORY_OFFSET", [history.offset]),
            "REQUEST_TIME": _integers("REQUEST_TIME", [request_time]),
        }

    def _id_array(self, ids: Ids) -> np.ndarray:
        """Return ids in the type of the data set: an empty list does not tell, and the wire needs to know."""
        if (self._metadata or self.metadata()).item_id_type == "int64":
            return _integers("item ids", cast("Sequence[int] | np.ndarray", ids))
        for item in ids:
            try:
                str.encode(cast("str", item))
            except (TypeError, UnicodeEncodeError):
                raise _invalid(f"item ids must be text, got {item!r}") from None
        return np.array(ids, dtype=object)

    def _infer(self, model: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        inputs = []
        for name, values in tensors.items():
            tensor = grpcclient.InferInput(name, [1, len(values)], np_to_triton_dtype(values.dtype))
            tensor.set_data_from_numpy(values[None])
            inputs.append(tensor)
        try:
            result = self._client.infer(model, inputs, client_timeout=self._deadline_s)
        except grpcclient.InferenceServerException as error:
            raise self._friendly(error, model) from None
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    def _config(self, model: str) -> dict[str, str]:
        try:
            answer: Any = self._client.get_model_config(model, client_timeout=self._deadline_s)
        except grpcclient.InferenceServerException as error:
            raise self._friendly(error, model) from None
        return {key: value.string_value for key, value in answer.config.parameters.items()}

    def _friendly(self, error: grpcclient.InferenceServerException, model: str) -> ServingError:
        code = (error.status() or "UNKNOWN").rpartition(".")[2]
        message = error.message() or "no message"
        if "unknown model" in message:
            message = f"the model server at {self._address} has no model {model}; run gr materialize to deploy one"
        elif code == "UNAVAILABLE" and "connect" in message:
            message = f"no model server answers at {self._address}; start it with gr serve or make up"
        elif code == "UNAVAILABLE":
            message = (
                f"the model server at {self._address} cannot take the request now ({message}); try again, and restart "
                "gr serve if it stays so"
            )
        elif code == "DEADLINE_EXCEEDED":
            message = f"the model server at {self._address} did not answer {model} within {self._deadline_s:g} s"
        return ServingError(message, code)


def _integers(field: str, values: Sequence[int] | np.ndarray, dtype: type[np.signedinteger] = np.int64) -> np.ndarray:
    """Return values in the wire's integer type. Raises ServingError for one that is none or does not fit."""
    limits = np.iinfo(dtype)
    # As objects: numpy by itself would make floats of some integers.
    given = values if isinstance(values, np.ndarray) else np.array(list(values), dtype=object)
    if given.ndim != 1:
        raise _invalid(f"{field} must be one row of values, got the shape {list(given.shape)}")
    for value in () if given.dtype.kind in "iu" else given.tolist():
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise _invalid(f"{field} must be {limits.dtype}, got {value!r}")
    if len(given) and not (given.min() >= limits.min and given.max() <= limits.max):
        raise _invalid(f"{field} holds a value beyond {limits.dtype}; it must lie from {limits.min} to {limits.max}")
    return given.astype(dtype, copy=False)


def _invalid(message: str) -> ServingError:
    return ServingError(message, "INVALID_ARGUMENT")

"""Ask the model server: typed calls over gRPC for people who do not want to know tensors.

Invariant: a call ends by its deadline, with an answer or a `ServingError` that says what to do. The asyncio client
with the same calls is `serving.client_asyncio.AsyncClient`.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType

import grpc
import numpy as np
import tritonclient.grpc as grpcclient

from serving import client_tensors as wire
from serving.client_channel import MAX_ATTEMPTS, channel_arguments, friendly, seconds_to
from serving.client_tensors import DEFAULT_OPTIONS, Answer, Call, CallOptions, Ids, Metadata, ServingError, T
from serving.engine.requests import History

__all__ = ["Answer", "CallOptions", "Client", "History", "Metadata", "ServingError"]


class Client:
    """A connection to one model server; use it as a context manager or `close` it. Safe to share between threads."""

    def __init__(
        self,
        address: str,
        *,
        deadline_s: float = 5.0,
        max_attempts: int = MAX_ATTEMPTS,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """`address` is host:port of the server's gRPC endpoint; `deadline_s` bounds every call, retries included.

        max_attempts: how often a server that is not available is asked at most. credentials: for an endpoint with TLS.
        """
        self._address = address
        self._deadline_s = deadline_s
        channel = channel_arguments(max_attempts)
        self._client = grpcclient.InferenceServerClient(address, channel_args=channel, creds=credentials)
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

    def score(
        self, history: History, candidates: Ids, *, request_time: int, options: CallOptions = DEFAULT_OPTIONS
    ) -> Answer:
        """Return the candidates, in the order given, with the probability of every task. Raises ServingError."""
        return self._infer(partial(wire.score, history, candidates, request_time), options)

    def retrieve(
        self,
        history: History,
        *,
        k: int,
        request_time: int,
        exclude: Ids = (),
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Answer:
        """Return the best k items of the catalogue, best first. Raises ServingError."""
        return self._infer(partial(wire.ranked_list, "gr_retriever", history, k, request_time, exclude), options)

    def recommend(
        self,
        history: History,
        *,
        k: int,
        request_time: int,
        exclude: Ids = (),
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Answer:
        """Return the best k of the retrieved items by mean task probability, best first. Raises ServingError."""
        return self._infer(partial(wire.ranked_list, "gr_recommender", history, k, request_time, exclude), options)

    def recommend_user(
        self,
        user: int | str,
        *,
        k: int,
        request_time: int,
        exclude: Ids = (),
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Answer:
        """Return what `recommend` does for the history that the server has of a user. Raises ServingError."""
        return self._infer(partial(wire.recommend_user, user, k, request_time, exclude), options)

    def append_events(
        self,
        user: int | str,
        items: Ids,
        actions: Sequence[int] | np.ndarray,
        times: Sequence[int] | np.ndarray,
        *,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> int:
        """Append events (bitmasks over the data set's actions, ms UTC) to the history that the server has of a user.

        Returns how many events that history has then. Raises ServingError.
        """
        return self._infer(partial(wire.append_events, user, items, actions, times), options)

    def metadata(self) -> Metadata:
        """Return what is served, asked anew. Raises ServingError."""
        return self._ask_metadata(self._deadline_s)

    def _infer(self, build: Callable[..., Call[T]], options: CallOptions) -> T:
        deadline_s = options.deadline_s or self._deadline_s
        until = time.monotonic() + deadline_s
        metadata = self._metadata or self._ask_metadata(deadline_s)
        call = build(id_type=metadata.item_id_type)
        try:
            result = self._client.infer(**call.arguments(options, seconds_to(until)))
        except grpcclient.InferenceServerException as error:
            raise friendly(error, address=self._address, model=call.model, deadline_s=deadline_s) from None
        return call.answer(result)

    def _ask_metadata(self, deadline_s: float) -> Metadata:
        until = time.monotonic() + deadline_s
        configs = {}
        for model in wire.DESCRIBED_MODELS:
            try:
                configs[model] = self._client.get_model_config(model, client_timeout=seconds_to(until))
            except grpcclient.InferenceServerException as error:
                raise friendly(error, address=self._address, model=model, deadline_s=deadline_s) from None
        self._metadata = wire.metadata(configs)
        return self._metadata

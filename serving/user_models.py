"""The two server models that know users: gr_events takes what they did, gr_user_recommender recommends by user id.

Invariant: both load and stay ready without histories; while the store cannot be reached their requests get
UNAVAILABLE, and the next request finds it again.
"""

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from gr_platform import settings
from gr_platform.errors import UserError
from serving import calls
from serving.answering import Answer, AnsweringModel, Call
from serving.backend import ModelSettings
from serving.calls import RefusedError
from serving.engine.requests import MAX_EVENTS, MAX_EXCLUDE, History
from serving.figures import REQUESTS, Figures
from serving.histories import Histories, NewEvents, check_new_events
from serving.history_store import Appended, Bounds
from serving.user_wire import EVENTS_INPUTS, decode_events, decode_user
from serving.wire import encode_ids, one

log = logging.getLogger(__name__)
# A store that did not open is not tried for every request.
REOPEN_S = 2.0


class ReachableHistories:
    """The histories of a model's configuration, opened when they are first needed. Safe to share between threads."""

    def __init__(self, parameters: Mapping[str, str]) -> None:
        self._parameters = parameters
        self._lock = threading.Lock()
        self._opened: Histories | None = None
        self._next_try_s = 0.0

    @contextmanager
    def reached(self) -> Iterator[Histories]:
        """Yield the open histories. Raises RefusedError where they cannot be reached; the reason goes to the log."""
        try:
            yield self._open()
        except (sqlite3.Error, UserError, OSError) as error:
            log.warning("event=histories_not_reached reason=%s", error)
            raise RefusedError("the histories are not available now; try again") from error

    def close(self) -> None:
        """Close them, if they are open."""
        if self._opened is not None:
            self._opened.close()

    def _open(self) -> Histories:
        with self._lock:
            if self._opened is None:
                if time.monotonic() < self._next_try_s:
                    raise UserError("the store did not open a moment ago")
                self._next_try_s = time.monotonic() + REOPEN_S
                self._opened = Histories(
                    settings.home(),
                    self._parameters["dataset"],
                    user_id_type=self._parameters["user_id_type"],
                    item_id_type=self._parameters["item_id_type"],
                    bounds=Bounds(total_bytes=int(self._parameters["history_bytes"])),
                )
            return self._opened


class UserRecommenderModel(AnsweringModel):
    """gr_user_recommender: what gr_recommender answers for the history that is kept of a user."""

    def open(self, parameters: Mapping[str, str]) -> None:
        """Read how much of a history the models see; open the histories."""
        self._known_actions = (1 << len(json.loads(parameters["actions"]))) - 1
        self._num_visible = min(int(parameters["history_events"]), MAX_EVENTS)
        self._hides_seen = parameters["exclude_seen"] == "all"
        self._histories = ReachableHistories(parameters)
        with suppress(RefusedError), self._histories.reached():
            pass

    def answer(self, call: Call) -> Answer:
        """Return the outputs of gr_recommender for the user's events that are not later than REQUEST_TIME."""
        arrays = call.arrays(("USER", "REQUEST_TIME", "EXCLUDE"))
        user, until = decode_user(arrays), int(one(arrays, "REQUEST_TIME")[0])
        limit = MAX_EVENTS if self._hides_seen else self._num_visible
        with self._histories.reached() as histories:
            history = histories.history(user, limit=limit, until=until)
        inputs = self._inputs(history, arrays["EXCLUDE"]) | {"REQUEST_TIME": arrays["REQUEST_TIME"]}
        tensors = [self.pb_utils.Tensor(name, value) for name, value in inputs.items()]
        outputs = ["ITEMS", "SCORES", "CACHED_TOKENS"]
        found = call.ask("gr_recommender", [*tensors, call.tensor("K")], outputs, user=str(user))
        return Answer(outputs=dict(zip(outputs, found, strict=True)))

    def close(self) -> None:
        """Close the histories."""
        self._histories.close()

    def _inputs(self, history: History, exclude: np.ndarray) -> dict[str, np.ndarray]:
        """Return the tensors of the events that a model sees, and excludes what came before if that is declared."""
        first = max(0, len(history.items) - self._num_visible)
        items = encode_ids(history.items)
        if self._hides_seen and first:
            seen = np.unique(items[:first])[: max(0, MAX_EXCLUDE - exclude.shape[1])]
            exclude = np.concatenate([exclude, seen[None]], axis=1)
        return {
            "HISTORY_ITEMS": items[None, first:],
            # Sequences may be of later events than the models, with actions that these do not know.
            "HISTORY_ACTIONS": history.actions[None, first:] & self._known_actions,
            "HISTORY_TIMES": history.times[None, first:],
            "HISTORY_OFFSET": np.array([[history.offset + first]], np.int64),
            "EXCLUDE": exclude,
        }


class EventsModel:
    """gr_events: events of users into their histories; the requests of a batch share one transaction.

    The server's Python model interface. A model names `pb_utils`, the server's own module.
    """

    pb_utils: Any
    counters = {
        **REQUESTS,
        "gr_events_appended_total": "Events appended to histories, or merged into one there",
        "gr_events_known_total": "Events dropped because the sequences hold the user's events up to a later time",
        "gr_events_late_total": "Events dropped because later ones of the user were dropped for room",
    }

    def initialize(self, args: dict[str, str]) -> None:
        """Read what makes an event valid; open the histories."""
        own = ModelSettings.of(args)
        self._num_actions = len(json.loads(own.parameters["actions"]))
        self._figures = Figures(self.pb_utils, own.name, self.counters)
        self._histories = ReachableHistories(own.parameters)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return one response per request: NUM_EVENTS INT64 [1, 1], the length of the user's history afterwards."""
        arrived_s = time.monotonic()
        checked = [self._checked(request) for request in requests]
        valid = [new for new in checked if isinstance(new, NewEvents)]
        try:
            with self._histories.reached() as histories:
                done: Iterator[Appended | Exception] = iter(histories.append(valid) if valid else [])
        except Exception as error:
            # The process boundary: nothing was stored, and each caller is told so.
            done = iter([error] * len(valid))
        pairs = zip(requests, checked, strict=True)
        return [
            self._response(request, next(done) if isinstance(new, NewEvents) else new, arrived_s)
            for request, new in pairs
        ]

    def finalize(self) -> None:
        """Close the histories."""
        self._histories.close()
        self._figures.close()

    def _checked(self, request: Any) -> NewEvents | Exception:
        try:
            get = self.pb_utils.get_input_tensor_by_name
            new = decode_events({name: get(request, name).as_numpy() for name in EVENTS_INPUTS})
            check_new_events(new, num_actions=self._num_actions, now_ms=time.time_ns() // 1_000_000)
            return new
        except Exception as error:
            # The process boundary: one bad request must not fail the others of its batch.
            return error

    def _response(self, request: Any, done: Appended | Exception, arrived_s: float) -> Any:
        if isinstance(done, Exception):
            message, code = calls.described(done)
            self._figures.add_failure(code)
            if code == calls.INTERNAL:
                self.pb_utils.Logger.log_error(f"event=request_failed reason={done!r}")
            return calls.error_response(self.pb_utils, request, message, code)
        self._figures.add_answer(time.monotonic() - arrived_s)
        self._figures.add("gr_events_appended_total", done.num_kept)
        self._figures.add("gr_events_known_total", done.num_known)
        self._figures.add("gr_events_late_total", done.num_late)
        length = self.pb_utils.Tensor("NUM_EVENTS", np.array([[done.length]], np.int64))
        return self.pb_utils.InferenceResponse(output_tensors=[length])

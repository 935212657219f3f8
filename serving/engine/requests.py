"""What a caller asks, and the checks that stand between the wire and the model.

Invariant: after `check_*` returns, every value is in the range that the engine's integer arithmetic and its memory are
made for; a request that is not gets an `InvalidRequestError` naming the field and the index, never a wrong score.
"""

from dataclasses import dataclass

import numpy as np

MAX_EVENTS = 100_000
MAX_CANDIDATES = 10_000
# Items of one list: the search for one of a million takes seconds, in a step that all others wait for.
MAX_K = 10_000
MAX_EXCLUDE = 100_000
MAX_APPENDED = 10_000
_LIMITS = {
    "HISTORY_ITEMS": MAX_EVENTS,
    "HISTORY_ACTIONS": MAX_EVENTS,
    "HISTORY_TIMES": MAX_EVENTS,
    "CANDIDATES": MAX_CANDIDATES,
    "EXCLUDE": MAX_EXCLUDE,
    "ITEMS": MAX_APPENDED,
    "ACTIONS": MAX_APPENDED,
    "TIMES": MAX_APPENDED,
}
# Differences of two times must fit in int64; offsets are added to a length.
MAX_TIME = 1 << 61
MAX_OFFSET = 1 << 40


class InvalidRequestError(ValueError):
    """A request breaks the contract; the message names the field and may be shown to the caller."""

    code = "INVALID_ARGUMENT"


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The events of one user, oldest first.

    items: raw ids [n], int64 or str objects. actions: int64 [n] bitmasks over the data set's actions. times: int64 [n],
    ms. offset: events that the caller dropped before the first one sent; without it a trimmed history has no reuse.
    """

    items: np.ndarray
    actions: np.ndarray
    times: np.ndarray
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRequest:
    """Score `candidates` (raw ids [C]) for a user as of `request_time` (ms)."""

    history: History
    candidates: np.ndarray
    request_time: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrieveRequest:
    """Find the best `k` items for a user as of `request_time` (ms), without those in `exclude` (raw ids)."""

    history: History
    k: int
    exclude: np.ndarray
    request_time: int


def check_rank(request: RankRequest, num_actions: int) -> None:
    """Raise InvalidRequestError unless `request` may be scored."""
    _check_history(request.history, request.request_time, num_actions)
    check_length("CANDIDATES", request.candidates)


def check_retrieve(request: RetrieveRequest, num_actions: int) -> None:
    """Raise InvalidRequestError unless `request` may be answered."""
    _check_history(request.history, request.request_time, num_actions)
    check_length("EXCLUDE", request.exclude)
    if not 1 <= request.k <= MAX_K:
        raise InvalidRequestError(f"K is {request.k}, must be from 1 to {MAX_K}")


def check_length(field: str, values: np.ndarray) -> None:
    """Raise InvalidRequestError if a field has more entries than a request may; cheap, so it comes before decoding."""
    if field in _LIMITS and len(values) > _LIMITS[field]:
        raise InvalidRequestError(f"{field} holds {len(values)} entries, at most {_LIMITS[field]} are allowed")


def _check_history(history: History, request_time: int, num_actions: int) -> None:
    lengths = (len(history.items), len(history.actions), len(history.times))
    check_length("HISTORY_ITEMS", history.items)
    if len(set(lengths)) != 1:
        raise InvalidRequestError(
            "HISTORY_ITEMS, HISTORY_ACTIONS and HISTORY_TIMES must be equally long, got {}, {} and {}".format(*lengths)
        )
    if not 0 <= history.offset <= MAX_OFFSET:
        raise InvalidRequestError(f"HISTORY_OFFSET is {history.offset}, must be from 0 to {MAX_OFFSET}")
    _check_actions(history.actions, num_actions)
    _check_times(history.times, request_time)


def _check_actions(actions: np.ndarray, num_actions: int) -> None:
    # A negative mask has its sign bit set, so one shift finds both faults.
    if (bad := first_true(actions >> num_actions != 0)) is not None:
        raise InvalidRequestError(
            f"HISTORY_ACTIONS[{bad}] is {actions[bad]}, must be a bitmask of the data set's {num_actions} actions"
        )


def _check_times(times: np.ndarray, request_time: int) -> None:
    if abs(request_time) > MAX_TIME:
        raise InvalidRequestError(f"REQUEST_TIME is {request_time}, which is no time in milliseconds")
    if (bad := first_true((times > MAX_TIME) | (times < -MAX_TIME))) is not None:
        raise InvalidRequestError(f"HISTORY_TIMES[{bad}] is {times[bad]}, which is no time in milliseconds")
    if (bad := first_true(times[1:] < times[:-1])) is not None:
        raise InvalidRequestError(
            f"HISTORY_TIMES[{bad + 1}] is {times[bad + 1]}, earlier than the event before it ({times[bad]})"
        )
    if len(times) and request_time < times[-1]:
        raise InvalidRequestError(f"REQUEST_TIME is {request_time}, earlier than the last event ({times[-1]})")


def first_true(broken: np.ndarray) -> int | None:
    """Return the index of the first True, or None."""
    return int(broken.argmax()) if broken.any() else None

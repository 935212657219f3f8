"""Tensors of the models that know users: USER, and the events of an ingest call.

Invariant: as in `wire`, every tensor begins with a batch dimension of 1 and a request is one user.
"""

import numpy as np

from serving.engine.requests import InvalidRequestError
from serving.histories import MAX_APPENDED, NewEvents
from serving.wire import Tensors, decode_ids

EVENTS_INPUTS = ("USER", "ITEMS", "ACTIONS", "TIMES")
USER_INPUTS = ("USER", "REQUEST_TIME", "EXCLUDE", "K")


def decode_events(tensors: Tensors) -> NewEvents:
    """Return the events in the inputs of gr_events. Raises InvalidRequestError for a wrong shape or text."""
    return NewEvents(
        user=decode_user(tensors),
        items=decode_ids(row(tensors, "ITEMS", MAX_APPENDED), "ITEMS"),
        actions=row(tensors, "ACTIONS", MAX_APPENDED),
        times=row(tensors, "TIMES", MAX_APPENDED),
    )


def decode_user(tensors: Tensors) -> int | str:
    """Return the user id. Raises InvalidRequestError unless there is one."""
    (user,) = decode_ids(one(tensors, "USER"), "USER").tolist()
    return user


def one(tensors: Tensors, field: str) -> np.ndarray:
    """Return the one value [1] of a scalar input. Raises InvalidRequestError unless there is one."""
    values = row(tensors, field, None)
    if len(values) != 1:
        raise InvalidRequestError(f"{field} holds {len(values)} values, must hold one")
    return values


def row(tensors: Tensors, field: str, limit: int | None) -> np.ndarray:
    """Return the values [n] of an input [1, n]. Raises InvalidRequestError for another shape, or more than `limit`."""
    values = tensors[field]
    if values.ndim != 2 or values.shape[0] != 1:
        raise InvalidRequestError(f"{field} has shape {list(values.shape)}, must be [1, n]: one user a request")
    if limit is not None and values.shape[1] > limit:
        raise InvalidRequestError(f"{field} holds {values.shape[1]} entries, at most {limit} are allowed")
    return values[0]

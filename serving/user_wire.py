"""Tensors of the models that know users: USER, and the events of an ingest call.

Invariant: as in `wire`, every tensor begins with a batch dimension of 1 and a request is one user.
"""

from serving.histories import NewEvents
from serving.wire import Tensors, decode_ids, one, row

EVENTS_INPUTS = ("USER", "ITEMS", "ACTIONS", "TIMES")
USER_INPUTS = ("USER", "REQUEST_TIME", "EXCLUDE", "K")


def decode_events(tensors: Tensors) -> NewEvents:
    """Return the events in the inputs of gr_events. Raises InvalidRequestError for a wrong shape or text."""
    return NewEvents(
        user=decode_user(tensors),
        items=decode_ids(row(tensors, "ITEMS"), "ITEMS"),
        actions=row(tensors, "ACTIONS"),
        times=row(tensors, "TIMES"),
    )


def decode_user(tensors: Tensors) -> int | str:
    """Return the user id. Raises InvalidRequestError unless there is one."""
    (user,) = decode_ids(one(tensors, "USER"), "USER").tolist()
    return user

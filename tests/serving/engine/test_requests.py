"""Every broken request gets a named error, every odd but legal one an answer."""

import numpy as np
import pytest

from serving.engine.requests import (
    MAX_CANDIDATES,
    MAX_EVENTS,
    History,
    InvalidRequestError,
    RankRequest,
    RetrieveRequest,
    check_rank,
    check_retrieve,
)


def rank(**changes: object) -> RankRequest:
    fields: dict = {"items": [5, 6, 7], "actions": [1, 2, 3], "times": [10, 10, 20], "offset": 0}
    candidates = np.array(changes.pop("candidates", [5, 6]), np.int64)
    request_time = int(changes.pop("request_time", 20))  # type: ignore[call-overload]
    fields |= changes
    arrays = {name: np.array(fields[name], np.int64) for name in ("items", "actions", "times")}
    return RankRequest(
        history=History(offset=fields["offset"], **arrays), candidates=candidates, request_time=request_time
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"request_time": 19}, "REQUEST_TIME is 19, earlier than the last event"),
        ({"times": [10, 9, 20]}, r"HISTORY_TIMES\[1\] is 9"),
        ({"times": [10, 20, 1 << 62], "request_time": 20}, r"HISTORY_TIMES\[2\]"),
        ({"request_time": 1 << 62}, "REQUEST_TIME"),
        ({"times": [10, 20]}, "equally long, got 3, 3 and 2"),
        ({"actions": [1, 2]}, "equally long, got 3, 2 and 3"),
        ({"actions": [1, -1, 3]}, r"HISTORY_ACTIONS\[1\] is -1"),
        ({"actions": [1, 2, 8]}, r"HISTORY_ACTIONS\[2\] is 8, must be a bitmask of the data set's 3 actions"),
        ({"offset": -1}, "HISTORY_OFFSET is -1"),
        ({"offset": 1 << 50}, "HISTORY_OFFSET"),
        ({"candidates": np.zeros(MAX_CANDIDATES + 1)}, f"CANDIDATES holds {MAX_CANDIDATES + 1} entries"),
        ({"items": np.zeros(MAX_EVENTS + 1)}, "HISTORY_ITEMS holds"),
    ],
)
def test_a_broken_request_is_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        check_rank(rank(**changes), num_actions=3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"items": [], "actions": [], "times": []},
        {"candidates": []},
        {"candidates": np.zeros(MAX_CANDIDATES)},
        {"times": [20, 20, 20]},
        {"times": [-30, -20, -10]},
    ],
)
def test_an_odd_but_legal_request_passes(changes: dict) -> None:
    check_rank(rank(**changes), num_actions=3)


def test_k_below_one_is_refused() -> None:
    base = rank()
    for k in (0, -3):
        request = RetrieveRequest(history=base.history, k=k, exclude=np.zeros(0, np.int64), request_time=20)
        with pytest.raises(InvalidRequestError, match=f"K is {k}"):
            check_retrieve(request, num_actions=3)

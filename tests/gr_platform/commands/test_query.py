"""What a person types as items becomes ids of the data set, or one sentence."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from gr_platform.commands.query import Asker
from gr_platform.errors import UserError


def _asker(id_type: str) -> Asker:
    asker = Asker.__new__(Asker)
    asker.dataset = SimpleNamespace(declaration=SimpleNamespace(name="shop", item_id_type=id_type))  # type: ignore[assignment]
    return asker


def test_ids_are_read_in_the_type_of_the_data_set() -> None:
    assert _asker("int64")._item_ids(["-3", "9223372036854775807"]) == [-3, 9223372036854775807]
    assert _asker("string")._item_ids(["a", "7"]) == ["a", "7"]


@pytest.mark.parametrize(
    ("items", "message"),
    [([], "no item is named"), (["1", "a"], "item 'a' is not an integer"), (["9" * 20], "beyond 64 bits")],
)
def test_items_that_cannot_be_ids_are_one_sentence(items: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _asker("int64")._item_ids(items)


@pytest.mark.parametrize(("id_type", "sent"), [("int64", 42), ("string", "42")])
def test_the_servers_own_history_is_asked_for_by_id_at_the_time_now(id_type: str, sent: int | str) -> None:
    asked = {}

    def recommend_user(user: int | str, **call: int) -> SimpleNamespace:
        asked.update(call, user=user)
        return SimpleNamespace(items=np.array([3]), scores=np.array([[0.5]]), cached_tokens=2)

    asker = _asker("int64")
    asker.dataset.declaration.user_id_type = id_type
    asker.tasks, asker._titles = ("like",), {3: "Three"}
    asker._client = SimpleNamespace(recommend_user=recommend_user)  # type: ignore[assignment]
    before = time.time_ns() // 1_000_000
    answer = asker.recommend("42", 5, server_history=True)
    assert (asked["user"], asked["k"], answer.lines[0].title) == (sent, 5, "Three")
    assert before <= asked["request_time"] <= time.time_ns() // 1_000_000
    assert asker.recommend("42", 5, at=7, server_history=True)
    assert asked["request_time"] == 7


def test_a_user_that_cannot_be_an_id_is_one_sentence() -> None:
    asker = _asker("int64")
    asker.dataset.declaration.user_id_type = "int64"
    with pytest.raises(UserError, match="user 'ada' is not an integer, but the users of shop are"):
        asker.recommend("ada", 5, server_history=True)

"""What a person types as items becomes ids of the data set, or one sentence."""

from types import SimpleNamespace

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

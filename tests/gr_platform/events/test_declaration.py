import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_platform.errors import UserError
from gr_platform.events.declaration import Declaration

names = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=1, max_size=20, unique=True)


def made(**fields):
    return Declaration(**{"name": "made", "actions": ("view", "like"), "positives": ("view",), **fields})


@given(names, st.data())
def test_toml_and_json_give_back_any_declaration(actions, data):
    chosen = tuple(data.draw(st.lists(st.sampled_from(actions), unique=True, min_size=1)))
    declaration = made(
        actions=tuple(actions),
        positives=chosen,
        tasks={"t": chosen},
        columns={"user_id": actions[0], "item_id": tuple(actions)},
        rename_actions={name + "?": name for name in chosen},
        context=("device", "order"),
        header=tuple(actions),
        strict=bool(len(chosen) % 2),
        time_unit="auto",
    )
    assert Declaration.from_toml(declaration.to_toml()) == declaration
    assert Declaration.from_json(declaration.to_json()) == declaration


@given(names, names)
def test_appending_actions_never_moves_a_bit(first, more):
    before = made(actions=tuple(first), positives=tuple(first))
    after = before.with_actions(more)
    assert after.actions[: len(first)] == before.actions
    assert all(after.action_mask([name]) == before.action_mask([name]) for name in first)
    assert after.positive_mask() == (1 << len(after.actions)) - 1


def test_masks_follow_the_order_of_the_actions():
    declaration = made(tasks={"like": ("like",), "any": ("view", "like")})
    assert declaration.action_mask(["like"]) == 2
    assert declaration.task_masks() == {"like": 2, "any": 3}
    assert declaration.positive_mask() == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"actions": tuple(f"a{i}" for i in range(63)), "positives": ()}, "63"),
        ({"actions": ("a", "a"), "positives": ()}, "different"),
        ({"positives": ("share",)}, "share"),
        ({"exclude_seen": "some"}, "exclude_seen"),
        ({"name": "../up"}, "cannot name"),
        ({"name": "active"}, "active"),
        ({"merge_window_ms": -1}, "merge_window_ms"),
        ({"context": ("Device",)}, "lower-case"),
        ({"context": ("user_id",)}, "have already"),
        ({"context": ("a", "a")}, "all different"),
        ({"context": tuple(f"c{i}" for i in range(17))}, "at most 16"),
        ({"columns": {"person": "who"}}, "canonical columns"),
        ({"columns": {"user_id": ()}}, "must be text"),
        ({"rename_actions": {"addtocart": "cart"}}, "rename_actions leads to"),
        ({"strict": "yes"}, "strict"),
    ],
)
def test_what_does_not_hold_together_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        made(**fields)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('actions = "ab"', "actions is 'ab', must be a list"),
        ("actions = []", "actions is .*, must be a list"),
        ('time_zone = "Mars/Phobos"', "time zone 'Mars/Phobos', which there is not"),
        ("time_zone = 5", "time_zone is 5, must be text"),
        ("columns = { user_id = 3 }", "user_id is 3, must be text"),
        ('tasks = { like = "like" }', "task like is 'like', must be a list"),
        ("tasks = { like = [] }", "task like is .*, must be a list"),
        ('tasks = "like"', "is not valid"),
        ('columns = "user"', "is not valid"),
        ('context = "device"', "context is 'device', must be a list"),
        ("rename_actions = { a = 1 }", "is not valid"),
    ],
)
def test_an_edit_of_the_wrong_type_is_one_sentence(line, said):
    lines = {"name": 'name = "x"', "actions": 'actions = ["like"]', "positives": 'positives = ["like"]'}
    text = "\n".join((lines | {line.split()[0]: line}).values())
    with pytest.raises(UserError, match=said):
        Declaration.from_toml(text)


def test_a_broken_file_is_one_sentence():
    with pytest.raises(UserError, match=r"dataset\.toml is not valid TOML"):
        Declaration.from_toml("actions = [")
    with pytest.raises(UserError, match="no entry positives"):
        Declaration.from_toml('name = "x"\nactions = ["a"]\n')
    with pytest.raises(UserError, match="unknown entries colour"):
        Declaration.from_json(made().to_json() | {"colour": "red"})


def test_a_manifest_of_an_older_release_still_reads():
    fields = made().to_json()
    for name in ("strict", "context", "header", "catalogue", "rename_actions"):
        del fields[name]
    assert Declaration.from_json(fields) == made()


def test_a_given_declaration_is_strict_unless_it_says_otherwise():
    text = 'name = "x"\nactions = ["like"]\npositives = ["like"]\n'
    assert Declaration.from_toml(text, strict=True).strict
    assert not Declaration.from_toml(text).strict
    assert not Declaration.from_toml("strict = false\n" + text, strict=True).strict

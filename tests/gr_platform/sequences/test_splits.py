import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_platform.errors import UserError
from gr_platform.sequences.splits import (
    check_no_leak,
    describe_targets,
    is_refit,
    leave_one_out,
    target_positions,
    train_ends,
)


@given(st.lists(st.integers(0, 9), max_size=30))
def test_parts_are_disjoint_ordered_and_complete(lengths):
    ends = train_ends(np.array(lengths, np.int64))
    validation_rows, validation = target_positions(np.array(lengths, np.int64), "validation")
    test_rows, test = target_positions(np.array(lengths, np.int64), "test")
    assert validation_rows.tolist() == test_rows.tolist() == [row for row, n in enumerate(lengths) if n >= 3]
    assert (test == np.array(lengths, np.int64)[test_rows] - 1).all()
    assert (validation == test - 1).all()
    assert (ends[validation_rows] == validation).all()
    assert all(ends[row] == n for row, n in enumerate(lengths) if n < 3)


def user(*times):
    return [(number, 1, time) for number, time in enumerate(times)]


def test_ties_and_repeats_of_targets_are_counted(make_dataset):
    repeated = [(4, 1, 0), (5, 1, 1), (4, 1, 2), (5, 1, 3)]
    dataset = make_dataset([user(0, 5, 5), user(0, 1, 1, 2), repeated, user(0, 0)], 10)
    assert describe_targets(dataset) == {
        "validation": {"targets": 3, "ties": 1, "repeats": 1},
        "test": {"targets": 3, "ties": 1, "repeats": 1},
    }


def test_a_sound_data_set_has_no_leak(cycle_dataset):
    assert check_no_leak(cycle_dataset) == []


@pytest.mark.parametrize(("extra", "said"), [(1, "validation"), (2, "test")])
def test_training_on_a_target_is_caught(cycle_dataset, extra, said):
    ends = train_ends(cycle_dataset.lengths)
    ends[7] += extra
    problems = check_no_leak(cycle_dataset, ends=ends)
    assert f"1 users' {said} targets are among their training exposures" in problems


def test_a_target_copied_into_its_history_is_caught(make_dataset):
    planted = [(0, 1, 0), (2, 1, 9), (1, 1, 9), (2, 1, 9)]
    problems = check_no_leak(make_dataset([user(0, 1, 2), planted], 5))
    assert problems == ["1 exposures stand twice, so a target may be part of its own history"]


def test_an_event_from_after_the_target_in_its_history_is_caught(make_dataset):
    problems = check_no_leak(make_dataset([user(0, 1, 2), user(0, 9, 3)], 5))
    assert problems == ["1 exposures are older than the one before them, so histories hold events after the target"]


def test_users_do_not_leak_into_each_other(make_dataset):
    assert check_no_leak(make_dataset([user(7, 8, 9), user(0, 1, 2), []], 5)) == []


def test_a_refit_trains_up_to_the_test_target_and_leaks_nothing_of_it(make_dataset):
    dataset = make_dataset([user(0, 1, 2, 3), user(0, 1), user(0, 1, 2)], 5)
    held = leave_one_out(dataset, "test", refit=True)
    assert held.ends.tolist() == [3, 2, 2]
    assert held.targets.positions.tolist() == [3, 2]
    assert held.targets.known.tolist() == [3, 2]
    assert check_no_leak(dataset, holdout=held) == []
    assert check_no_leak(dataset, ends=held.ends, holdout=held) == []
    assert check_no_leak(dataset, ends=held.ends) == ["2 users' validation targets are among their training exposures"]
    with pytest.raises(ValueError, match="must be 'test' after a refit"):
        leave_one_out(dataset, "validation", refit=True)


def test_what_was_trained_on_says_whether_it_was_a_refit(cycle_dataset):
    lengths = cycle_dataset.lengths
    assert not is_refit(cycle_dataset, train_ends(lengths))
    assert not is_refit(cycle_dataset, np.zeros_like(lengths))
    assert is_refit(cycle_dataset, train_ends(lengths, refit=True))
    leaking = train_ends(lengths, refit=True)
    leaking[7] += 1
    with pytest.raises(UserError, match="trained on the test targets of 1 users"):
        is_refit(cycle_dataset, leaking)

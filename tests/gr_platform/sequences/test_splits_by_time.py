from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gr_platform.errors import UserError
from gr_platform.sequences import splits
from gr_platform.sequences.splits import by_time, check_no_leak, describe_holdout, last_cut, leave_one_out

HOUR = 3_600_000
CUT = 100

# Users whose exposures are in order and stand once each, as sequentialize writes them.
logs = st.lists(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 5)), unique=True, max_size=9).map(sorted),
    min_size=1,
    max_size=6,
)
light = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def sequences_of(make_dataset, log):
    return make_dataset([[(item, 1, time) for time, item in user] for user in log], 6)


@light
@given(logs, st.integers(0, 200), st.integers(1, 120), st.sampled_from(["first", "all"]))
def test_by_time_equals_a_loop_over_users(make_dataset, log, cut, span, which):
    found = by_time(sequences_of(make_dataset, log), cut, cut + span, targets=which)
    expected = []
    for row, user in enumerate(log):
        inside = [i for i, (time, _) in enumerate(user) if cut <= time < cut + span]
        known = sum(time < cut for time, _ in user)
        expected += [(row, position, known) for position in (inside[:1] if which == "first" else inside)]
    assert found.ends.tolist() == [sum(time < cut for time, _ in user) for user in log]
    asked = found.targets
    assert list(zip(asked.rows.tolist(), asked.positions.tolist(), asked.known.tolist(), strict=True)) == expected


@light
@given(logs, st.integers(0, 200), st.sampled_from(["first", "all"]))
def test_clean_sequences_never_trip_the_leak_check(make_dataset, log, cut, which):
    dataset = sequences_of(make_dataset, log)
    holdout = by_time(dataset, cut, targets=which)
    assert check_no_leak(dataset) == []
    assert check_no_leak(dataset, holdout=holdout) == []
    assert splits.require_trained_before(dataset, holdout.ends, cut) < cut
    describe_holdout(dataset, holdout)


def user(*times):
    return [(number, 1, time) for number, time in enumerate(times)]


@pytest.fixture
def dataset(make_dataset):
    """The second user has an exposure exactly at the cut, the third has nothing before it, the fourth nothing after."""
    return make_dataset([user(10, 90, 110, 120), user(5, 100, 130), user(150, 160), user(1, 2)], 9)


def test_the_cut_itself_belongs_to_the_window_and_an_end_does_not(dataset):
    held = by_time(dataset, CUT, 110)
    assert held.ends.tolist() == [2, 1, 0, 2]
    assert held.targets.rows.tolist() == [1]
    assert by_time(dataset, CUT, 111, targets="all").targets.rows.tolist() == [0, 1]
    with pytest.raises(ValueError, match="cut < end"):
        by_time(dataset, CUT, CUT)


def test_blocks_change_no_split(dataset, monkeypatch):
    whole = by_time(dataset, CUT, targets="all")
    monkeypatch.setattr(type(dataset).blocks, "__kwdefaults__", {"ends": None, "max_events": 3})
    parts = by_time(dataset, CUT, targets="all")
    assert (parts.ends == whole.ends).all()
    assert (parts.targets.positions == whole.targets.positions).all()
    assert describe_holdout(dataset, parts) == {"targets": 6, "ties": 0, "repeats": 0, "cold": 2}


def test_repeats_in_a_window_are_those_of_the_history_before_the_cut(make_dataset):
    dataset = make_dataset([[(1, 1, 0), (2, 1, 100), (2, 1, 101), (1, 1, 102)], [(2, 1, 100)]], 4)
    held = by_time(dataset, CUT, targets="all")
    assert describe_holdout(dataset, held) == {"targets": 4, "ties": 0, "repeats": 1, "cold": 1}


@pytest.mark.parametrize("row", [0, 1])
def test_training_one_exposure_too_long_is_caught_even_by_a_tie_at_the_cut(dataset, row):
    held = by_time(dataset, CUT)
    ends = held.ends.copy()
    ends[row] += 1
    said = ["1 users' window targets are among their training exposures", "1 training exposures are not before the cut"]
    assert check_no_leak(dataset, ends=ends, holdout=held) == said
    assert check_no_leak(dataset, holdout=replace(held, ends=ends)) == said
    with pytest.raises(RuntimeError, match=r"max\(train event_ts\) must be before"):
        splits.require_trained_before(dataset, ends, CUT)


def test_training_beyond_the_window_is_caught_where_no_target_is_touched(dataset):
    held = by_time(dataset, CUT, 150)
    ends = held.ends.copy()
    ends[2] = 1
    assert check_no_leak(dataset, ends=ends, holdout=held) == ["1 training exposures are not before the cut"]


def test_ends_longer_than_a_sequence_are_caught(dataset):
    held = by_time(dataset, CUT)
    ends = held.ends.copy()
    ends[3] += 1
    assert check_no_leak(dataset, ends=ends, holdout=held) == ["1 users have more training exposures than exposures"]


def test_a_history_that_holds_its_target_is_caught(dataset):
    held = by_time(dataset, CUT)
    asked = replace(held.targets, known=held.targets.known + (held.targets.rows == 1))
    assert check_no_leak(dataset, holdout=replace(held, targets=asked)) == [
        "1 window targets are part of their own history",
        "1 exposures of histories are not before the cut",
    ]
    one_out = leave_one_out(dataset, "test")
    asked = replace(one_out.targets, known=one_out.targets.positions + 1)
    assert check_no_leak(dataset, holdout=replace(one_out, targets=asked)) == [
        "2 test targets are part of their own history"
    ]


def test_a_target_outside_its_window_is_caught(dataset):
    held = by_time(dataset, CUT)
    assert check_no_leak(dataset, holdout=replace(held, window=(CUT, 150))) == [
        "1 window targets are outside the window"
    ]


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        # the target (item 3 at 100) copied into the training part, with its time and with an older place
        ([(0, 1, 10), (3, 1, 100), (1, 1, 20), (3, 1, 100)],
         ["1 exposures are older", "1 exposures stand twice"]),
        # an exposure twice in the history
        ([(0, 1, 10), (0, 1, 10), (3, 1, 100)], ["1 exposures stand twice"]),
        # an exposure of the window moved before its time: it stands in the history
        ([(0, 1, 10), (3, 1, 100), (1, 1, 90)], ["1 exposures are older"]),
    ],
)  # fmt: skip
def test_planted_sequences_are_caught_by_both_splits(make_dataset, planted, said):
    dataset = make_dataset([user(10, 90, 110), planted], 9)
    by_the_clock = check_no_leak(dataset, holdout=by_time(dataset, CUT))
    for problems in (check_no_leak(dataset), by_the_clock):
        for sentence in said:
            assert any(problem.startswith(sentence) for problem in problems)
    if "older" in said[0]:
        assert "1 training exposures are not before the cut" in by_the_clock


def test_the_last_hours_end_with_the_newest_exposure_and_need_something_before(make_dataset):
    dataset = make_dataset([user(0, HOUR, 2 * HOUR), [], user(3 * HOUR)], 5)
    assert last_cut(dataset, timedelta(hours=1)) == 2 * HOUR + 1
    held = by_time(dataset, last_cut(dataset, timedelta(hours=2)), targets="all")
    assert held.window == (HOUR + 1, 3 * HOUR + 1)
    assert held.targets.rows.tolist() == [0, 2]
    with pytest.raises(UserError, match="nothing to train on"):
        last_cut(dataset, timedelta(days=1))
    with pytest.raises(UserError, match="nothing to train on"):
        last_cut(make_dataset([[]], 5), timedelta(hours=1))


def test_a_data_set_without_exposures_has_an_empty_window(make_dataset):
    held = by_time(make_dataset([[], []], 3), 0)
    assert len(held.targets) == 0
    assert np.array_equal(held.ends, [0, 0])


def test_a_history_that_reaches_past_the_cut_is_caught_between_targets_that_do_not(make_dataset):
    dataset = make_dataset([[(0, 1, 10), (1, 1, 20), (2, 1, 30), (3, 1, CUT), (4, 1, CUT + 1), (5, 1, CUT + 2)]], 6)
    held = by_time(dataset, CUT, CUT + 50, targets="all")
    assert held.targets.known.tolist() == [3, 3, 3]
    leaky = replace(held.targets, known=np.array([3, 4, 3]))
    assert check_no_leak(dataset, holdout=replace(held, targets=leaky)) == [
        "1 exposures of histories are not before the cut"
    ]

"""Repeats found in a sorted stream are those that a plain look at every row finds, however the stream is cut."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_platform.events.moments import same_moment
from gr_platform.events.repeats import once, repeats_of

rows = st.tuples(
    st.sampled_from(["a", "b"]),
    st.integers(0, 2),
    st.integers(7, 9),
    st.integers(0, 1),
    st.sampled_from([None, 0.0, -0.0, 1.5]),
    st.sampled_from([None, None, "e1", "e2"]),
)


def table(found: list[tuple], *, with_ids: bool) -> pa.Table:
    """Return rows of (user, time, item, action, value, event id) in the total order."""
    found = sorted(found, key=lambda row: row[:2])
    user, time, item, action, value, event_id = (list(each) for each in zip(*found, strict=True))
    columns = {
        "user_id": pa.array(user),
        "item_id": pa.array(item, pa.int64()),
        "action": pa.array(np.array(action, np.uint8)),
        "value": pa.array(value, pa.float64()),
        "event_ts": pa.array(time, pa.int64()),
    }
    return pa.table(columns | ({"event_id": pa.array(event_id, pa.string())} if with_ids else {}))


def expected(made: pa.Table) -> list[bool]:
    """Return for each row whether an equal one without an id came before."""
    seen, found = set(), []
    for row in made.to_pylist():
        key = (row["user_id"], row["item_id"], row["action"], row["value"], row["event_ts"])
        has_id = row.get("event_id") is not None
        found.append(not has_id and key in seen)
        if not has_id:
            seen.add(key)
    return found


@settings(deadline=None, max_examples=200)
@given(found=st.lists(rows, min_size=1, max_size=30), with_ids=st.booleans())
def test_repeats_are_those_a_look_at_every_row_finds(found, with_ids):
    made = table(found, with_ids=with_ids)
    assert repeats_of(made).tolist() == expected(made)


@settings(deadline=None, max_examples=100)
@given(found=st.lists(rows, min_size=1, max_size=30), cuts=st.lists(st.integers(1, 6), min_size=1, max_size=30))
def test_where_the_stream_is_cut_changes_nothing(found, cuts):
    made = table(found, with_ids=False)
    batches, at = [], 0
    while at < len(made):
        size = cuts[len(batches) % len(cuts)]
        batches += made.slice(at, size).combine_chunks().to_batches()
        at += size
    kept = pa.concat_tables(once(batches))
    assert kept.to_pylist() == [row for row, bad in zip(made.to_pylist(), expected(made), strict=True) if not bad]


def test_rows_of_one_user_and_time_are_never_parted():
    made = table([("a", 1, item, 0, None, None) for item in range(5)] + [("b", 1, 1, 0, None, None)], with_ids=False)
    parts = list(once(batch for at in range(6) for batch in made.slice(at, 1).to_batches()))
    assert [len(part) for part in parts] == [5, 1]
    assert same_moment(made).tolist() == [True, True, True, True, False]


def test_values_that_differ_in_the_last_bit_are_two_events():
    made = table([("a", 1, 7, 0, 0.1, None), ("a", 1, 7, 0, np.nextafter(0.1, 1), None)], with_ids=False)
    assert not repeats_of(made).any()


@pytest.mark.parametrize("num_rows", [1, 5000])
def test_a_crowd_of_equal_rows_counts_once(num_rows):
    made = table([("a", 1, 7, 1, None, None)] * num_rows, with_ids=False)
    assert repeats_of(made).sum() == num_rows - 1

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_platform.evaluation.metrics import rank_metrics
from gr_platform.evaluation.slices import SLICES, popularity_bins, slice_table


def ranked(ranks, known=None, age=None, items=None):
    zeros = np.zeros(len(ranks), np.int64)
    columns = {"rank": np.array(ranks), "known": known, "age_days": age, "item": items}
    return pa.table({name: zeros if value is None else np.array(value) for name, value in columns.items()})


def rows_of(table, name):
    return [row for row in table.to_pylist() if row["slice"] == name]


def test_slices_equal_a_table_computed_by_hand():
    # ten users in order of their history: the first four find their item at rank 1, the others at 11, but one at 3
    ranks = [1, 1, 1, 1, 11, 11, 11, 11, 11, 3]
    found = rows_of(slice_table(ranked(ranks, known=range(10)), np.ones(1, np.int64)), "history_length")
    assert [row["bin"] for row in found] == ["1 of 5", "2 of 5", "3 of 5", "4 of 5", "5 of 5"]
    assert [(row["lower"], row["upper"]) for row in found] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert [row["num_users"] for row in found] == [2] * 5
    assert [row["hr_at_10"] for row in found] == [1, 1, 0, 0, 0.5]
    assert [row["ndcg_at_10"] for row in found] == [1, 1, 0, 0, 0.25]
    # a half found: the sample deviation of 0 and 1 is sqrt(1/2), over sqrt(2) users
    assert [row["hr_at_10_error"] for row in found] == pytest.approx([0, 0, 0, 0, 0.5])


def test_head_torso_and_tail_hold_one_half_three_tenths_and_two_tenths_of_the_exposures():
    # 100 exposures: item 2 has 50 of them, items 0 and 3 15 each, item 1 10, five others 2 each
    counts = np.array([15, 10, 50, 15, 2, 2, 2, 2, 2, 0])
    assert popularity_bins(counts).tolist() == [1, 2, 0, 1, 2, 2, 2, 2, 2, 2]
    found = rows_of(slice_table(ranked([1, 20, 1], items=[2, 0, 9]), counts), "item_popularity")
    assert [(row["bin"], row["lower"], row["hr_at_10"]) for row in found] == [
        ("head", 50, 1),
        ("torso", 15, 0),
        ("tail", 0, 1),
    ]
    assert found[0]["hr_at_10_error"] is None


def test_without_any_training_exposure_there_is_one_bin():
    assert popularity_bins(np.zeros(3, np.int64)).tolist() == [0, 0, 0]
    assert len(slice_table(ranked([]), np.zeros(3, np.int64))) == 0


target = st.tuples(st.integers(1, 30), st.integers(0, 6), st.floats(0, 900), st.integers(0, 4))


@given(st.lists(target, min_size=1, max_size=40), st.lists(st.integers(0, 50), min_size=5, max_size=5))
def test_the_bins_of_every_slice_average_to_the_whole(targets, counts):
    ranks, known, age, items = zip(*targets, strict=True)
    found = slice_table(ranked(ranks, known, age, items), np.array(counts))
    whole = rank_metrics(np.array(ranks))
    for name in SLICES:
        rows = rows_of(found, name)
        number = [row["num_users"] for row in rows]
        assert sum(number) == len(targets)
        for figure in ("hr_at_10", "ndcg_at_10"):
            assert np.average([row[figure] for row in rows], weights=number) == pytest.approx(whole[figure])
        spans = sorted((row["lower"], row["upper"]) for row in rows)
        assert all(left[1] < right[0] for left, right in pairwise(spans))

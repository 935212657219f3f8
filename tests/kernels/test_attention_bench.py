"""The attention bench reports the rows of the issue under their names, and times nothing that is wrong."""

from importlib import import_module

import pytest
import torch

from kernels import bench as benches
from kernels.hstu_attention import bench

ISSUE = {
    "attention forward, lengths to 1,024, 32 users, 4 heads, d 32: padded eager / ours": 15.0,
    "the same, loop over users / ours": 1.7,
    "attention backward: padded eager / ours": 8.0,
    "attention backward: loop / ours": 1.7,
    "extra memory, MB": 100.0,
    "forward, share of `torch.mm` peak on useful FLOPs": 22.0,
}


@pytest.fixture
def small(monkeypatch):
    for name, value in (
        ("NUM_USERS", 2),
        ("MAX_LENGTH", 64),
        ("ROUNDS", 1),
        ("LENGTHS", {8: 1, 64: 1}),
    ):
        monkeypatch.setattr(bench, name, value)


def test_the_rows_of_the_issue_come_first_and_those_by_length_last(small):
    rows = bench.rows()
    assert {row["name"]: row["target"] for row in rows[:6]} == ISSUE
    assert [row["name"] for row in rows if row.get("at_most")] == ["extra memory, MB"]
    assert all(row["unit"] == "ms" and row["target"] is None for row in rows[6:])
    assert rows[-1]["name"] == "backward, ours, 2 users of 64"
    assert len({row["name"] for row in rows}) == len(rows) == 6 + 6 + 2 * 6


def test_a_variant_that_computes_something_else_is_not_timed(small):
    leaves, jagged = bench.inputs(2, 16, 8)
    wrong = {"wrong": lambda leaves, jagged: 2 * bench._loop(leaves, jagged)}
    with pytest.raises(RuntimeError, match="wrong disagrees"):
        bench.best_ms(wrong, leaves, jagged, 1)


def test_what_has_a_target_comes_before_milliseconds(monkeypatch, small):
    softmax = [{"name": "softmax", "target": 3.0}, {"name": "softmax, ours", "target": None}]
    monkeypatch.setattr(import_module("kernels.sampled_softmax.bench"), "gather_over_ours", lambda num_threads: softmax)
    rows = benches.attention(torch.get_num_threads())
    assert rows[6]["name"] == "softmax"
    assert all(row["target"] is None for row in rows[7:])

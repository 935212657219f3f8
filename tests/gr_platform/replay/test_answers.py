"""Old answers are told from new ones by the models' own scores, and figures of a load count every request."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gr_platform.replay import answers
from gr_platform.replay.answers import NOBODY, SEVERAL, model_of, models_of, staleness
from gr_platform.replay.load import Served, Swapped, Told
from gr_platform.replay.traffic import figures
from gr_platform.replay.visitors import Lived
from serving.bench.generator import EXPIRED, FAILED, KINDS, OK, RECORD, REJECTED
from serving.engine.requests import History

A, B, C = (Served(retrieval=Path(f"r{n}"), ranking=Path(f"k{n}"), label=n) for n in "abc")
OLD, NEW = {1: np.array([0.1, 0.2]), 2: np.array([0.5, 0.4])}, {1: np.array([0.3, 0.2]), 2: np.array([0.1, 0.6])}
EMPTY = History(items=np.zeros(0, np.int64), actions=np.zeros(0, np.int64), times=np.zeros(0, np.int64))
PROBE = Lived(
    kind="score", history=EMPTY, candidates=np.array([1, 2]), request_time=9, cacheable=0, day=1, target=1, probe=0
)


def note(items: list[int], scores: list) -> dict:
    return {"row": 0, "day": 1, "probe": 0, "items": items, "scores": scores}


def test_an_answer_is_of_the_model_whose_scores_it_has():
    assert model_of(note([2, 1], [[0.5, 0.4], [0.1, 0.2]]), [OLD, NEW]) == 0
    assert model_of(note([1], [[0.3, 0.2]]), [OLD, NEW]) == 1
    assert model_of(note([1], [[0.3 + 1e-6, 0.2]]), [OLD, NEW]) == 1
    assert model_of(note([1, 2], [[0.1, 0.2], [0.1, 0.6]]), [OLD, NEW]) == NOBODY
    assert model_of(note([1], [[0.3, float("nan")]]), [OLD, NEW]) == NOBODY
    assert model_of(note([3], [[0.3, 0.2]]), [OLD, NEW]) == NOBODY
    assert model_of(note([1], [[0.1, 0.2]]), [OLD, OLD]) == SEVERAL
    flat = [{1: np.array(0.25)}, {1: np.array(0.75)}]
    assert model_of(note([1], [0.75]), flat) == 1


def told(sent: list[float], scores: list[dict], swaps: list[Swapped], outcome: int = OK) -> Told:
    records = np.zeros(len(sent), RECORD)
    records["scheduled"] = records["sent"] = sent
    records["done"], records["outcome"], records["probe"] = records["sent"] + 0.1, outcome, -1
    notes = [note([1, 2], [table[1].tolist(), table[2].tolist()]) | {"row": row} for row, table in enumerate(scores)]
    return Told(records=records, notes=notes, probes=[PROBE], first=A, days=[(1, 0.0)], swaps=swaps)


@pytest.fixture
def _known(monkeypatch):
    monkeypatch.setattr(answers, "expected", lambda folders, probes, notes: {0: [OLD, NEW][: len(folders)]})


SWAP = [Swapped(served=B, began=10.0, ended=12.0)]


@pytest.mark.usefixtures("_known")
def test_an_old_answer_after_the_swap_is_stale_and_one_before_is_not():
    clean = staleness(told([5.0, 10.5, 11.0, 13.0], [OLD, OLD, NEW, NEW], SWAP))
    assert (clean.num_probes, clean.num_stale, clean.num_of_no_model) == (4, 0, 0)
    assert staleness(told([5.0, 11.0, 13.0], [OLD, NEW, OLD], SWAP)).num_stale == 1
    assert staleness(told([5.0, 12.5], [OLD, OLD], SWAP)).num_stale == 1
    neither = {1: OLD[1], 2: NEW[2]}
    assert staleness(told([5.0, 13.0], [OLD, neither], SWAP)).num_of_no_model == 1


@pytest.mark.usefixtures("_known")
def test_a_swap_of_the_other_model_alone_makes_nothing_stale():
    other = replace(A, retrieval=B.retrieval)
    assert staleness(told([5.0, 13.0], [OLD, OLD], [Swapped(served=other, began=10.0, ended=12.0)])).num_stale == 0


def test_a_pair_that_comes_back_is_the_model_it_was():
    there = [Swapped(served=each, began=10.0 * n, ended=10.0 * n + 1) for n, each in enumerate((B, C, B, B), 1)]
    folders, swaps = models_of(told([], [], there), "ranking")
    assert folders == [Path("ka"), Path("kb"), Path("kc")]
    assert [(swap.to, swap.began) for swap in swaps] == [(1, 10.0), (2, 20.0), (1, 30.0)]


def test_every_request_is_in_one_day_and_every_end_is_counted():
    made = told(np.arange(40.0).tolist(), [], SWAP)
    made.records["outcome"][[3, 11, 25]] = REJECTED, EXPIRED, FAILED
    made.records["kind"], made.records["cacheable"], made.records["cached"] = KINDS.index("recommend"), 10, 9
    lists = [{"row": row, "day": 1, "probe": -1, "hit": row % 2 == 0} for row in range(40) if row not in (3, 11, 25)]
    made = replace(made, notes=lists, days=[(1, 0.5), (2, 20.0)])
    found = figures(made)
    total = found["total"]
    assert [total[name] for name in ("requests", "answered", "rejected", "expired", "failed")] == [40, 37, 1, 1, 1]
    assert [day["requests"] for day in found["days"]] == [20, 20]
    assert [day["failed"] for day in found["days"]] == [0, 1]
    assert sum(day["lists"] for day in found["days"]) == total["lists"] == 37
    assert total["lists_hit"] == 20
    assert total["hit_rate"] == 90
    # From 10 s to 5 s after the end at 12 s.
    assert found["during_swaps"]["requests"] == found["swaps"][0]["requests"] == 7
    assert found["outside_swaps"]["requests"] == 33
    assert sum(part["requests"] for part in found["timeline"]) == 40
    assert total["p50_ms"] == pytest.approx(100)


def test_probes_are_left_out_of_the_cache_hits():
    made = told([1.0, 2.0], [OLD, OLD], [])
    made.records["cacheable"], made.records["cached"] = 10, [2, 10]
    made.notes[1] = {"row": 1, "day": 1, "probe": -1}
    assert figures(made)["total"]["hit_rate"] == 100


def test_a_load_without_requests_has_no_latency():
    found = figures(told([], [], []))
    assert (found["total"]["requests"], found["total"]["p99_ms"], found["timeline"]) == (0, None, [])

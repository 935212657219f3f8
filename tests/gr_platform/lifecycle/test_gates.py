"""The gates: each objects by itself, and nothing that could not be measured passes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_platform.lifecycle import gates
from gr_platform.lifecycle.gates import Cost, Evidence, Moved, ShadowEvidence
from gr_platform.lifecycle.options import Gates, Shadow

BETTER = {"figure": "ndcg_at_10", "a": 0.30, "b": 0.33, "difference": 0.03, "low": 0.02, "high": 0.04, "p_value": 0.001}
EQUAL_NE = {"figure": "like_ne", "a": 0.9, "b": 0.9, "difference": 0.0, "low": -0.01, "high": 0.01, "p_value": 1.0}
WORSE_NE = EQUAL_NE | {"b": 0.95, "difference": 0.05, "low": 0.02, "high": 0.08, "p_value": 0.001}
BIN = {"slice": "user_age", "bin": "1 of 5", "num_users": 500, "champion": 0.4, "difference": 0.0, "low": -0.1}
LIVE = ShadowEvidence(num_requests=60, failures=0.0, latency_ratio=0.8, score_drift=0.1, agreement=0.9)
GOOD = Evidence(
    parity={"retrieval": 0.1, "ranking": 0.2},
    hit_rate=(0.4, 0.1),
    item_share=0.02,
    has_champion=True,
    differences={"retrieval": [BETTER], "ranking": [EQUAL_NE]},
    slices=[BIN | {"high": 0.1}],
    costs={"ranking": (Cost(milliseconds=2.0, num_bytes=100), Cost(milliseconds=2.0, num_bytes=100))},
    catalogue=(100, 110),
    score_drift={"like": Moved(psi=0.05, champion=1.1, challenger=1.2)},
    shadow=LIVE,
)
ASKED = Shadow(requests=50)
AWAY = Moved(psi=2.0, champion=1.1, challenger=1.3)


def closed(evidence: Evidence, shadow: Shadow = ASKED) -> list[str]:
    return [verdict.gate for verdict in gates.judge(evidence, Gates(), shadow) if not verdict.ok]


def test_a_good_challenger_passes_every_gate_and_each_is_told_in_order() -> None:
    verdicts = gates.judge(GOOD, Gates(), ASKED)
    assert [verdict.gate for verdict in verdicts] == list(gates.MEANINGS)
    assert all(verdict.ok and verdict.why for verdict in verdicts)


@pytest.mark.parametrize(
    ("change", "gate", "why"),
    [
        ({"parity": {"ranking": 1.5}}, "parity", "ranking bundle's largest error"),
        ({"parity": {"ranking": float("nan")}}, "parity", "nan"),
        (
            {"parity": {"retrieval": 0.1, "ranking": float("nan")}},
            "parity",
            "the ranking bundle's largest error is nan",
        ),
        ({"item_share": 0.8}, "window", "one item holds 80.0%"),
        ({"hit_rate": (0.1, 0.1)}, "popularity", "popularity's is 0.1000"),
        ({"differences": {"retrieval": [BETTER], "ranking": [WORSE_NE]}}, "quality", "like_ne is worse for certain"),
        ({"differences": {"retrieval": [BETTER | {"p_value": 0.2}]}}, "quality", "nothing is better for certain"),
        ({"differences": {}}, "quality", "could not be measured"),
        ({"slices": [BIN | {"high": -0.1}]}, "slices", "user_age 1 of 5 falls by 25.0%"),
        ({"catalogue": (3, 110)}, "catalogue", "3 items stand in the top 10"),
        ({"catalogue": (3, 0)}, "catalogue", "could not be measured"),
        ({"score_drift": {"like": AWAY}}, "score_drift", "moved by 2 (PSI), their mean from 1.10 to 1.30 times what"),
        ({"score_drift": {"like": replace(AWAY, champion=None)}}, "score_drift", "probabilities of like moved by 2"),
        ({"score_drift": {}}, "score_drift", "could not be measured"),
        ({"faults": {"unseen": "it saw the window"}}, "unseen", "it saw the window"),
        ({"faults": {"finite": "3 scores are NaN"}}, "finite", "3 scores are NaN"),
        ({"faults": {"taken_back": "it was rolled back"}}, "taken_back", "it was rolled back"),
        ({"shadow": replace(LIVE, num_requests=10)}, gates.LIVE, "10 live requests, 50 are wanted"),
        ({"shadow": replace(LIVE, failures=0.5)}, "shadow", "failed in 50.0% of live requests"),
        ({"shadow": replace(LIVE, latency_ratio=9.0)}, "shadow", "9.00 times as long"),
        ({"shadow": replace(LIVE, score_drift=None)}, "shadow", "moved by nan"),
        ({"shadow": replace(LIVE, agreement=-0.5)}, "shadow", "agrees with the served one by -0.50"),
    ],
)
def test_each_gate_objects_by_itself(change: dict, gate: str, why: str) -> None:
    changed = replace(GOOD, **change)
    assert closed(changed) == [gate]
    (reason,) = gates.reasons(gates.judge(changed, Gates(), ASKED))
    assert reason.startswith(f"{gate}: ")
    assert why in reason


@pytest.mark.parametrize(("ours", "gate"), [((9.0, 100), "latency"), ((2.0, 900), "memory")])
def test_costs_are_held_against_the_champions(ours: tuple[float, int], gate: str) -> None:
    cost = Cost(milliseconds=ours[0], num_bytes=ours[1])
    assert closed(replace(GOOD, costs={"ranking": (cost, GOOD.costs["ranking"][1])})) == [gate]


def test_without_a_champion_only_what_needs_none_is_asked() -> None:
    first = Evidence(parity=GOOD.parity, hit_rate=GOOD.hit_rate, item_share=GOOD.item_share)
    verdicts = gates.judge(first, Gates(), ASKED)
    assert [verdict.gate for verdict in verdicts] == [
        "unseen",
        "finite",
        "taken_back",
        "parity",
        "window",
        "popularity",
    ]
    assert all(verdict.ok for verdict in verdicts)


def test_live_requests_are_not_asked_for_where_none_are_wanted() -> None:
    assert closed(replace(GOOD, shadow=None), Shadow(requests=0)) == []
    assert closed(replace(GOOD, shadow=None)) == [gates.LIVE]


def test_probabilities_that_move_towards_what_happened_do_not_object() -> None:
    towards = Moved(psi=5.4, champion=2.0, challenger=0.98)
    assert towards.nearer
    assert closed(replace(GOOD, score_drift={"like": towards})) == []
    assert closed(replace(GOOD, score_drift={"like": towards, "buy": AWAY})) == ["score_drift"]


def test_a_small_slice_cannot_object() -> None:
    assert closed(replace(GOOD, slices=[BIN | {"high": -0.3, "num_users": 20}])) == []


@given(
    gain=st.floats(-0.2, 0.2),
    p_value=st.floats(0.0, 1.0),
    ne=st.floats(-0.2, 0.2),
    ne_p=st.floats(0.0, 1.0),
)
def test_what_is_worse_for_certain_never_passes_and_nothing_passes_that_is_not_better_for_certain(
    gain: float, p_value: float, ne: float, ne_p: float
) -> None:
    differences = {
        "retrieval": [BETTER | {"difference": gain, "p_value": p_value}],
        "ranking": [EQUAL_NE | {"difference": ne, "p_value": ne_p}],
    }
    passed = "quality" not in closed(replace(GOOD, differences=differences))
    certain = [(gain, p_value < 0.05), (-ne, ne_p < 0.05)]
    worse = any(value < 0 and sure for value, sure in certain)
    better = any(value > 0 and sure for value, sure in certain)
    # 1 - .95 is not .05 in binary: at the very bound either answer is right.
    if abs(p_value - 0.05) > 1e-9 and abs(ne_p - 0.05) > 1e-9:
        assert passed == (better and not worse)

"""A model card says what its facts say: every figure of them, and none that they do not hold."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from gr_platform.registry import model_card

DAY_MS = 86_400_000
CUT = 20_000 * DAY_MS


def _figures(start: float, step: float) -> list[dict[str, Any]]:
    names = ("hr_at_10", "ndcg_at_10", "mrr")
    return [
        {"figure": name, "value": start + i * step, "low": start + i * step - 0.0111, "high": start + i * step + 0.0222}
        for i, name in enumerate(names)
    ]


@pytest.fixture
def facts() -> dict[str, Any]:
    """The facts of a retrieval model, every number of them another one."""
    difference = {"a": 0.2031, "b": 0.3042, "difference": 0.1053, "low": 0.0064, "high": 0.2075, "p_value": 0.0086}
    return {
        "name": "shop-retrieval",
        "version": "7",
        "kind": "retrieval",
        "run": "retrieval_model-0123456789abcdef",
        "run_digest": "a" * 40,
        "commit": "b" * 40,
        "data": {
            "name": "shop",
            "sequences": "c" * 40,
            "vocabulary": "d" * 40,
            "num_users": 1301,
            "num_items": 2302,
            "num_exposures": 33303,
            "num_trained_users": 1204,
            "num_trained_exposures": 32305,
            "first_ms": CUT - 90 * DAY_MS,
            "last_ms": CUT + DAY_MS - 1,
            "trained_until_ms": CUT - 1,
        },
        "split": {"validation_cut": CUT - DAY_MS, "cut": CUT, "end": CUT + DAY_MS},
        "recipe": {
            "name": "small",
            "seed": 17,
            "model": {"encoder": "hstu", "embedding_dim": 48, "num_layers": 3, "max_events": 250, "chunk": 6},
            "training": {"max_epochs": 19, "batch_size": 96, "learning_rate": 0.00321, "refit": True, "seed": 17},
        },
        "warm_start": "e" * 40,
        "compute": {"num_parameters": 123457, "seconds": 61.25, "tokens_per_s": 45678.0, "pflops_days": 1.5e-7},
        "tasks": [],
        "quality": {
            "model": _figures(0.3141, 0.0107),
            "co-occurrence": _figures(0.2718, 0.0109),
            "popularity": _figures(0.1414, 0.0113),
        },
        "slices": [
            {
                "slice": "item_popularity",
                "bin": "head",
                "lower": 38.0,
                "upper": 116.0,
                "num_users": 555,
                "hr_at_10": 0.4321,
                "hr_at_10_error": 0.0123,
            }
        ],
        "judgement": {
            "window": {"kind": "time", "cut": CUT, "end": CUT + DAY_MS},
            "champion": {"retrieval": {"name": "shop-retrieval", "version": "6"}},
            "challenger": {"retrieval": {"name": "shop-retrieval", "version": "7"}},
            "differences": {"retrieval": [{"figure": "hr_at_10", **difference}]},
            "gates": [{"gate": "quality", "ok": True, "value": 0.5187, "bound": 0.0297, "why": "better"}],
            "passed": True,
        },
        "outcome": "promoted",
    }


def _numbers(facts: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield (path, number) of every figure that a card is to show: times and the cuts stand there as dates."""
    if isinstance(facts, dict):
        for name, value in facts.items():
            if name not in ("validation_cut", "cut", "end", "first_ms", "last_ms", "trained_until_ms", "version"):
                yield from _numbers(value, f"{path}.{name}")
    elif isinstance(facts, list):
        for place, value in enumerate(facts):
            yield from _numbers(value, f"{path}[{place}]")
    elif isinstance(facts, int | float) and not isinstance(facts, bool):
        yield path, float(facts)


def _shown(card: str) -> list[float]:
    """Return every number of a card that is no part of a date, a digest, a name or a sentence of its own."""
    for known in ("95 %", "@10", r"`[^`]*`", r"\d{4}-\d\d-\d\d(T[\d:]+Z)?", r"version \d+"):
        card = re.sub(known, " ", card)
    return [float(text.replace(",", "")) for text in re.findall(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?", card)]


def test_every_figure_of_the_facts_stands_in_the_card_and_no_other(facts: dict[str, Any]) -> None:
    shown, known = _shown(model_card.card(facts)), dict(_numbers(facts))
    missing = {path: value for path, value in known.items() if value not in [pytest.approx(s, rel=5e-4) for s in shown]}
    assert missing == {}
    invented = [value for value in shown if value not in [pytest.approx(k, rel=5e-4) for k in known.values()]]
    assert invented == []


def test_names_digests_dates_and_the_outcome_stand_in_the_card(facts: dict[str, Any]) -> None:
    card = model_card.card(facts)
    for text in ("shop-retrieval version 7", "a" * 40, "b" * 40, "c" * 40, "d" * 40, "e" * 40, "warm start", "small"):
        assert text in card
    assert "| newest event learned from | 2024-10-03T23:59:59Z |" in card
    assert "Outcome: promoted. Judged on 2024-10-04 against shop-retrieval version 6." in card
    assert "| HR@10 | 0.3141 [0.303, 0.3363] | 0.2718 [0.2607, 0.294] | 0.1414 [0.1303, 0.1636] |" in card


def test_the_summary_is_short_and_says_what_counts(facts: dict[str, Any]) -> None:
    summary = model_card.summary(facts)
    assert len(summary) < 400
    assert summary.startswith("promoted: HR@10 0.3141")
    for text in ("Retrieval", "small", "warm start", "2024-10-03", "HR@10 0.3141 [0.303, 0.3363]", "promoted"):
        assert text in summary


def test_a_baseline_that_is_better_is_said_in_bold(facts: dict[str, Any]) -> None:
    assert "which only counts" not in model_card.card(facts)
    facts["quality"]["co-occurrence"][0]["value"] = 0.9
    limits = model_card.card(facts).split("## Limits")[1]
    assert "**Co-occurrence, which only counts, is as good or better in HR@10 (0.9 against 0.3141).**" in limits


def test_a_refused_model_says_why_and_an_unjudged_one_that_it_is(facts: dict[str, Any]) -> None:
    gate = {"gate": "quality", "ok": False, "value": None, "bound": 0.0, "why": "NDCG@10 is worse for certain"}
    refused = facts["judgement"] | {"gates": [gate], "passed": False}
    told = model_card.card(facts | {"judgement": refused, "outcome": ""})
    assert "Outcome: refused; quality: NDCG@10 is worse for certain." in told
    assert "not judged yet" in model_card.summary(facts | {"judgement": None, "outcome": ""})


def test_a_ranking_model_no_better_than_the_mean_rate_says_so(facts: dict[str, Any]) -> None:
    quality = {"model": [{"figure": "like_ne", "value": 1.0201, "low": 0.967, "high": 1.123}]}
    ranking = facts | {"kind": "ranking", "tasks": ["like"], "quality": quality, "beside": {"like_auc": 0.6063}}
    card = model_card.card(ranking | {"slices": [], "judgement": None})
    assert "probability of each action: like" in card
    assert "**NE of like is 1.02: no better than predicting the mean rate.**" in card
    assert "| AUC of like | 0.6063 |" in card


def test_a_card_without_an_evaluation_says_that_it_has_no_figures(facts: dict[str, Any]) -> None:
    card = model_card.card(facts | {"quality": {}, "slices": [], "judgement": None, "outcome": ""})
    assert "It has no figures" in card
    assert "no figures" in model_card.summary(facts | {"quality": {}})

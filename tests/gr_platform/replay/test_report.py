"""The report says what happened, good or bad, on a page that needs nothing else."""

import json
import re

import pytest

from gr_platform.replay import plots, report


def sentences(facts: dict, ok: bool | None) -> str:
    return "\n".join(verdict.sentence for verdict in report.verdicts(facts) if verdict.ok is ok)


def test_a_good_week_has_every_claim_with_its_figures(facts):
    told = sentences(facts, ok=True)
    assert not sentences(facts, ok=False)
    for part in (
        "0 of 2,913 requests failed",
        "0 of 640 answers to known requests came from an old model",
        "6 of 7 days ended with a better model",
        "day 4, of whose events one item has 80 %, was refused: one item: 80 % of the window's events",
        "on day 7 the daily retrained model is ahead of the one frozen on day 1: NDCG@10 0.320 against 0.200",
        "ahead on 5 of 5 days after the first",
        "7 min 11 s on 2 CPU cores (allowed: 10 min 00 s)",
    ):
        assert part in told


def broken(facts: dict, path: str, value: object) -> dict:
    *parents, name = path.split(".")
    place = facts
    for each in parents:
        place = place[int(each) if each.isdigit() else each]
    place[name] = value
    return facts


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("load.total.answered", 2_910, "3 of 2,913 requests failed"),
        ("load.total.requests", 0, "of 0 requests"),
        ("staleness.num_stale", 2, "2 of 640 answers to known requests came from an old model"),
        ("staleness.num_of_no_model", 1, "and 1 from no model that was deployed"),
        ("staleness.num_undecided", 640, "640 fit two models"),
        ("days.3.outcome", "promoted", "was not refused (promoted)"),
        ("days.5.outcome", "failed", "day 6 failed"),
        ("days.6.retrieval.ndcg_at_10.difference", {"value": 0.1, "low": -0.1, "high": 0.3}, "not clearly ahead"),
        ("days.6.retrieval.ndcg_at_10.difference", {"value": 0.1, "low": None, "high": None}, "no interval"),
        ("seconds", 601.0, "10 min 01 s"),
    ],
)
def test_what_was_missed_is_said(facts, path, value, said):
    assert said in sentences(broken(facts, path, value), ok=False)


def test_without_any_promotion_nothing_is_claimed(facts):
    for day in facts["days"]:
        day["outcome"] = "kept"
    assert "0 of 7 days" in sentences(facts, ok=False)


def test_without_a_swap_no_answer_could_be_stale_and_that_is_no_success(facts):
    facts["load"]["swaps"] = []
    assert "no model was swapped" in sentences(facts, ok=None)
    assert "swapped" not in sentences(facts, ok=True)
    facts["staleness"]["num_stale"] = 1
    assert "1 of 640 answers" in sentences(facts, ok=False)


def test_the_refusal_of_an_ordinary_day_is_told_and_is_no_success(facts):
    facts["days"][5] |= {"outcome": "refused", "reasons": ["quality: worse"]}
    assert "the model of day 6 was refused as well: quality: worse" in sentences(facts, ok=None)
    assert "day 6" not in sentences(facts, ok=True)


def test_the_page_needs_nothing_but_itself_and_shows_every_day(facts, tmp_path):
    facts["days"][1]["reasons"] = ["<script>alert(1)</script>"]
    facts["seconds"] = 700.0
    page = report.write(tmp_path, facts)
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert text.count("(missed)") == 1
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    assert text.count("data:image/png;base64,") == 6
    for day in facts["days"]:
        assert day["date"] in text
    assert text.count('<tr class="fault">') == 2
    assert json.loads((tmp_path / report.FACTS).read_text()) == facts


def test_a_day_without_figures_is_left_out_not_drawn_as_zero(facts):
    for day in facts["days"][3:]:
        day["retrieval"] = day["ranking"] = None
    for entry in facts["load"]["timeline"][3:]:
        entry |= {"p50_ms": None, "p99_ms": None, "hit_rate": None}
    facts["days"][2]["ranking"] = None
    facts["load"]["swaps"] = []
    text = report.render(facts)
    assert text.count("data:image/png;base64,") == 6
    assert "on day 3 the daily" in sentences(facts, ok=True)


def test_a_replay_of_one_day_compares_nothing(facts):
    facts["days"] = facts["days"][:1]
    assert "frozen" not in sentences(facts, ok=True)
    assert "1 of 1 days" in sentences(facts, ok=True)
    assert report.render(facts)


def test_pictures_are_small(facts):
    for png in (
        plots.quality(facts["days"], "retrieval", "ndcg_at_10", "NDCG@10"),
        plots.latency(facts["load"]),
        plots.requests(facts["load"]),
    ):
        assert png.startswith(b"\x89PNG")
        assert len(png) < 80_000

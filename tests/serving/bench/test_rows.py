"""What the benchmark concludes from records: percentiles, refusals, hits, stale scores, another tool's report."""

import json
from pathlib import Path

import numpy as np
import pytest

from gr_platform.errors import UserError
from serving.bench import load, perf, swap
from serving.bench.generator import EXPIRED, FAILED, OK, RECORD, REJECTED
from serving.bench.swap import Swap
from serving.bench.traffic import Population, Traffic

TRAFFIC = Traffic(
    first_id=1000,
    num_items=9,
    num_actions=1,
    max_events=8,
    chunk=4,
    num_users=5,
    first_events=(2, 8),
    recommend_share=0.0,
)


def records(count: int, **columns) -> np.ndarray:
    made = np.zeros(count, RECORD)
    made["probe"] = -1
    for name, values in columns.items():
        made[name] = values
    return made


def by_name(rows: list[dict]) -> dict[str, float]:
    return {row.get("what", row["name"]): row["value"] for row in rows}


REPORT = {
    "spent_s": 10.0,
    "server_cpu_s": 15.0,
    "generator_cpu_s": 1.0,
    "gr_cache_hit_tokens_total": 30.0,
    "gr_cache_prefill_tokens_total": 10.0,
    "gr_cache_delta_tokens_total": 4.0,
}


def test_figures_of_a_load_are_those_of_its_requests():
    outcome = np.array([OK] * 97 + [REJECTED, EXPIRED, FAILED])
    done = np.concatenate([np.arange(1, 98) / 100, [0.001, 2.0, 0.001]])
    made = records(100, outcome=outcome, done=done, sent=0.004, cached=3, cacheable=4)
    found = by_name(load._of_load(made, REPORT, 0.3, 10.0))
    assert found["offered"] == 10.0
    # 98 waits: those answered, and the one given up after 2 s; refusals took no time and say nothing.
    assert (found["latency, p50"], found["latency, p99"]) == (pytest.approx(490), pytest.approx(2000))
    assert found["goodput, answers within 250 ms"] == 2.5
    assert (found["rejected"], found["given up at the deadline"], found["failed"]) == (1, 1, 1)
    assert found["cache hits by CACHED_TOKENS"] == 75
    assert found["cache hits by the server's counters"] == 75
    assert (found["server CPU"], found["generator CPU"]) == (1.5, 0.1)
    assert found["generator late, p99"] == pytest.approx(4)


def test_a_load_without_answers_has_rows_without_values():
    found = by_name(
        load._of_load(records(3, outcome=REJECTED), {"spent_s": 1.0, "server_cpu_s": 0, "generator_cpu_s": 0}, 0.1, 1.0)
    )
    assert found["latency, p99"] is None
    assert found["cache hits by CACHED_TOKENS"] is None
    assert found["cache hits by the server's counters"] is None
    assert found["rejected"] == 100


OLD, NEW = np.array([0.1, 0.9]), np.array([0.6, 0.2])


def test_scores_tell_the_model_that_gave_them_or_that_none_did():
    expected = np.stack([OLD, NEW])

    def told(scores: np.ndarray) -> int:
        return swap.served_by(np.concatenate([scores, np.full(3, np.nan)]).astype(np.float32), expected)

    assert (told(OLD + 1e-6), told(NEW), told((OLD + NEW) / 2)) == (0, 1, -1)


def judged(sent: list[float], seen: list[int], swaps: list[Swap]) -> tuple[int, int]:
    made = records(len(sent), sent=sent, done=np.array(sent) + 0.5)
    return swap.stale(made, np.array(seen), swaps)


def test_old_scores_are_stale_only_when_asked_for_after_the_flip():
    flip = [Swap(to=1, began=10.0, ended=12.0)]
    # The first new answer comes at 11.5.
    assert judged([9, 10.5, 11.0, 11.2], [0, 0, 1, 1], flip) == (0, 0)
    assert judged([9, 11.4, 11.0, 11.2], [0, 0, 1, 1], flip) == (0, 0)
    assert judged([9, 11.6, 11.0, 13], [0, 0, 1, 1], flip) == (1, 0)
    # No new answer before the end: from then on there must be no old one.
    assert judged([9, 11.9, 12.1], [0, 0, 0], flip) == (1, 0)


def test_every_swap_has_its_own_old_model():
    there_and_back = [Swap(to=1, began=10.0, ended=12.0), Swap(to=0, began=20.0, ended=22.0)]
    assert judged([9, 13, 19, 20.5, 23, 24], [0, 1, 1, 1, 0, 0], there_and_back) == (0, 0)
    assert judged([9, 13, 19, 20.5, 23, 24], [0, 1, 0, 1, 0, 1], there_and_back) == (2, 0)
    assert judged([9, 13], [0, -1], there_and_back) == (0, 1)


def test_a_swap_is_judged_by_its_failures_its_scores_and_the_slowest_answers():
    expected = [np.stack([OLD, NEW])]
    scheduled = np.concatenate([np.arange(100) / 10, 10 + np.arange(100) / 10])
    made = records(200, scheduled=scheduled, sent=scheduled, done=scheduled + np.repeat([0.1, 0.2], 100))
    made["phase"] = np.repeat([1, 2], 100)
    made["probe"] = 0
    made["scores"][:, :2] = np.where(scheduled[:, None] < 12, OLD, NEW)
    flip = [Swap(to=1, began=10.0, ended=12.0)]
    clean = swap._judged(made, flip, expected, 8.0)
    assert [row["value"] for row in clean[:5]] == [0, 0, 0, 0, pytest.approx(2)]
    assert clean[0]["name"] == "swap at 30 % of saturation: failed requests, stale scores"
    assert clean[4]["name"] == "P99 during the swap / before"
    made["outcome"][[110, 120]] = FAILED
    made["scores"][199, :2] = OLD
    made["scores"][198, :2] = 0.5
    broken = swap._judged(made, flip, expected, 8.0)
    assert [row["value"] for row in broken[:4]] == [4, 2, 1, 1]
    timeline = clean[-1]["timeline"]
    assert [(each["at_s"], round(each["p50"]), round(each["p99"])) for each in timeline[4:6]] == [
        (-0.5, 100, 100),
        (0.5, 200, 200),
    ]
    assert (timeline[0]["at_s"], timeline[-1]["at_s"], clean[-1]["ended_s"]) == (-4.5, 9.5, [2.0])


def test_perf_analyzer_gets_the_same_visits_as_json():
    visits = [Population(TRAFFIC).visit() for _ in range(3)]
    data = json.loads(json.dumps(perf.input_data(visits)))["data"]
    assert len(data) == 3
    for visit, tensors in zip(visits, data, strict=True):
        assert tensors["CANDIDATES"] == {"content": visit.candidates.tolist(), "shape": [len(visit.candidates)]}
        assert tensors["HISTORY_ITEMS"]["shape"] == tensors["HISTORY_TIMES"]["shape"] == [len(visit.history.items)]
        assert tensors["REQUEST_TIME"] == {"content": [visit.request_time], "shape": [1]}


def test_a_report_of_perf_analyzer_is_read_and_another_file_is_not():
    text = "Request Rate,p50 latency,p90 latency,p95 latency,p99 latency\n30,5900,54986,81066,110656\n"
    assert perf.report(text) == [5.9, 81.066, 110.656]
    for other in ("", "a,b\n1,2\n"):
        with pytest.raises(UserError, match="no latencies"):
            perf.report(other)


def test_without_perf_analyzer_a_row_says_so(monkeypatch):
    monkeypatch.delenv("GR_PERF_ANALYZER", raising=False)
    (row,) = perf.rows(None, 10.0)
    assert row["value"] is None
    assert "GR_PERF_ANALYZER is not set" in row["against"]


def test_a_folder_without_perf_analyzer_is_said(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("GR_PERF_ANALYZER", str(tmp_path))
    with pytest.raises(UserError, match="without an executable perf_analyzer"):
        perf.rows(None, 10.0)


STAMP = {"machine": "m", "date": "d", "ok": None}


def test_loads_become_one_column_each_and_a_small_picture(load_script):
    make, plots = load_script("docs/benchmarks/make.py"), load_script("docs/benchmarks/plots.py")
    of_loads = [
        row | STAMP
        for share, slowest in ((0.1, 1.0), (1.2, 4.0))
        for row in load._of_load(records(9, done=slowest, cacheable=2, cached=1), REPORT, share, 3.0)
    ]
    alone = {"name": "saturation", "value": 7.0, "unit": "1/s", "against": None, "target": None} | STAMP
    table = make.table([alone, *of_loads])
    assert table.index("| saturation | 7 | 1/s |") < table.index("| of saturation | unit | 10 % | 120 % |")
    assert "| latency, p99 | ms | 1,000 | 4,000 |" in table
    picture = plots.serving_load([alone, *of_loads])
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 70_000
    assert plots.serving_speed([alone]) is plots.serving_swap([alone]) is plots.serving_load([alone]) is None


def test_times_and_the_seconds_of_a_swap_become_pictures_and_one_line_a_side(load_script):
    make, plots = load_script("docs/benchmarks/make.py"), load_script("docs/benchmarks/plots.py")
    times = [
        {"name": f"{side} {n} {m}", "value": scale * n * m, "unit": "ms", "against": None, "target": None}
        | {"side": side, "n": n, "m": m}
        | STAMP
        for side, scale in (("cached", 1.0), ("uncached", 3.0))
        for n, m in ((2, 4), (8, 4), (2, 16))
    ]
    second = {"at_s": 0.5, "p50": 1.0, "p99": 2.0}
    around = {"name": "swap", "value": None, "unit": "ms", "against": None, "target": None}
    around |= {"timeline": [second, second | {"at_s": 1.5}], "ended_s": [1.2]} | STAMP
    table = make.table([*times, around])
    assert "| ms of one request | n 2, m 4 | n 8, m 4 | n 2, m 16 |" in table
    assert "| uncached | 24 | 96 | 96 |" in table
    assert "swap" not in table
    for plot in (plots.serving_speed, plots.serving_swap):
        assert plot([*times, around]).startswith(b"\x89PNG")

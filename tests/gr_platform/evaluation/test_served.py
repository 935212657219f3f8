"""What the served log tells about recommendations, held against outcomes that can be counted by hand."""

from dataclasses import replace
from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow.parquet as pq
import pytest

from assets.materialization import MAX_PLOT_BYTES
from assets.resources import Platform
from assets.served import served
from gr_platform import serving_state
from gr_platform.errors import UserError
from gr_platform.evaluation import plots
from gr_platform.evaluation.served import FILE, served_outcomes
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file
from serving.served_rows import Served, ServedBy, table_of

DS = "log"
DAY_MS = 86_400_000
START_MS = 1_700_000_000_000
BY = ServedBy(
    item_id_type="int64",
    tasks=("buy",),
    retriever_digest="r",
    ranker_digest="k1",
    shadow_digest="s",
    shadow_tasks=("buy",),
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Users 1 and 2 who meet items at hours after START, and an event 30 days later that closes all windows."""
    lines = ["user_id,item_id,action,timestamp"]
    for user, item, action, hours in [
        (1, 10, "view", -1),
        (1, 12, "view", 2),
        (1, 11, "buy", 5),
        (1, 13, "view", 24 * 8),
        (2, 10, "buy", 1),
        (3, 99, "view", 24 * 30),
        *((user, 50 + user, "view", -5) for user in range(20, 32)),
    ]:
        lines.append(f"{user},{item},{action},{START_MS // 1000 + 3600 * hours}")
    source = tmp_path / "log.csv"
    source.write_text("\n".join(lines) + "\n")
    home = tmp_path / "home"
    import_file(source, home=home)
    ingest(home, DS)
    return home


def entry(user: str | None, items: list[int], *, hours: float = 0.0, shadow: list[float] | None = None) -> Served:
    scores = np.linspace(0.9, 0.1, len(items), dtype=np.float32)[:, None]
    return Served(
        request_id="r",
        served_ts=START_MS + round(3_600_000 * hours),
        request_ts=START_MS + round(3_600_000 * hours),
        user=user,
        items=np.array(items, np.int64),
        scores=scores,
        latency_ms=4.0,
        shadow_scores=None if shadow is None else np.array(shadow, np.float32)[:, None],
    )


def write_log(home: Path, entries: list[Served], *, by: ServedBy = BY, name: str = "part-1.parquet") -> Path:
    key = serving_state.hash_key(home)
    rows = [(each, None if each.user is None else serving_state.user_hash(key, DS, each.user)) for each in entries]
    part = serving_state.served_folder(home, DS) / "date=2023-11-14" / name
    part.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table_of(rows, by), part)
    return part


def outcomes(home: Path) -> list[dict]:
    return pq.read_table(served_outcomes(home, DS).folder / FILE).to_pylist()


def test_an_empty_log_has_no_figures_and_no_fault(home):
    facts = served_outcomes(home, DS).manifest.facts
    assert (facts["num_requests"], facts["hit_rate"], facts["rank_agreement"], facts["days"]) == (0, None, None, [])
    assert outcomes(home) == []


def test_a_hit_is_a_later_event_of_the_user_on_a_served_item_within_the_window(home):
    write_log(
        home,
        [
            entry("1", [11, 12, 10]),
            entry("1", [10, 13], hours=0.5),
            entry("1", [12], hours=2),
            entry("2", [5, 10]),
            entry("4", [10]),
            entry(None, [10]),
            entry("1", [], hours=0.1),
        ],
    )
    found = [(row["num_items"], row["position"], row["is_judged"], row["has_user"]) for row in outcomes(home)]
    assert sorted(found, key=str) == sorted(
        [
            (3, 1, True, True),
            (2, None, True, True),
            (1, None, True, True),
            (2, 2, True, True),
            (1, None, True, True),
            (1, None, False, False),
            (0, None, True, True),
        ],
        key=str,
    )
    facts = served_outcomes(home, DS).manifest.facts
    assert (facts["num_requests"], facts["num_with_user"], facts["num_judged"], facts["num_hits"]) == (7, 6, 6, 2)
    assert facts["hit_rate"] == pytest.approx(2 / 6)
    assert facts["positions"][:3] == [1, 1, 0]
    assert facts["latency_ms_p50"] == 4.0
    longer = served_outcomes(home, DS, window_days=9).manifest.facts
    assert longer["num_hits"] == 3


def test_a_request_whose_window_is_still_open_counts_neither_way(home):
    write_log(home, [entry("1", [99], hours=24 * 23 + 1), entry("2", [10])])
    facts = served_outcomes(home, DS).manifest.facts
    assert (facts["num_with_user"], facts["num_judged"], facts["hit_rate"]) == (2, 1, 1.0)


def test_the_agreement_is_spearmans_of_served_and_shadow_ranking(home):
    by_shadow = [
        ([0.8, 0.5, 0.1], 1.0),
        ([0.1, 0.5, 0.8], -1.0),
        ([0.3, 0.3, 0.1], pytest.approx(0.866, abs=1e-3)),
        ([0.3, 0.3, 0.3], None),
    ]
    write_log(home, [entry("1", [1, 2, 3], shadow=shadow) for shadow, _ in by_shadow] + [entry("1", [1, 2, 3])] * 4)
    rows = outcomes(home)
    assert [row["agreement"] for row in rows[:4]] == [expected for _, expected in by_shadow]
    facts = served_outcomes(home, DS).manifest.facts
    assert (facts["num_shadow"], facts["shadow_share"]) == (4, 0.5)
    assert facts["rank_agreement"] == pytest.approx((1 - 1 + 0.866) / 3, abs=1e-3)


def test_the_same_log_is_not_joined_again_and_a_longer_one_replaces_the_old_result(home):
    write_log(home, [entry("1", [12])])
    first = served_outcomes(home, DS)
    assert served_outcomes(home, DS).reused
    write_log(home, [entry("2", [10])], by=replace(BY, ranker_digest="k2"), name="part-2.parquet")
    second = served_outcomes(home, DS)
    assert not second.reused
    assert not first.folder.exists()
    assert [(model["ranker_digest"], model["num_requests"]) for model in second.manifest.facts["models"]] == [
        ("k1", 1),
        ("k2", 1),
    ]


def test_a_damaged_part_and_one_of_other_ids_are_left_out_and_counted(home):
    write_log(home, [entry("1", [12])])
    text = replace(entry("1", []), items=np.array(["a"], object), scores=np.ones((1, 1), np.float32))
    write_log(home, [text], by=replace(BY, item_id_type="string"), name="part-2.parquet")
    write_log(home, [entry("1", [12])], name="part-3.parquet").write_bytes(b"PAR1 no")
    facts = served_outcomes(home, DS).manifest.facts
    assert (facts["num_requests"], facts["num_parts"], facts["num_parts_left_out"]) == (1, 1, 2)


def test_without_events_the_stage_before_is_named(tmp_path, home):
    with pytest.raises(UserError, match="no"):
        served_outcomes(tmp_path / "other", DS)


@pytest.mark.parametrize("logged", [False, True], ids=["empty", "logged"])
def test_the_asset_reports_the_figures_and_a_small_plot(home, logged):
    if logged:
        write_log(home, [entry("1", [12]), entry("2", [3, 10], shadow=[0.1, 0.2])])
    done = dg.materialize([served], resources={"platform": Platform(home=str(home), dataset=DS)})
    metadata = done.asset_materializations_for_node("served")[0].metadata
    assert metadata["num_requests"].value == (2 if logged else 0)
    assert ("hit_rate" in metadata, "plot" in metadata) == (logged, logged)


def test_the_picture_of_many_days_is_small():
    days = [
        {"date": f"2026-01-{day + 1:02d}", "num_requests": day, "hit_rate": None if day < 5 else 0.1}
        for day in range(31)
    ]
    assert 0 < len(plots.served(days, [5] * 20)) < MAX_PLOT_BYTES

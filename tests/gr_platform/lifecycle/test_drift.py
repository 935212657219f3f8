"""The report of drift: what a served pair's log and age say, what asks for a retraining and what must not."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from gr_platform import serving_state, storage
from gr_platform.cli import app
from gr_platform.errors import UserError
from gr_platform.evaluation.served import served_outcomes
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file
from gr_platform.lifecycle import drift, drift_events, drift_served
from gr_platform.lifecycle.drift import crossed, report
from serving.served_rows import Served, ServedBy, table_of

DS = "log"
DAY_MS = 86_400_000
START_DAY = 20_000
NUM_DAYS = 20
Import = Callable[..., None]


def log_csv(*, poisoned: bool = False, other_items: bool = False) -> str:
    """Return a log of 60 users and NUM_DAYS days of 300 views each, whose last day may be another one."""
    rng = np.random.default_rng(5)
    popularity = 1 / (5 + np.arange(90))
    lines = ["user_id,item_id,action,timestamp"]
    for day in range(NUM_DAYS):
        items = 1 + rng.choice(90, 300, p=popularity / popularity.sum())
        if day == NUM_DAYS - 1 and poisoned:
            items[:240] = 7
        if day == NUM_DAYS - 1 and other_items:
            items += 5000
        seconds = (START_DAY + day) * 86_400 + np.sort(rng.integers(0, 86_000, 300))
        users = rng.integers(1, 61, 300)
        lines += [f"{u},{i},view,{s}" for u, i, s in zip(users, items, seconds, strict=True)]
    return "\n".join(lines) + "\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("GR_HOME", str(folder))
    monkeypatch.setenv("COLUMNS", "200")
    return folder


@pytest.fixture
def land(home: Path, tmp_path: Path) -> Import:
    def land(**kind: bool) -> None:
        source = tmp_path / "log.csv"
        source.write_text(log_csv(**kind))
        import_file(source, home=home)
        ingest(home, DS)

    return land


def bundle(
    home: Path, kind: str, digest: str, *, until: int | None = None, hr: float = 0.1, split: bool = True
) -> Path:
    """Write what the manifest of a bundle says; its files are not read here."""
    folder = home / "bundles" / DS / f"{kind}-{digest}"
    folder.mkdir(parents=True)
    facts: dict[str, Any] = {"model_digest": digest, "trained_until_ms": until, "split": {"cut": 1} if split else None}
    facts["metrics"] = {kind: {"hr_at_1": hr / 5, "hr_at_10": hr, "hr_at_50": 2 * hr, "mrr": 0.0}}
    storage.write_manifest(folder, kind=kind, spec={"run": f"run of {digest}"}, facts=facts)
    return folder


def serve(home: Path, *, retriever: str = "r2", ranker: str = "k2", until: int | None = None, ds: str = DS) -> None:
    """Let the model repository name a pair."""
    folder = home / "model_repositories" / "pair-1"
    for model, kind, digest in (("gr_retriever", "retrieval", retriever), ("gr_ranker", "ranking", ranker)):
        (folder / model / "1").mkdir(parents=True)
        os.symlink(bundle(home, kind, digest, until=until), folder / model / "1" / "bundle")
    storage.write_manifest(
        folder, kind="pair", spec={}, facts={"dataset": ds, "retrieval": retriever, "ranking": ranker}
    )
    (home / "model_repository").symlink_to("model_repositories/pair-1")


def served_day(
    home: Path, day: int, num: int, *, pair: tuple[str, str] = ("r2", "k2"), hits: float = 0.0, mean: float = -2.0
) -> None:
    """Write a part of the served log: `num` lists on a day; the share `hits` of them holds an item of that user's."""
    rng = np.random.default_rng(day)
    by = ServedBy(item_id_type="int64", tasks=("like", "buy"), retriever_digest=pair[0], ranker_digest=pair[1])
    key, rows = serving_state.hash_key(home), []
    for number in range(num):
        user = str(1 + number % 60)
        # Item 1 is so frequent that everybody meets it within a week; item 4000 is met by nobody.
        items = np.array([1 if number < hits * num else 4000, 4001, 4002])
        odds = mean + rng.normal(size=(3, 2)) + [0.0, -2.0]
        at = (START_DAY + day) * DAY_MS + 1000 * number
        entry = Served(
            request_id="r",
            served_ts=at,
            request_ts=at,
            user=user,
            items=items,
            scores=(1 / (1 + np.exp(-odds))).astype(np.float32),
            latency_ms=1.0,
        )
        rows.append((entry, serving_state.user_hash(key, DS, user)))
    part = serving_state.served_folder(home, DS) / f"date={day:03}" / f"part-{pair[1]}.parquet"
    part.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table_of(rows, by), part)


def bounds(home: Path, **options: float) -> None:
    lines = ["[drift]", *(f"{name} = {json.dumps(value)}" for name, value in options.items())]
    (home / "lifecycle.toml").write_text("\n".join(lines) + "\n")


def test_without_events_there_is_no_report_and_without_models_nothing_to_train_again(home: Path, land: Import) -> None:
    with pytest.raises(UserError, match="no ingested events"):
        report(home, DS)
    land(other_items=True)
    found = report(home, DS)
    assert not found["item_drift"].ok
    assert [each.name for each in found.measures if each.value is None] == [
        *("score_drift", "online_offline", "model_age", "served_for")
    ]
    assert crossed(home, DS) == []


def test_an_ordinary_day_behind_fresh_models_crosses_nothing(home: Path, land: Import) -> None:
    land()
    serve(home, until=(START_DAY + NUM_DAYS - 2) * DAY_MS)
    found = report(home, DS)
    assert (found.alarms, crossed(home, DS)) == ([], [])
    assert found["model_age"].value == pytest.approx(2, abs=0.1)
    assert found["served_for"].value == pytest.approx(0, abs=0.01)
    assert found.day == "2024-10-23"


def test_a_drifted_day_asks_for_a_retraining_in_a_sentence_that_names_the_bound(home: Path, land: Import) -> None:
    land(other_items=True)
    serve(home, until=(START_DAY + NUM_DAYS - 2) * DAY_MS)
    (why,) = crossed(home, DS)
    assert "items of 2024-10-23 against those of 7 days before" in why
    assert "at most 0.25 (drift.max_item_drift)" in why


def test_a_poisoned_day_is_an_alarm_and_asks_for_no_retraining_however_old_the_models(home: Path, land: Import) -> None:
    land(poisoned=True)
    serve(home, until=START_DAY * DAY_MS)
    found = report(home, DS)
    assert {each.name for each in found.measures if not each.ok} >= {"item_share", "item_drift", "model_age"}
    assert any("item 7 has 8" in why and "max_item_share" in why for why in found.alarms)
    assert (found.asks, crossed(home, DS)) == ([], [])
    bounds(home, max_item_share=1.0, max_item_drift=10)
    assert [why for why in crossed(home, DS) if "max_model_age_days" in why] == crossed(home, DS) != []


def test_old_models_ask_for_a_retraining_and_bundles_that_do_not_say_are_not_judged(home: Path, land: Import) -> None:
    land()
    serve(home, until=None)
    assert report(home, DS)["model_age"].value is None
    run = home / "runs" / DS / "retrieval_model-1"
    for kind, digest in (("retrieval", "r2"), ("ranking", "k2")):
        run = home / "runs" / DS / f"{kind}_model-1"
        run.mkdir(parents=True)
        facts = {"trained_until_ms": (START_DAY + 5) * DAY_MS}
        made = storage.write_manifest(run, kind=f"{kind}_model", spec={}, facts=facts)
        manifest = home / "bundles" / DS / f"{kind}-{digest}" / storage.MANIFEST
        fields = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(fields | {"spec": {"run": made.digest}}))
    (why,) = crossed(home, DS)
    assert "learned from events until 2024-10-09" in why
    assert "15.0 days, at most 7" in why


def test_models_of_another_data_set_are_not_the_served_ones(home: Path, land: Import) -> None:
    land()
    serve(home, until=0, ds="elsewhere")
    assert report(home, DS)["model_age"].why == "no models of this data set are served"


def test_a_damaged_or_empty_model_repository_is_one_without_models(home: Path, land: Import) -> None:
    land()
    serve(home, until=0)
    assert crossed(home, DS) != []
    (home / "bundles" / DS / "ranking-k2" / storage.MANIFEST).write_text("{")
    assert crossed(home, DS) == []
    (home / "model_repositories" / "pair-1" / storage.MANIFEST).unlink()
    assert crossed(home, DS) == []


def test_events_and_log_are_measured_once_for_each_state(
    home: Path, land: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    land()
    serve(home, until=(START_DAY + NUM_DAYS) * DAY_MS)
    served_day(home, 3, 150)
    measured = []
    real_events, real_scores = drift_events.day_drift, drift_served.score_drift
    monkeypatch.setattr(drift_events, "day_drift", lambda *a: measured.append("events") or real_events(*a))
    monkeypatch.setattr(
        drift_served, "score_drift", lambda *a, **rest: measured.append("scores") or real_scores(*a, **rest)
    )
    first = report(home, DS)
    again = report(home, DS)
    assert [each.why for each in again.measures][:-1] == [each.why for each in first.measures][:-1]
    assert measured == ["events", "scores"]
    served_day(home, 4, 150)
    assert report(home, DS)["score_drift"].value is not None
    bounds(home, max_item_drift=0.0)
    assert not report(home, DS)["item_drift"].ok, "a bound counts at once"
    assert measured == ["events", "scores", "scores"]
    bounds(home, min_events=120)
    report(home, DS)
    assert measured[3:] == ["events", "scores"]
    assert len(list((home / "drift" / DS).iterdir())) == 2


def test_scores_that_move_are_drift_and_scores_of_another_model_are_not_compared(home: Path, land: Import) -> None:
    land()
    serve(home, until=(START_DAY + NUM_DAYS) * DAY_MS)
    for day in (1, 2, 3):
        served_day(home, day, 150, pair=("r1", "k1"), mean=3.0)
    served_day(home, 4, 150)
    assert report(home, DS)["score_drift"].value is None, "one day of this model has nothing to be compared with"
    served_day(home, 5, 150)
    served_day(home, 6, 150)
    served_day(home, 7, 20, mean=3.0)
    usual = report(home, DS)["score_drift"]
    assert usual.value is not None
    assert usual.value < 0.1
    assert "on 2024-10-10" in usual.why, "the last day has too few requests"
    served_day(home, 8, 150, mean=0.0)
    moved = report(home, DS)["score_drift"]
    assert not moved.ok
    assert moved.why in crossed(home, DS)


def test_damaged_parts_of_the_served_log_are_passed_over(home: Path, land: Import) -> None:
    land()
    serve(home, until=(START_DAY + NUM_DAYS) * DAY_MS)
    for day in (5, 6):
        served_day(home, day, 150)
    (serving_state.served_folder(home, DS) / "date=005" / "part-0.parquet").write_bytes(b"PAR1 nothing")
    assert report(home, DS)["score_drift"].value is not None


def agreed(home: Path) -> drift.Measure:
    served_outcomes(home, DS)
    return report(home, DS)["online_offline"]


def test_online_and_offline_are_compared_with_those_of_the_models_before(home: Path, land: Import) -> None:
    land()
    serve(home, until=(START_DAY + NUM_DAYS) * DAY_MS)
    assert "0 requests" in agreed(home).why
    bundle(home, "retrieval", "r1", hr=0.05)
    served_day(home, 3, 200, hits=0.2, pair=("r1", "k1"))
    served_day(home, 5, 99, hits=0.4)
    assert "99 requests" in agreed(home).why
    served_day(home, 5, 200, hits=0.4)
    kept = agreed(home)
    assert kept.value == pytest.approx(0.0, abs=0.05), "twice as good offline, twice as good online"
    served_day(home, 5, 200, hits=0.1)
    lost = agreed(home)
    assert lost.value == pytest.approx(0.75, abs=0.02)
    assert not lost.ok
    assert "a relative loss of 7" in lost.why
    assert "at most 50 % (drift.max_hit_rate_loss)" in lost.why
    assert lost.why in crossed(home, DS)


@pytest.mark.parametrize("other", [{"split": False}, {"hr": 0.0}])
def test_a_model_before_that_was_judged_otherwise_is_no_standard(
    home: Path, land: Import, other: dict[str, Any]
) -> None:
    land()
    serve(home, until=(START_DAY + NUM_DAYS) * DAY_MS)
    bundle(home, "retrieval", "r1", **other)
    served_day(home, 3, 200, hits=0.2, pair=("r1", "k1"))
    served_day(home, 5, 200, hits=0.4)
    found = agreed(home)
    assert (found.value, found.ok) == (None, True)


def test_tenths_cut_counts_into_equal_parts() -> None:
    assert drift_served.tenths(dict.fromkeys(range(100), 3)) == [9, 19, 29, 39, 49, 59, 69, 79, 89]
    assert drift_served.tenths({0: 95, 1: 5}) == [0]
    assert drift_served.tenths({7: 5}) == []


def test_the_command_shows_every_measure_and_ends_with_1_if_a_bound_is_crossed(home: Path, land: Import) -> None:
    land()
    calm = CliRunner().invoke(app, ["drift"])
    assert calm.exit_code == 0, calm.output
    for name in ("item_drift", "action_drift", "item_share", "score_drift", "online_offline", "model_age"):
        assert name in calm.output
    bounds(home, max_item_share=0.01)
    raised = CliRunner().invoke(app, ["drift", "--dataset", DS])
    assert raised.exit_code == 1
    assert "crossed: item_share; no reason to train again: look at the data first" in raised.output

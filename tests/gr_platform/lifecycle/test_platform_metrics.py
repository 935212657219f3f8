"""The platform's figures for Prometheus: gathered when asked for, and never in the way of a scrape."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gr_platform import storage
from gr_platform.lifecycle import alerts, platform_figures
from gr_platform.lifecycle.platform_figures import Family
from gr_platform.lifecycle.platform_metrics import Part, PlatformCollector
from serving import health


def _figure(name, value):
    family = Family(name, "a figure")
    family.put(value)
    return family


def _scrape(collector):
    registry = CollectorRegistry()
    registry.register(collector)
    return samples(generate_latest(registry).decode())


def samples(text):
    """Return (name, label values in order of their names) -> value of an exposition."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_part_that_cannot_be_read_shows_itself_as_down_and_hides_no_other(caplog):
    def broken():
        yield _figure("gr_half", 1)
        raise KeyError("a defect")

    collector = PlatformCollector(
        [Part(name="good", read=lambda: [_figure("gr_good", 7)]), Part(name="broken", read=broken)]
    )
    found = _scrape(collector)
    assert found["gr_good",] == 7
    assert found["gr_platform_up", "good"] == 1
    assert found["gr_platform_up", "broken"] == 0
    assert ("gr_half",) not in found
    # Said once, not at every scrape.
    collector.gather(5.0)
    assert caplog.text.count("event=figures_not_read part=broken") == 1


@pytest.mark.parametrize("one_by_one", [True, False])
def test_the_first_reading_may_be_one_part_after_the_other(one_by_one):
    running, together = [], []

    def read():
        running.append(1)
        together.append(len(running))
        time.sleep(0.1)
        running.pop()
        return []

    collector = PlatformCollector([Part(name=name, read=read) for name in "abc"])
    collector.gather(30.0, one_by_one=one_by_one)
    assert (max(together) == 1) == one_by_one
    assert len(together) == 3


def test_a_part_that_hangs_holds_a_scrape_no_longer_than_the_deadline_and_is_read_once():
    go_on, asked = threading.Event(), []

    def hangs():
        asked.append(1)
        go_on.wait(60)
        return [_figure("gr_late", 1)]

    collector = PlatformCollector(
        [Part(name="late", read=hangs), Part(name="good", read=lambda: [_figure("gr_good", 7)])], deadline_s=0.3
    )
    try:
        for _ in range(3):
            started = time.monotonic()
            found = _scrape(collector)
            assert time.monotonic() - started < 5
            assert (found["gr_platform_up", "late"], found["gr_good",]) == (0, 7)
            assert ("gr_late",) not in found
        assert len(asked) == 1
    finally:
        go_on.set()
    assert collector.gather(30.0)
    found = _scrape(collector)
    assert (found["gr_platform_up", "late"], found["gr_late",]) == (1, 1)


def test_old_figures_are_not_shown_for_new_ones():
    outcomes = iter([[_figure("gr_it", 1)], None])

    def read():
        if (found := next(outcomes)) is None:
            raise OSError("gone")
        return found

    collector = PlatformCollector([Part(name="it", read=read, kept_s=0.0)])
    assert _scrape(collector)["gr_it",] == 1
    assert ("gr_it",) not in _scrape(collector)


def test_many_scrapes_at_once_read_once():
    asked = []

    def read():
        time.sleep(0.1)
        asked.append(1)
        return [_figure("gr_it", 1)]

    collector = PlatformCollector([Part(name="it", read=read)])
    with ThreadPoolExecutor(8) as pool:
        assert {found["gr_it",] for found in pool.map(_scrape, [collector] * 8)} == {1}
    assert len(asked) == 1


def test_an_empty_state_folder_is_read_without_a_fault_and_nothing_is_made_in_it(tmp_path):
    found = _scrape(PlatformCollector(platform_figures.parts(tmp_path)))
    parts = {name[1] for name in found if name[0] == "gr_platform_up"}
    assert parts == {"judgement", "data", "inbox", "server", "disk", "alerts", "registry"}
    assert all(found["gr_platform_up", part] == 1 for part in parts)
    assert found["gr_server_up",] == found["gr_server_expected",] == 0
    assert found["gr_disk_size_bytes",] >= found["gr_disk_free_bytes",] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def home(tmp_path):
    """A state folder of one data set, without anything in it yet."""
    storage.write_text(tmp_path / "landing" / "shop" / "dataset.toml", "")
    return tmp_path


def _result(folder, facts, spec=None):
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_manifest(folder, kind="made", spec=spec or {}, facts=facts)


def test_the_last_judgement_is_told_gate_by_gate(home):
    runs = home / "runs" / "shop"
    gates = [
        {"gate": "quality", "ok": False, "value": -0.02, "bound": 0.0, "why": "worse"},
        {"gate": "finite", "ok": True, "value": None, "bound": None, "why": "numbers"},
    ]
    _result(runs / "judgement-1", {"gates": [], "passed": True})
    _result(runs / "judgement-2", {"gates": gates, "passed": False})
    storage.point(runs, "judgement", runs / "judgement-2")
    found = _scrape(PlatformCollector(platform_figures.parts(home)))
    assert found["gr_judgement_passed", "shop"] == 0
    assert (found["gr_gate_ok", "shop", "quality"], found["gr_gate_ok", "shop", "finite"]) == (0, 1)
    assert found["gr_gate_value", "shop", "quality"] == -0.02
    assert ("gr_gate_value", "shop", "finite") not in found
    assert (found["gr_judgements", "shop", "passed"], found["gr_judgements", "shop", "refused"]) == (1, 1)
    assert abs(found["gr_judgement_timestamp_seconds", "shop"] - time.time()) < 100


def test_a_damaged_judgement_is_one_part_that_is_down(home):
    runs = home / "runs" / "shop"
    runs.mkdir(parents=True)
    (runs / "judgement.current").write_text("judgement-gone\n")
    found = _scrape(PlatformCollector(platform_figures.parts(home)))
    assert found["gr_platform_up", "judgement"] == 0
    assert found["gr_platform_up", "data"] == 1


def test_the_newest_day_of_events_and_all_of_them_are_told(home):
    parent = home / "events" / "shop"
    days = {"2026-11-26": (100, {"bad_time": 3}, 1_795_000_000_000), "2026-11-27": (40, {}, 1_795_900_000_500)}
    for date, (kept, quarantined, last) in days.items():
        _result(parent / f"ingest_date={date}" / "x", {"rows_kept": kept, "quarantined": quarantined, "last_ts": last})
    pointer = {"schema_version": 1, "partitions": dict.fromkeys(days, "x")}
    storage.write_text(parent / "partitions.json", json.dumps(pointer))
    found = _scrape(PlatformCollector(platform_figures.parts(home)))
    assert found["gr_newest_event_timestamp_seconds", "shop"] == 1_795_900_000.5
    assert found["gr_newest_partition_timestamp_seconds", "shop"] == 1_795_737_600
    assert (found["gr_newest_partition_events", "shop"], found["gr_events", "shop"]) == (40, 140)
    assert (found["gr_newest_partition_quarantined", "shop"], found["gr_quarantined", "shop"]) == (0, 3)
    # The next day is seen at once.
    _result(parent / "ingest_date=2026-11-27" / "x", {"rows_kept": 50, "quarantined": {}, "last_ts": None})
    found = _scrape(PlatformCollector(platform_figures.parts(home)))
    assert found["gr_events", "shop"] == 150


def test_the_inbox_tells_what_waits_and_what_was_refused(home):
    inbox = home / "inbox" / "shop"
    (inbox / "refused" / "2026-11-27").mkdir(parents=True)
    for name in ("a.csv", "a.csv.reason.txt", "b.csv", "b.csv.reason.txt"):
        (inbox / "refused" / "2026-11-27" / name).write_text("x")
    (home / "inbox" / "stray.csv").write_text("x")
    found = _scrape(PlatformCollector(platform_figures.parts(home)))
    assert found["gr_inbox_refused_files", "shop"] == 2
    assert found["gr_inbox_waiting_files", "shop"] == 0
    assert found["gr_inbox_stray_files",] == 1


def test_the_model_server_is_up_only_while_somebody_looks_at_it(home):
    model = health.ModelHealth(outcome="answers", answered_at=time.time(), milliseconds=2.5)
    seen = health.Health(state="degraded", checked_at=time.time(), models={"gr_ranker": model}, num_restarts=2)
    health.write(home, seen)
    found = _scrape(PlatformCollector(platform_figures.parts(home)))
    assert (found["gr_server_up",], found["gr_server_restarts",]) == (1, 2)
    assert (found["gr_server_state", "degraded"], found["gr_server_state", "serving"]) == (1, 0)
    assert (found["gr_model_answers", "gr_ranker"], found["gr_model_canary_seconds", "gr_ranker"]) == (1, 0.0025)
    health.write(home, health.Health(state="serving", checked_at=time.time() - 60))
    found = _scrape(PlatformCollector(platform_figures.parts(home)))
    assert found["gr_server_up",] == 0
    assert ("gr_server_state", "serving") not in found


def test_alerts_are_counted_over_restarts(home, monkeypatch):
    monkeypatch.setenv("GR_ALERT_COMMAND", "false")
    alerts.send(home, "drift", f"items moved {time.time_ns()}", "")
    found = _scrape(PlatformCollector(platform_figures.parts(home)))
    assert (found["gr_alerts_total",], found["gr_alert_hook_failures_total",]) == (1, 1)
    assert abs(found["gr_alert_last_timestamp_seconds", "drift"] - time.time()) < 100

"""What happens when something is wrong: once an hour, whatever the disk and the hooks do."""

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr_platform import run_log, storage
from gr_platform.commands.observing import alerts_report
from gr_platform.lifecycle import alert_hooks, alerts


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """No hook, and nothing told yet in this process."""
    monkeypatch.delenv("GR_ALERT_COMMAND", raising=False)
    monkeypatch.delenv("GR_ALERT_URL", raising=False)
    monkeypatch.setattr(alerts, "_told", {})


def test_an_alert_is_a_line_of_the_file_and_a_warning_of_the_log(tmp_path):
    with run_log.under("run-7"):
        assert alerts.send(tmp_path, "run_failed", "retraining\nfailed", "two\nlines")
    [line] = (tmp_path / alerts.FILE).read_text().splitlines()
    assert json.loads(line) | {"at_ms": 0} == {
        "at_ms": 0,
        "kind": "run_failed",
        "subject": "retraining failed",
        "text": "two\nlines",
        "run": "run-7",
        "num_alerts": 1,
        "num_failed_hooks": 0,
    }
    logged = (tmp_path / run_log.FILE).read_text()
    assert "WARNING" in logged
    assert "run=run-7 event=alert kind=run_failed subject='retraining failed'" in logged


def test_the_same_alert_is_sent_once_an_hour_and_another_one_at_once(tmp_path, monkeypatch):
    clock = [1_800_000_000_000_000_000]
    monkeypatch.setattr(alerts.time, "time_ns", lambda: clock[0])
    assert alerts.send(tmp_path, "gates", "a challenger is worse", "0.1")
    assert not alerts.send(tmp_path, "gates", "a challenger is worse", "0.2")
    assert alerts.send(tmp_path, "gates", "another subject", "0.2")
    assert alerts.send(tmp_path, "drift", "a challenger is worse", "0.2")
    clock[0] += 3_599 * 10**9
    assert not alerts.send(tmp_path, "gates", "a challenger is worse", "0.3")
    clock[0] += 10**9
    assert alerts.send(tmp_path, "gates", "a challenger is worse", "0.4")
    assert [each.text for each in alerts.read(tmp_path)] == ["0.1", "0.2", "0.2", "0.4"]
    # A clock that was ahead silences nothing for ever.
    clock[0] -= 10 * 3_600 * 10**9
    assert alerts.send(tmp_path, "gates", "a challenger is worse", "0.5")


def test_of_many_who_see_the_same_at_once_one_sends_it(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(alert_hooks, "run", lambda alert: called.append(alert) or ())
    begin = threading.Barrier(8)

    def see(_):
        begin.wait()
        return alerts.send(tmp_path, "drift", "items moved", "")

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(see, range(8))) == [False] * 7 + [True]
    assert len(called) == 1
    assert len(alerts.read(tmp_path)) == 1


def test_a_failing_hook_fails_nobody_and_is_logged_and_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("GR_ALERT_COMMAND", "false")
    assert alerts.send(tmp_path, "disk", "the disk is full", "1 MB left")
    assert alerts.send(tmp_path, "drift", "items moved", "")
    found = alerts.read(tmp_path)
    assert [each.kind for each in found] == ["disk", alerts.HOOK, "drift", alerts.HOOK]
    assert (found[-1].num_alerts, found[-1].num_failed_hooks) == (2, 2)
    assert (
        "event=alert_hook_failed hook=command problem='the command ended with status 1'"
        in (tmp_path / run_log.FILE).read_text()
    )
    shown = list(alerts_report(tmp_path, 20))
    assert "disk  the disk is full" in shown[0]
    assert shown[1].strip() == "1 MB left"
    assert shown[2].endswith("! alert hook failed: command: the command ended with status 1")
    assert shown[-1] == "times are UTC; 2 alerts so far, 2 calls of a hook failed"


def test_a_state_folder_that_takes_no_lines_still_has_its_hooks_called_once_an_hour(tmp_path, monkeypatch, caplog):
    called = []
    monkeypatch.setattr(alert_hooks, "run", lambda alert: called.append(alert["subject"]) or ())
    broken = tmp_path / "a file"
    broken.write_text("where the state folder should be")
    with caplog.at_level(logging.INFO):
        assert alerts.send(broken, "disk", "the disk is full", "")
        assert not alerts.send(broken, "disk", "the disk is full", "")
    assert called == ["the disk is full"]
    assert "event=alert_not_kept" in caplog.text


def test_somebody_who_holds_the_file_delays_an_alert_and_stops_none(tmp_path, monkeypatch):
    monkeypatch.setattr(alerts, "_LOCK_S", 0.1)
    held, done = threading.Event(), threading.Event()

    def hold():
        with storage.exclusive(tmp_path, "alerts"):
            held.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    try:
        assert alerts.send(tmp_path, "drift", "items moved", "")
    finally:
        done.set()
        holder.join()


def test_the_file_is_bounded_and_counts_go_on_over_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(alerts, "MAX_BYTES", 2_000)
    for number in range(40):
        assert alerts.send(tmp_path, "drift", f"subject {number}", "x" * 100)
    assert sum(path.stat().st_size for path in tmp_path.glob("alerts.jsonl*")) < 5_000
    found = alerts.read(tmp_path, 3)
    assert [each.subject for each in found] == ["subject 37", "subject 38", "subject 39"]
    assert found[-1].num_alerts == 40


def test_a_line_that_was_cut_off_costs_itself_only(tmp_path):
    alerts.send(tmp_path, "drift", "before", "")
    path = tmp_path / alerts.FILE
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:30])
    assert alerts.send(tmp_path, "drift", "after", "")
    assert [each.subject for each in alerts.read(tmp_path)] == ["before", "after"]
    assert alerts.read(tmp_path)[-1].num_alerts == 2


@given(st.lists(st.text(), min_size=3, max_size=3))
def test_any_text_can_be_told(tmp_path_factory, texts):
    home = tmp_path_factory.mktemp("home")
    kind, subject, text = texts
    if kind == alerts.HOOK:
        return
    alerts._told.clear()
    assert alerts.send(home, kind, subject + "\udc80", text + "\udc80")
    [found] = alerts.read(home)
    assert "\n" not in found.subject
    assert found.text[:-1] == text[: alerts.MAX_TEXT].encode("utf-8", "replace").decode()
    list(alerts_report(home, 1))


def test_without_an_alert_the_report_says_so(tmp_path):
    assert list(alerts_report(tmp_path, 20)) == ["no alert was sent yet"]

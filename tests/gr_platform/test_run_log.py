"""Which run a line of the log belongs to: that of its own thread, never that of another run."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from gr_platform import run_log
from gr_platform.errors import UserError
from gr_platform.models.recipes import tiny
from gr_platform.training.launch import Job, launching

log = logging.getLogger("gr_platform.tests.run_log")


@pytest.fixture(autouse=True)
def _no_run(monkeypatch):
    """Neither the process nor its environment belongs to a run."""
    monkeypatch.delenv("GR_RUN_ID", raising=False)
    monkeypatch.delenv("GR_LOG_FORMAT", raising=False)
    monkeypatch.setattr(run_log, "_of_process", "")


def _lines(home):
    return (home / run_log.FILE).read_text().splitlines()


def test_a_line_carries_the_run_in_which_it_was_logged(tmp_path):
    with run_log.written(tmp_path):
        log.info("event=before")
        with run_log.under("run-1"):
            log.info("event=within")
            with run_log.under("run-2"):
                log.info("event=nested")
            log.info("event=within_again")
        log.info("event=after")
    told = [line.split("run_log ", 1)[1] for line in _lines(tmp_path)]
    assert told == [
        "event=before",
        "run=run-1 event=within",
        "run=run-2 event=nested",
        "run=run-1 event=within_again",
        "event=after",
    ]


def test_two_runs_in_threads_of_one_process_do_not_mix_ids(tmp_path):
    begin = threading.Barrier(2)

    def work(run):
        with run_log.written(tmp_path), run_log.under(run):
            begin.wait()
            for number in range(200):
                log.info("event=step by=%s number=%d", run, number)
            begin.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, ["run-a", "run-b"]))
    lines = _lines(tmp_path)
    assert len(lines) == 400
    assert all(re.search(r"run=(run-[ab]) event=step by=\1 number=\d+$", line) for line in lines)


def test_a_thread_without_a_run_lends_the_only_one_and_none_of_two():
    found = []

    def look():
        thread = threading.Thread(target=lambda: found.append(run_log.current()))
        thread.start()
        thread.join()

    with run_log.under("run-a"):
        look()
        with run_log.under("run-b"):
            look()
    look()
    assert found == ["run-a", "", ""]


def test_two_processes_of_two_runs_write_one_file_and_do_not_mix_ids(tmp_path):
    code = (
        "import logging, sys\n"
        "from pathlib import Path\n"
        "from gr_platform import run_log, settings\n"
        "with run_log.written(Path(sys.argv[1])):\n"
        "    for number in range(300):\n"
        "        logging.getLogger('x').info('event=step by=%s number=%d', settings.run_id(), number)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    started = [
        subprocess.Popen(command, env=os.environ | {"GR_RUN_ID": run, "GR_LOG_FORMAT": kind})
        for run, kind in (("run-a", "text"), ("run-b", "json"))
    ]
    assert [each.wait(120) for each in started] == [0, 0]
    lines = _lines(tmp_path)
    assert sum(bool(re.search(r" x run=run-a event=step by=run-a number=\d+$", line)) for line in lines) == 300
    read = [json.loads(line) for line in lines if line.startswith("{")]
    assert [each["number"] for each in read if each["run"] == each["by"] == "run-b"] == list(range(300))
    assert len(lines) == 600


def test_a_training_process_carries_the_run_that_started_it(tmp_path):
    job = Job(home=tmp_path, ds="nothing", recipe=tiny("retrieval"), progress=False)
    with run_log.under("run-of-training"), launching(job, 1) as started:
        status = subprocess.run(started.command, env=os.environ | started.environment, timeout=300).returncode
        assert "no sequences yet in nothing" in str(started.failed())
    assert status
    [line] = [line for line in _lines(tmp_path) if "event=failed" in line]
    assert re.search(r"INFO \S+ run=run-of-training event=failed reason=no sequences yet", line)


def test_a_command_has_an_id_of_its_own_which_is_no_run_of_dagster(monkeypatch):
    run_log.begin_command("1f2e")
    assert (run_log.current(), run_log.dagster_run()) == ("gr-1f2e", "")
    with run_log.under("8c1d"):
        assert (run_log.current(), run_log.dagster_run()) == ("8c1d", "8c1d")
    monkeypatch.setenv("GR_RUN_ID", "8c1d")
    run_log.begin_command("1f2e")
    assert run_log.current() == "8c1d"


def test_json_lines_hold_what_was_logged_as_it_was_logged(tmp_path, monkeypatch):
    monkeypatch.setenv("GR_LOG_FORMAT", "json")
    with run_log.written(tmp_path), run_log.under("run-1"):
        log.info("event=reload model=%s reason=%s number=%d share=%.2f", "gr_ranker", "a b=c\nd", 3, 0.123)
        log.info("%d%% of event=all %s", 50, "x")
        log.info("%s", {"a": 1})
        log.info("a message of %s", "others")
        try:
            raise ValueError("boom")
        except ValueError:
            log.exception("event=failed level=%s", "mine")
    first, second, third, fourth, failed = [json.loads(line) for line in _lines(tmp_path)]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "INFO",
        "logger": log.name,
        "run": "run-1",
        "event": "reload",
        "model": "gr_ranker",
        "reason": "a b=c\nd",
        "number": 3,
        "share": 0.123,
        "message": "event=reload model=gr_ranker reason=a b=c\nd number=3 share=0.12",
    }
    assert (second["event"], second["message"]) == ("all", "50% of event=all x")
    assert third["message"] == "{'a': 1}"
    assert fourth["message"] == "a message of others"
    assert (failed["event"], failed["level"]) == ("failed", "ERROR")
    assert "ValueError: boom" in failed["exception"]


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("GR_LOG_FORMAT", "xml")
    with pytest.raises(UserError, match="GR_LOG_FORMAT is 'xml'"):
        run_log.handler(tmp_path)


def test_what_was_there_before_is_there_after_and_no_line_is_written_twice(tmp_path):
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    with run_log.written(tmp_path), run_log.written(tmp_path):
        log.info("event=once")
    assert (root.handlers, root.level) == (before, level)
    log.warning("event=too_late")
    assert len(_lines(tmp_path)) == 1


def test_a_thread_that_ends_its_run_first_leaves_the_file_to_the_others(tmp_path):
    ended, go_on = threading.Event(), threading.Event()

    def first():
        with run_log.written(tmp_path):
            go_on.wait(60)
        ended.set()

    thread = threading.Thread(target=first)
    thread.start()
    with run_log.written(tmp_path):
        go_on.set()
        ended.wait(60)
        log.info("event=still_there")
    thread.join()
    assert "event=still_there" in (tmp_path / run_log.FILE).read_text()

"""The operator's hooks, with real commands and a real HTTP server: told once, in time, and never in a log."""

import ast
import json
import logging
import socket
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from gr_platform import processes, run_log
from gr_platform.lifecycle import alert_hooks, alerts

ALERT = {"kind": "drift", "subject": "items moved", "text": "0.7 is above 0.5", "at_ms": 1}
SECRET = "T00-very-secret"


class _Server(ThreadingHTTPServer):
    """Answers as told and remembers what it was sent."""

    daemon_threads = True

    def __init__(self, status=200, headers=None, behave=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.headers, self.behave = status, headers or {}, behave
        self.bodies, self.paths, self.ended = [], [], threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/services/{SECRET}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        server.paths.append(self.path)
        server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if server.behave:
            server.behave(self)
            return
        self.send_response(server.status)
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def _serving(**options):
    server = _Server(**options)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _no_hooks(monkeypatch):
    monkeypatch.delenv("GR_ALERT_COMMAND", raising=False)
    monkeypatch.delenv("GR_ALERT_URL", raising=False)
    monkeypatch.setattr(alerts, "_told", {})
    monkeypatch.setattr(alert_hooks, "_PAUSES_S", (0.05, 0.05))


def _program(tmp_path, code):
    path = tmp_path / "hook with a space.py"
    path.write_text(code)
    return f"{sys.executable} '{path}' $HOME '; touch {tmp_path}/shell'"


def test_a_command_gets_the_subject_in_the_first_line_and_the_alert_in_the_second(tmp_path):
    out = tmp_path / "out"
    code = f"import sys; open({str(out)!r}, 'w').write(repr((sys.argv[1:], sys.stdin.read())))"
    assert alert_hooks.run_command(_program(tmp_path, code), ALERT) == ""
    arguments, told = ast.literal_eval(out.read_text())
    # No shell: nothing is expanded and nothing is run.
    assert arguments == ["$HOME", f"; touch {tmp_path}/shell"]
    assert not (tmp_path / "shell").exists()
    subject, line, rest = told.split("\n")
    assert (subject, rest) == (ALERT["subject"], "")
    assert json.loads(line) == ALERT


def test_a_command_that_reads_nothing_and_ends_well_is_no_failure():
    assert alert_hooks.run_command("true", ALERT | {"text": "x" * 200_000}) == ""


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("false", "ended with status 1"),
        ("sh -c 'kill -9 $$'", "ended with status -9"),
        ("/no/such/program", "cannot be started"),
        ("/etc/passwd", "cannot be started"),
        ("   ", "cannot be started"),
        ("echo 'open", "quote that is not closed"),
    ],
)
def test_what_a_command_did_wrong_is_a_sentence(command, problem):
    assert problem in alert_hooks.run_command(command, ALERT)


def test_a_command_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(alert_hooks, "COMMAND_S", 2.0)
    pids = tmp_path / "pids"
    command = f"sh -c 'sleep 60 & echo $$ $! > {pids}; sleep 60'"
    started = time.monotonic()
    assert "took longer than 2 s" in alert_hooks.run_command(command, ALERT)
    assert time.monotonic() - started < 10
    left = [psutil.Process(pid) for pid in map(int, pids.read_text().split()) if psutil.pid_exists(pid)]
    processes.wait_gone(left, 30)
    assert not any(map(processes.is_alive, left))


def test_an_address_gets_the_alert_as_json():
    with _serving() as server:
        assert alert_hooks.post(server.url, ALERT) == ""
        assert server.bodies == [ALERT]


@pytest.mark.parametrize(
    ("status", "headers"), [(500, {}), (404, {}), (302, {"Location": "file:///etc/passwd"}), (307, {"Location": "/x"})]
)
def test_an_answer_that_is_no_success_is_a_failure_and_no_redirect_is_followed(status, headers):
    with _serving(status=status, headers=headers) as server:
        assert alert_hooks.post(server.url, ALERT) == f"answered with status {status}"
        assert len(server.paths) == 1


def test_only_a_connection_that_failed_is_tried_again():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/{SECRET}"
    assert alert_hooks.post(url, ALERT) == "could not be reached in 3 tries (ConnectionError)"
    refused = []

    def refuse_twice(handler):
        if len(refused) < 2:
            refused.append(handler)
            handler.connection.close()
        else:
            handler.send_response(204)
            handler.end_headers()

    with _serving(behave=refuse_twice) as server:
        assert alert_hooks.post(server.url, ALERT) == ""
        assert len(server.paths) == 3


def test_a_server_that_does_not_answer_is_given_up_and_not_asked_again(monkeypatch):
    monkeypatch.setattr(alert_hooks, "ANSWER_S", 0.5)
    with _serving(behave=lambda handler: handler.server.ended.wait(60)) as server:
        assert alert_hooks.post(server.url, ALERT) == "was not told (ReadTimeout)"
        assert len(server.paths) == 1


def test_a_server_that_answers_byte_by_byte_holds_nobody(monkeypatch):
    monkeypatch.setattr(alert_hooks, "POST_S", 1.0)

    def drip(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not handler.server.ended.wait(0.05):
            handler.wfile.write(b"x")
            handler.wfile.flush()

    with _serving(behave=drip) as server:
        started = time.monotonic()
        assert alert_hooks.post(server.url, ALERT) == "gave no whole answer in 1 s"
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "url", [f"file:///{SECRET}", f"{SECRET}", f"ftp://x/{SECRET}", f"http://{SECRET * 20}/", f"http://[{SECRET}/"]
)
def test_an_address_that_is_none_is_a_sentence_without_it(url):
    problem = alert_hooks.post(url, ALERT)
    assert problem
    assert SECRET not in problem


@pytest.mark.parametrize("status", [200, 500, None])
def test_the_address_is_in_no_log_no_file_and_no_report(tmp_path, monkeypatch, caplog, capfd, status):
    caplog.set_level(logging.DEBUG)
    with _serving(status=status or 200) as server:
        url = server.url
        if status is not None:
            monkeypatch.setenv("GR_ALERT_URL", url)
            assert alerts.send(tmp_path, "drift", "items moved", "")
            assert len(server.paths) == 1
    if status is None:
        monkeypatch.setenv("GR_ALERT_URL", url)
        assert alerts.send(tmp_path, "drift", "items moved", "")
        assert "could not be reached" in alerts.read(tmp_path)[-1].text
    seen = [caplog.text, *capfd.readouterr(), *(path.read_text() for path in tmp_path.rglob("*") if path.is_file())]
    assert all(SECRET not in text for text in seen)
    assert (tmp_path / run_log.FILE).is_file()


def test_both_hooks_are_called_and_the_one_that_fails_stops_the_other_from_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("GR_ALERT_COMMAND", "false")
    with _serving() as server:
        monkeypatch.setenv("GR_ALERT_URL", server.url)
        assert alerts.send(tmp_path, "drift", "items moved", "0.7")
        [told] = server.bodies
    assert told.pop("at_ms") == alerts.read(tmp_path)[0].at_ms
    assert told == {"kind": "drift", "subject": "items moved", "text": "0.7", "run": run_log.current()}

"""Fetching public data sets from a server on this machine that can do everything wrong a network can."""

import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import requests
from typer.testing import CliRunner

from gr_platform import cli
from gr_platform.commands import fetching
from gr_platform.errors import UserError
from gr_platform.events import fetch as fetching_library
from gr_platform.events import transfer
from gr_platform.events.fetch import SOURCES, File, Source, fetch

LOG = b"".join(b"user%d,item%d,5.0,1400000000\n" % (i % 97, i) for i in range(40_000))


class Server(ThreadingHTTPServer):
    """Serves `files` (path -> bytes); the other fields are what goes wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.etags, self.ranges, self.checks_version, self.lengths = True, True, True, True
        # Body bytes of each answer before the connection is cut; the last one counts for all later answers.
        self.cuts: list[int | None] = [None]
        self.statuses: list[int] = [200]
        self.content_type = "application/octet-stream"
        self.pause_s = 0.0
        self.asked: list[tuple[str, str | None]] = []
        self.body_bytes = 0
        self.tags: dict[str, str] = {}
        # What the server adds to the offset that it was asked for.
        self.shift = 0

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def tag(self, path: str) -> str:
        return self.tags.get(path) or f'"{hashlib.sha256(self.files[path]).hexdigest()[:16]}"'

    def next(self, plan: list):
        return plan.pop(0) if len(plan) > 1 else plan[0]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append((self.path, wanted))
        status = self.server.next(self.server.statuses)
        if status != 200 or self.path not in self.server.files:
            self.send_response(status if status != 200 else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body, start = self.server.files[self.path], 0
        same = self.headers.get("If-Range") == self.server.tag(self.path) or not self.server.checks_version
        if wanted and self.server.ranges and same:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) + self.server.shift
        if start > len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.end_headers()
            return
        self._send(body, start)

    def _send(self, body: bytes, start: int) -> None:
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if self.server.etags:
            self.send_header("ETag", self.server.tag(self.path))
        if self.server.lengths:
            self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Content-Type", self.server.content_type)
        self.end_headers()
        part = body[start:][: self.server.next(self.server.cuts)]
        for at in range(0, len(part), 1 << 16):
            self.wfile.write(part[at : at + (1 << 16)])
            self.server.body_bytes += len(part[at : at + (1 << 16)])
            time.sleep(self.server.pause_s)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.0)
    served = Server()
    threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


def csv_source(server, **changed):
    server.files["/ratings.csv"] = LOG
    fields = {"url": server.url("/ratings.csv"), "files": (File(name="ratings.csv", about_bytes=len(LOG)),)}
    return {"shop": Source(title="a shop", page="https://example.org/shop", terms="research", **(fields | changed))}


def zip_source(server, members=None, **changed):
    server.files["/shop.zip"] = zipped(members or {"shop/ratings.dat": LOG, "shop/README": b"read me"})
    fields = {
        "url": server.url("/shop.zip"),
        "archive_bytes": len(server.files["/shop.zip"]),
        "files": (File(name="ratings.dat", about_bytes=len(LOG), member="shop/ratings.dat"),),
    }
    return csv_source(server, **(fields | changed))


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix != ".lock")


def refusal(out, sources):
    with pytest.raises(UserError) as error:
        fetch("shop", out, sources=sources)
    return str(error.value)


def test_a_download_is_the_file_and_leaves_nothing_else(server, tmp_path):
    path = fetch("shop", tmp_path, sources=csv_source(server))
    assert path == tmp_path / "shop" / "ratings.csv"
    assert path.read_bytes() == LOG
    assert names(tmp_path) == ["shop", "shop/ratings.csv"]


def test_what_is_there_is_not_downloaded_again(server, tmp_path):
    sources = csv_source(server)
    assert fetch("shop", tmp_path, sources=sources) == fetch("shop", tmp_path, sources=sources)
    assert len(server.asked) == 1


def test_only_the_wanted_members_of_a_zip_are_unpacked(server, tmp_path):
    path = fetch("shop", tmp_path, sources=zip_source(server))
    assert path.read_bytes() == LOG
    assert names(tmp_path) == ["shop", "shop/ratings.dat"]


def test_an_answer_cut_half_way_is_gone_on_with_and_no_byte_is_served_twice(server, tmp_path):
    sources = csv_source(server)
    server.cuts = [len(LOG) // 2, 100_000, None]
    assert fetch("shop", tmp_path, sources=sources).read_bytes() == LOG
    assert [wanted for _, wanted in server.asked] == [
        None,
        f"bytes={len(LOG) // 2}-",
        f"bytes={len(LOG) // 2 + 100_000}-",
    ]
    assert server.body_bytes == len(LOG)


def test_a_later_call_goes_on_where_the_first_stopped(server, tmp_path):
    sources = csv_source(server)
    server.cuts = [300_000, 0]
    text = refusal(tmp_path, sources)
    assert "breaks off after 0.3 MB, which are kept" in text
    assert names(tmp_path) == ["shop.part", "shop.part/ratings.csv", "shop.part/ratings.csv.begun"]
    server.cuts, server.asked[:] = [None], []
    assert fetch("shop", tmp_path, sources=sources).read_bytes() == LOG
    assert server.asked == [("/ratings.csv", "bytes=300000-")]
    assert server.body_bytes == len(LOG)


@pytest.mark.parametrize("checks_version", [True, False])
def test_a_file_that_changed_on_the_server_is_not_glued_to_the_old_half(server, tmp_path, checks_version):
    sources = csv_source(server)
    server.cuts = [300_000, 0]
    refusal(tmp_path, sources)
    # The server that does not check If-Range sends the rest of the changed file as if it were the rest of the old.
    server.files["/ratings.csv"], server.checks_version, server.cuts = LOG[::-1], checks_version, [None]
    assert fetch("shop", tmp_path, sources=sources).read_bytes() == LOG[::-1]


def test_a_file_that_became_shorter_is_downloaded_afresh(server, tmp_path):
    sources = csv_source(server)
    server.cuts = [300_000, 0]
    refusal(tmp_path, sources)
    server.files["/ratings.csv"], server.checks_version, server.cuts = LOG[:1000], False, [None]
    assert fetch("shop", tmp_path, sources=sources).read_bytes() == LOG[:1000]


def test_an_answer_that_starts_elsewhere_is_not_glued(server, tmp_path):
    sources = csv_source(server)
    server.cuts = [300_000, 0]
    refusal(tmp_path, sources)
    server.shift, server.cuts = 10, [None]
    assert fetch("shop", tmp_path, sources=sources).read_bytes() == LOG


def test_the_rest_of_a_file_of_another_size_is_not_glued(server, tmp_path):
    sources = csv_source(server)
    server.cuts = [300_000, 0]
    refusal(tmp_path, sources)
    server.files["/ratings.csv"], server.etags, server.checks_version, server.cuts = (
        LOG[::-1] + b"x",
        False,
        False,
        [None],
    )
    assert fetch("shop", tmp_path, sources=sources).read_bytes() == LOG[::-1] + b"x"


def test_an_answer_without_a_length_is_measured_against_what_the_first_one_said(server, tmp_path):
    sources = csv_source(server)
    server.cuts = [300_000, 0]
    refusal(tmp_path, sources)
    server.lengths, server.cuts = False, [100_000, None]
    assert fetch("shop", tmp_path, sources=sources).read_bytes() == LOG


def test_breaking_off_is_no_failure_as_long_as_more_comes(server, tmp_path):
    sources = csv_source(server)
    server.cuts = [100_000] * (2 * transfer.MAX_BROKEN_OFF) + [None]
    assert fetch("shop", tmp_path, sources=sources).read_bytes() == LOG
    assert server.body_bytes == len(LOG)


@pytest.mark.parametrize("missing", ["ranges", "etags"])
def test_a_server_that_cannot_go_on_starts_over(server, tmp_path, missing):
    sources = csv_source(server)
    setattr(server, missing, False)
    server.cuts = [len(LOG) // 2, None]
    assert fetch("shop", tmp_path, sources=sources).read_bytes() == LOG
    assert server.body_bytes == len(LOG) // 2 + len(LOG)


def test_a_weak_etag_is_no_version_to_go_on_with(server, tmp_path):
    sources = csv_source(server)
    server.tags["/ratings.csv"] = 'W/"1"'
    server.cuts = [len(LOG) // 2, None]
    assert fetch("shop", tmp_path, sources=sources).read_bytes() == LOG
    assert [wanted for _, wanted in server.asked] == [None, None]


def test_a_server_that_always_breaks_off_at_the_same_place_is_given_up(server, tmp_path):
    sources = csv_source(server)
    server.ranges, server.cuts = False, [1000]
    assert "breaks off" in refusal(tmp_path, sources)
    assert len(server.asked) == transfer.MAX_BROKEN_OFF
    assert not (tmp_path / "shop").exists()


def test_a_busy_server_is_asked_again(server, tmp_path):
    sources = csv_source(server)
    server.statuses = [503, 500, 200]
    assert fetch("shop", tmp_path, sources=sources).read_bytes() == LOG
    assert len(server.asked) == 3


@pytest.mark.parametrize(("status", "times"), [(404, 1), (403, 1), (500, 1 + transfer.ASKED_AGAIN)])
def test_a_refusing_server_is_named_with_what_to_do_by_hand(server, tmp_path, status, times):
    sources = csv_source(server)
    server.statuses = [status]
    text = refusal(tmp_path, sources)
    assert f"127.0.0.1 answers {status}" in text
    assert "open https://example.org/shop, download ratings.csv into" in text
    assert text.endswith("shop/ratings.csv --declaration shop")
    assert "gr import" in text
    assert len(text.splitlines()) == 1
    assert len(server.asked) == times
    assert names(tmp_path) == []


def test_offline_says_what_to_do_by_hand_and_names_no_path_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.0)
    monkeypatch.setenv("GR_HOME", str(tmp_path))
    source = SOURCES["ml-1m"]
    closed = Source(
        **{name: getattr(source, name) for name in ("title", "page", "terms", "files", "archive_bytes")},
        url="http://no-such-host.invalid/ml-1m.zip",
    )
    with pytest.raises(UserError) as error:
        fetch("ml-1m", tmp_path / "downloads", sources={"ml-1m": closed})
    assert "no-such-host.invalid cannot be reached" in str(error.value)
    assert "open https://grouplens.org/datasets/movielens/1m/, download the archive" in str(error.value)
    assert "unpack ratings.dat and movies.dat and users.dat into $GR_HOME/downloads/ml-1m" in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_a_proxys_web_page_is_not_taken_for_the_file(server, tmp_path):
    sources = csv_source(server)
    server.content_type = "text/html; charset=utf-8"
    assert "a web page instead of the file" in refusal(tmp_path, sources)
    assert names(tmp_path) == []


def test_a_redirect_away_from_encryption_is_refused(tmp_path, monkeypatch):
    sources = csv_source(SimpleNamespace(files={}, url=lambda path: f"https://example.org{path}"))
    answer = SimpleNamespace(status_code=200, headers={}, url="http://example.org/ratings.csv", close=lambda: None)
    monkeypatch.setattr(requests.Session, "get", lambda *_, **__: answer)
    assert "without encryption" in refusal(tmp_path, sources)


def test_a_data_set_behind_a_login_is_taken_by_hand(tmp_path):
    with pytest.raises(UserError, match=r"without a login: open .*, unpack events.csv into .*--declaration retail"):
        fetch("retailrocket", tmp_path)
    (tmp_path / "retailrocket").mkdir()
    (tmp_path / "retailrocket" / "events.csv").write_text("timestamp,visitorid,event,itemid,transactionid\n")
    assert fetch("retailrocket", tmp_path) == tmp_path / "retailrocket" / "events.csv"


def test_a_wrong_sha256_is_refused_and_removed(server, tmp_path):
    sources = zip_source(server, sha256="0" * 64)
    found = hashlib.sha256(server.files["/shop.zip"]).hexdigest()
    assert f"its sha256 is {found}, expected {'0' * 64}" in refusal(tmp_path, sources)
    assert names(tmp_path) == []


@pytest.mark.parametrize("form", ["MD5 (shop.zip) = {}\n", "{}  shop.zip\n"])
def test_the_published_md5_is_verified(server, tmp_path, form):
    sources = zip_source(server, md5_url=server.url("/shop.zip.md5"))
    right = hashlib.md5(server.files["/shop.zip"]).hexdigest()
    server.files["/shop.zip.md5"] = form.format("0" * 32).encode()
    assert f"its MD5 is {right}, its publisher says {'0' * 32}" in refusal(tmp_path, sources)
    assert names(tmp_path) == []
    server.files["/shop.zip.md5"] = form.format(right).encode()
    assert fetch("shop", tmp_path, sources=sources).read_bytes() == LOG


def test_a_checksum_that_cannot_be_had_keeps_the_download_for_the_next_call(server, tmp_path):
    sources = zip_source(server, md5_url=server.url("/shop.zip.md5"))
    assert "answers 404" in refusal(tmp_path, sources)
    assert "shop.part/shop.zip" in names(tmp_path)
    server.files["/shop.zip.md5"] = hashlib.md5(server.files["/shop.zip"]).hexdigest().encode()
    fetch("shop", tmp_path, sources=sources)
    assert [path for path, _ in server.asked].count("/shop.zip") == 1


@pytest.mark.parametrize("member", ["../outside.txt", "/etc/outside.txt", "shop/../../outside.txt", "..\\outside.txt"])
def test_a_zip_that_leads_out_of_its_folder_is_refused(server, tmp_path, member):
    sources = zip_source(server, {"shop/ratings.dat": LOG, member: b"planted"})
    assert "leads out of its folder" in refusal(tmp_path / "out", sources)
    assert names(tmp_path) == ["out"]


def test_a_zip_bomb_is_refused_before_it_is_unpacked(server, tmp_path):
    sources = zip_source(server, {"shop/ratings.dat": bytes(3 * len(LOG))})
    assert f"{3 * len(LOG):,} bytes unpacked, expected {len(LOG):,}" in refusal(tmp_path, sources)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda body: body[:100] + bytes(50) + body[150:], "the archive is damaged"),
        (lambda body: body[:-30], "the archive is damaged"),
        (lambda _: zipped({"other": b"x"}), "the archive has no shop/ratings.dat"),
    ],
    ids=["overwritten", "cut", "another"],
)
def test_a_zip_that_fails_its_own_test_is_refused_and_removed(server, tmp_path, damage, expected):
    sources = zip_source(server)
    server.files["/shop.zip"] = damage(server.files["/shop.zip"])
    assert expected in refusal(tmp_path, sources)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("lengths", "expected"), [(True, f"it has {len(LOG):,} bytes, more than"), (False, "more than")]
)
def test_a_download_far_larger_than_the_file_is_cut_off(server, tmp_path, lengths, expected):
    sources = csv_source(server, files=(File(name="ratings.csv", about_bytes=len(LOG) // 4),))
    server.lengths = lengths
    text = refusal(tmp_path, sources)
    assert expected in text
    assert "plausible" in text
    assert names(tmp_path) == []


def test_a_disk_too_small_is_said_before_a_byte_is_written(server, tmp_path, monkeypatch):
    sources = zip_source(server)
    needed = transfer.SPARE_BYTES + len(server.files["/shop.zip"]) + len(LOG)
    usage = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    text = refusal(tmp_path, sources)
    assert f"needs {needed / 1e6:,.0f} MB more" in text
    assert "--out" in text
    assert names(tmp_path) == []
    usage.free = needed
    assert fetch("shop", tmp_path, sources=sources).read_bytes() == LOG


def test_a_killed_download_leaves_only_a_part_and_the_next_call_finishes_it(server, tmp_path):
    sources = csv_source(server)
    server.pause_s = 0.1
    code = (
        "import sys\nfrom pathlib import Path\nfrom gr_platform.events.fetch import File, Source, fetch\n"
        "source = Source(title='', page='', terms='', url=sys.argv[1], "
        f"files=(File(name='ratings.csv', about_bytes={len(LOG)}),))\n"
        "fetch('shop', Path(sys.argv[2]), sources={'shop': source})\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, server.url("/ratings.csv"), str(tmp_path)])
    half = tmp_path / "shop.part" / "ratings.csv"
    deadline = time.monotonic() + 60
    while not (half.exists() and half.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert names(tmp_path) == ["shop.part", "shop.part/ratings.csv", "shop.part/ratings.csv.begun"]
    have = half.stat().st_size
    assert 0 < have < len(LOG)
    assert half.read_bytes() == LOG[:have]
    server.pause_s, server.asked[:] = 0.0, []
    assert fetch("shop", tmp_path, sources=sources).read_bytes() == LOG
    assert server.asked == [("/ratings.csv", f"bytes={have}-")]


def test_a_folder_with_something_else_in_it_is_left_alone(server, tmp_path):
    sources = csv_source(server)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "mine.txt").write_text("mine")
    assert "shop is there but holds no ratings.csv" in refusal(tmp_path, sources)
    assert server.asked == []
    assert names(tmp_path) == ["shop", "shop/mine.txt"]


def test_every_source_says_where_it_comes_from_and_what_it_may_be_used_for():
    assert list(SOURCES) == ["ml-1m", "ml-20m", "amazon-books", "amazon-sports", "retailrocket"]
    for source in SOURCES.values():
        assert source.page.startswith("https://")
        assert "https://" in source.terms
        assert source.url.startswith("https://") or not source.url
        assert bool(source.archive_bytes) == source.url.endswith(".zip")


def test_the_command_lists_the_data_sets_and_ends_with_what_to_run_next(server, tmp_path, monkeypatch):
    listed = CliRunner().invoke(cli.app, ["fetch"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in SOURCES)
    assert "199 MB" in listed.output
    sources = csv_source(server)
    monkeypatch.setattr(fetching, "source_of", sources.get)
    monkeypatch.setattr(fetching, "fetch", lambda name, out: fetching_library.fetch(name, out, sources=sources))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["fetch", "shop", "--out", "data"])
    assert done.exit_code == 0, done.output
    # What is logged on the way, on standard error, may be there or not.
    terms, got, following = done.stdout.splitlines()
    assert terms == "shop: a shop; terms of use: research"
    assert got == f"ratings.csv: 1 MB, sha256 {hashlib.sha256(LOG).hexdigest()}"
    assert following == "next: gr import data/shop/ratings.csv --declaration shop"


def test_an_unknown_name_lists_the_data_sets_with_their_sizes(tmp_path):
    with pytest.raises(UserError, match=r"no data set 'ml-2m' to fetch; the data sets are ml-1m \(6 MB\), ml-20m"):
        fetch("ml-2m", tmp_path)

"""What was answered is written whole, off the request's path and within bounds; what is not, is counted."""

import errno
import json
import os
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gr_platform import serving_state
from serving import served_log as module
from serving.served_log import LogBounds, ServedLog
from serving.served_rows import Served, ServedBy

DAY_MS = 86_400_000
BY = ServedBy(
    item_id_type="int64",
    tasks=("like", "purchase"),
    retriever_digest="r1",
    ranker_digest="k1",
    shadow_digest="s1",
    shadow_tasks=("like",),
)


def entry(number=0, *, user="7", num_items=2, shadow=False, day=20_000, dtype=np.int64):
    rng = np.random.default_rng(number)
    return Served(
        request_id=f"r{number}",
        served_ts=day * DAY_MS + number,
        request_ts=5,
        user=user,
        items=rng.integers(0, 99, num_items).astype(dtype),
        scores=rng.random((num_items, 2)).astype(np.float32),
        latency_ms=1.5,
        shadow_scores=rng.random((num_items, 1)).astype(np.float32) if shadow else None,
    )


def log_in(folder, by=BY, hash_user=lambda user: f"hash of {user}", **bounds):
    return ServedLog(folder, by, hash_user=hash_user, bounds=LogBounds(**bounds))


def rows_in(folder):
    # As one file: pyarrow would take the name of the folder for one more column.
    return [row for part in serving_state.log_parts(folder) for row in pq.ParquetFile(part).read().to_pylist()]


def until(true, seconds=10):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_row_holds_what_was_answered_and_by_whom(tmp_path):
    log = log_in(tmp_path)
    served = [entry(1), entry(2, user=None, shadow=True), entry(3, num_items=0)]
    for one in served:
        log.record(one)
    log.close()
    rows = rows_in(tmp_path)
    assert [row["user_hash"] for row in rows] == ["hash of 7", None, "hash of 7"]
    assert [row["shadow_digest"] for row in rows] == [None, "s1", None]
    for row, one in zip(rows, served, strict=True):
        assert (row["request_id"], row["served_ts"], row["request_ts"]) == (one.request_id, one.served_ts, 5)
        assert (row["retriever_digest"], row["ranker_digest"], row["latency_ms"]) == ("r1", "k1", 1.5)
        assert row["items"] == one.items.tolist()
        assert row["scores"] == one.scores.tolist()
    assert rows[0]["shadow_scores"] is None
    assert rows[1]["shadow_scores"] == served[1].shadow_scores.tolist()
    assert log.counters == module.LogCounters(num_written=3)
    (part,) = serving_state.log_parts(tmp_path)
    assert part.parent.name == "date=2024-10-04"
    assert json.loads(pq.read_schema(part).metadata[b"tasks"]) == ["like", "purchase"]
    assert stat.S_IMODE(part.stat().st_mode) == 0o600


def test_text_ids_and_a_log_without_a_shadow(tmp_path):
    by = ServedBy(item_id_type="string", tasks=("like", "purchase"), retriever_digest="r", ranker_digest="k")
    log = log_in(tmp_path, by)
    log.record(entry(1, dtype=object, num_items=0))
    one = entry(2)
    log.record(
        Served(**{name: getattr(one, name) for name in Served.__slots__} | {"items": np.array(["a", "é"], object)})
    )
    log.close()
    assert [row["items"] for row in rows_in(tmp_path)] == [[], ["a", "é"]]
    assert [row["shadow_scores"] for row in rows_in(tmp_path)] == [None, None]


def test_a_part_ends_with_its_rows_or_its_seconds_and_never_holds_two_days(tmp_path):
    log = log_in(tmp_path, part_rows=3, part_s=0.2)
    for number in range(3):
        log.record(entry(number))
    until(lambda: log.counters.num_written == 3)
    log.record(entry(3))
    log.record(entry(4, day=20_001))
    until(lambda: log.counters.num_written == 5)
    assert [pq.read_metadata(part).num_rows for part in serving_state.log_parts(tmp_path)] == [3, 1, 1]
    log.close()


def test_more_rows_than_may_wait_are_dropped_and_counted_and_nobody_waits(tmp_path, monkeypatch):
    writing, go = threading.Event(), threading.Event()

    def slow(self, rows, of=ServedLog._write_part):
        writing.set()
        go.wait(10)
        of(self, rows)

    monkeypatch.setattr(ServedLog, "_write_part", slow)
    log = log_in(tmp_path, part_rows=10, part_s=0.0, queue_rows=30)
    log.record(entry(0))
    until(writing.is_set)
    began = time.monotonic()
    for number in range(1, 100):
        log.record(entry(number))
    assert time.monotonic() - began < 1
    assert log.counters.num_dropped == 70
    go.set()
    log.close()
    assert log.counters.num_written == len(rows_in(tmp_path)) == 30
    log.record(entry(200))
    assert log.counters.num_dropped == 71


def test_a_log_that_cannot_be_trimmed_is_written_once_all_the_same(tmp_path, monkeypatch):
    def broken(self):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(ServedLog, "_trim", broken)
    log = log_in(tmp_path, part_rows=1)
    for number in range(3):
        log.record(entry(number))
        until(lambda: log.counters.num_failed == number + 1)  # noqa: B023
    log.close()
    assert [row["request_id"] for row in rows_in(tmp_path)] == ["r0", "r1", "r2"]
    assert log.counters == module.LogCounters(num_written=3, num_failed=3)


def test_what_is_written_gives_its_room_back(tmp_path):
    log = log_in(tmp_path, part_rows=1, queue_bytes=entry(0).size_bytes + 10)
    for number in range(5):
        log.record(entry(number))
        until(lambda: log.counters.num_written == number + 1)  # noqa: B023
    log.close()
    assert log.counters.num_dropped == 0


def test_what_killed_writers_left_goes_once_it_is_old(tmp_path):
    day = tmp_path / "date=2024-10-04"
    day.mkdir()
    old, young = (day / f".writing-part-{age}.parquet" for age in ("old", "young"))
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    log_in(tmp_path).close()
    assert [path.name for path in day.iterdir()] == [young.name]


def test_a_long_request_id_counts(tmp_path):
    one = entry(0)
    fields = {name: getattr(one, name) for name in Served.__slots__} | {"request_id": "r" * 10_000}
    assert Served(**fields).size_bytes - one.size_bytes == 10_000 - len("r0")


def test_a_log_that_writes_at_once_rests_while_nothing_comes(tmp_path):
    log = log_in(tmp_path, part_s=0.0)
    looked, wait = [], log._changed.wait
    log._changed.wait = lambda timeout=None: looked.append(timeout) or wait(timeout)
    log.record(entry(0))
    until(lambda: log.counters.num_written == 1)
    time.sleep(0.05)
    assert looked[-1:] == [None]
    assert len(looked) <= 2
    log.close()


def test_the_bytes_that_wait_are_bounded_too(tmp_path):
    log = log_in(tmp_path, queue_bytes=100_000)
    for number in range(20):
        log.record(entry(number, num_items=1000))
    assert 0 < 20 - log.counters.num_dropped <= 6
    log.close()
    assert log.counters.num_written + log.counters.num_dropped == 20


def test_a_full_disk_is_counted_and_the_rows_are_written_when_there_is_room(tmp_path, monkeypatch):
    full = True

    def write(table, stream, of=pq.write_table, **options):
        stream.write(b"x" * 100)
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        stream.seek(0)
        of(table, stream, **options)

    monkeypatch.setattr(module.pq, "write_table", write)
    log = log_in(tmp_path, part_s=0.05, queue_rows=5)
    for number in range(8):
        log.record(entry(number))
    until(lambda: log.counters.num_failed >= 2)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == []
    full = False
    until(lambda: log.counters.num_written == 5)
    log.record(entry(9))
    log.close()
    assert [row["request_id"] for row in rows_in(tmp_path)] == ["r0", "r1", "r2", "r3", "r4", "r9"]
    assert log.counters.num_dropped == 3


def test_rows_that_cannot_be_written_at_the_end_are_counted_as_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(module.pq, "write_table", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    log = log_in(tmp_path)
    log.record(entry(1))
    log.close()
    assert (log.counters.num_written, log.counters.num_dropped) == (0, 1)


def test_the_oldest_parts_make_room(tmp_path):
    log = log_in(tmp_path, part_rows=1, total_bytes=40_000)
    for number in range(20):
        log.record(entry(number, num_items=300, day=20_000 + number // 5))
        until(lambda number=number: log.counters.num_written == number + 1)
    log.close()
    parts = serving_state.log_parts(tmp_path)
    assert sum(part.stat().st_size for part in parts) <= 40_000
    assert log.counters.num_deleted == 20 - len(parts) > 0
    assert [row["request_id"] for row in rows_in(tmp_path)] == [f"r{n}" for n in range(20 - len(parts), 20)]
    assert {folder.name for folder in tmp_path.glob("date=*")} == {part.parent.name for part in parts}


def test_rows_of_a_forgotten_user_that_still_wait_are_not_written(tmp_path):
    log = log_in(tmp_path)
    for number, user in enumerate(["7", "8", "7"]):
        log.record(entry(number, user=user))
    serving_state.remember_forgotten(tmp_path, "hash of 7", 20_000 * DAY_MS + 1)
    log.close()
    assert [row["request_id"] for row in rows_in(tmp_path)] == ["r1", "r2"]


def test_the_key_of_the_hashes_is_drawn_once_and_private(tmp_path):
    key = serving_state.hash_key(tmp_path)
    assert serving_state.hash_key(tmp_path) == key
    assert len(key) == 32
    path = tmp_path / serving_state.KEY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    hashes = {serving_state.user_hash(k, ds, user) for k in (key, bytes(32)) for ds in ("a", "b") for user in (1, "2")}
    assert len(hashes) == 8
    assert serving_state.user_hash(key, "a", 1) == serving_state.user_hash(key, "a", "1")
    path.write_text("zz")
    with pytest.raises(serving_state.UserError, match=r"\$GR_HOME/user-hash.key is damaged"):
        serving_state.hash_key(tmp_path)


def test_a_log_goes_on_while_the_key_cannot_be_read(tmp_path):
    failing = [OSError(errno.EIO, "no"), OSError(errno.EIO, "no")]

    def hash_user(user: str) -> str:
        if failing:
            raise failing.pop()
        return user

    log = log_in(Path(tmp_path), hash_user=hash_user, part_s=0.02)
    log.record(entry(1))
    until(lambda: log.counters.num_written == 1)
    log.close()
    assert log.counters.num_failed == 2

"""A person leaves what the model server keeps too, while it serves, and everybody else stays."""

import sqlite3
import time

import numpy as np
import pyarrow.parquet as pq
import pytest

from gr_platform import serving_state
from gr_platform.errors import UserError
from gr_platform.events.forget import forget
from gr_platform.events.landing import import_file
from serving.histories import Histories, NewEvents
from serving.served_log import LogBounds, ServedLog
from serving.served_rows import Served, ServedBy

BY = ServedBy(item_id_type="int64", tasks=("buy",), retriever_digest="r", ranker_digest="k")


@pytest.fixture
def landed(home, write_csv):
    rows = [
        {"user_id": f"person-{user}", "item_id": user + at, "action": "view", "timestamp": 1_700_000_000 + at}
        for user in range(12)
        for at in range(4)
    ]
    import_file(write_csv(rows), home=home)
    return home


def kept_of(home):
    return Histories(home, "log", user_id_type="string", item_id_type="int64")


def log_of(home):
    key = serving_state.hash_key(home)
    return ServedLog(
        serving_state.served_folder(home, "log"),
        BY,
        hash_user=lambda user: serving_state.user_hash(key, "log", user),
        bounds=LogBounds(part_rows=4),
    )


def append(kept, *users):
    items = np.arange(3)
    kept.append([NewEvents(user=user, items=items, actions=items * 0 + 1, times=items + 50) for user in users])


def record(log, *users, at_ms=0):
    for user in users:
        log.record(
            Served(
                request_id=f"of {user[-1]}" if user else "of nobody",
                served_ts=at_ms or time.time_ns() // 1_000_000,
                request_ts=1,
                user=user,
                items=np.array([1]),
                scores=np.ones((1, 1), np.float32),
                latency_ms=1.0,
            )
        )


def requests_in(home):
    parts = serving_state.log_parts(serving_state.served_folder(home, "log"))
    return [row["request_id"] for part in parts for row in pq.ParquetFile(part).read().to_pylist()]


def test_a_person_leaves_the_histories_and_the_log_while_the_server_has_both_open(landed):
    kept, log = kept_of(landed), log_of(landed)
    append(kept, "person-3", "person-4")
    everyone = ["person-3", "person-4", None, "person-3"]
    record(log, *everyone)
    record(log, "person-3", "person-5")
    deadline = time.monotonic() + 10
    while log.counters.num_written < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    done = forget(landed, "log", "person-3")
    assert (done.num_rows, done.files) == (4 + 3 + 2, ["log.csv", "the served log", "the server's histories"])
    assert len(kept.history("person-3").items) == 0
    assert len(kept.history("person-4").items) == 3
    record(log, "person-3", at_ms=time.time_ns() // 1_000_000 + 1000)
    log.close()
    # Of the rows that still waited, the forgotten person's is not written; one of a later request is.
    # Sorted: two parts that begin in the same millisecond have no order.
    assert sorted(requests_in(landed)) == ["of 3", "of 4", "of 5", "of nobody"]
    held = [path for path in landed.rglob("*") if path.is_file() and b"person-3" in path.read_bytes()]
    assert held == []


def test_one_whom_the_server_alone_knows_is_forgotten_there(landed):
    append(kept_of(landed), "stranger")
    assert forget(landed, "log", "stranger").files == ["the server's histories"]
    with pytest.raises(UserError, match="no events of user nobody"):
        forget(landed, "log", "nobody")
    again = forget(landed, "log", "stranger")
    assert (again.num_rows, again.files) == (0, [])


def test_a_store_or_part_that_cannot_be_changed_is_named(landed, monkeypatch):
    append(kept_of(landed), "person-3")
    log = log_of(landed)
    record(log, "person-3")
    log.close()
    (part,) = serving_state.log_parts(serving_state.served_folder(landed, "log"))
    whole = part.read_bytes()
    part.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"of the served log cannot be read .*; delete it") as error:
        forget(landed, "log", "person-3")
    assert str(landed) not in str(error.value)
    part.write_bytes(whole)
    monkeypatch.setattr("gr_platform.events.forget_served._WAIT_S", 0.1)
    with sqlite3.connect(serving_state.histories_file(landed, "log")) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match="the histories of log cannot be changed now"):
            forget(landed, "log", "person-3")
        other.rollback()
    forget(landed, "log", "person-3")
    assert requests_in(landed) == []

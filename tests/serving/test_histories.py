"""A user's history is one ordered list without repeats, whatever of it sequences hold and whatever came since."""

import itertools
import os
import sqlite3
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_platform import serving_state
from gr_platform import settings as platform_settings
from gr_platform.errors import UserError
from serving import histories as module
from serving import history_base
from serving.engine.requests import InvalidRequestError
from serving.histories import Histories, NewEvents, check_new_events
from serving.history_store import Bounds
from tests.serving.sequences import write_sequences

DS = "made"


@pytest.fixture(autouse=True)
def _always_look(monkeypatch):
    monkeypatch.setattr(history_base, "CHECK_S", 0.0)


def opened(home, **options):
    types = {"user_id_type": "int64", "item_id_type": "int64"} | options
    return Histories(home, DS, **types)


def events(user, rows):
    """New events from (item, mask, ms)."""
    items, actions, times = zip(*rows, strict=True) if rows else ((), (), ())
    dtype = object if items and isinstance(items[0], str) else np.int64
    return NewEvents(
        user=user, items=np.array(items, dtype), actions=np.array(actions, np.int64), times=np.array(times, np.int64)
    )


def listed(history):
    return list(zip(history.items.tolist(), history.actions.tolist(), history.times.tolist(), strict=True))


def settled(kept):
    """Ask once, so that a moved pointer is seen, and wait until the new base is open."""
    kept.history(-1)
    kept._base.wait()
    return kept


def test_an_unknown_user_has_an_empty_history(tmp_path):
    history = opened(tmp_path).history(7)
    assert (listed(history), history.offset, history.items.dtype) == ([], 0, np.int64)


def test_appended_events_follow_those_of_the_sequences_and_known_ones_do_not_count_twice(tmp_path):
    write_sequences(tmp_path, DS, {1: [(1000, 1, 10), (1001, 2, 20)], 2: [(1002, 1, 5)]})
    kept = opened(tmp_path)
    done = kept.append([events(1, [(1001, 2, 20), (1000, 1, 10), (55, 1, 30), (1000, 4, 30)])])[0]
    assert (done.num_kept, done.num_known, done.num_late, done.length) == (2, 2, 0, 4)
    assert listed(kept.history(1)) == [(1000, 1, 10), (1001, 2, 20), (55, 1, 30), (1000, 4, 30)]
    assert listed(kept.history(2)) == [(1002, 1, 5)]


def test_the_same_event_twice_is_one_and_the_masks_of_one_moment_are_united_in_its_first_place(tmp_path):
    kept = opened(tmp_path)
    kept.append([events(1, [(9, 1, 30), (6, 1, 30)])])
    for _ in range(2):
        assert kept.append([events(1, [(6, 4, 30), (7, 1, 30)])])[0].length == 3
    assert listed(kept.history(1)) == [(9, 1, 30), (6, 5, 30), (7, 1, 30)]


def test_an_event_that_arrives_late_takes_its_place_in_time(tmp_path):
    kept = opened(tmp_path)
    kept.append([events(1, [(5, 1, 30)]), events(2, [(9, 1, 1)])])
    kept.append([events(1, [(6, 1, 10)])])
    assert listed(kept.history(1)) == [(6, 1, 10), (5, 1, 30)]


def test_a_history_as_of_a_time_ends_there_and_its_offset_counts_what_came_before_the_first(tmp_path):
    base = [(1000 + at, 1, 10 * at) for at in range(6)]
    write_sequences(tmp_path, DS, {1: base})
    kept = opened(tmp_path)
    kept.append([events(1, [(1, 1, 60), (2, 1, 70)])])
    whole = [*base, (1, 1, 60), (2, 1, 70)]
    for until, limit in [(None, 3), (None, 1), (65, 3), (60, 100), (29, 2), (0, 5), (-1, 5)]:
        visible = [event for event in whole if until is None or event[2] <= until]
        history = kept.history(1, limit=limit, until=until)
        assert listed(history) == visible[-limit:]
        assert history.offset == max(0, len(visible) - limit)


def test_a_new_base_is_picked_up_while_serving_and_the_store_pruned_after_a_while(tmp_path, monkeypatch):
    write_sequences(tmp_path, DS, {1: [(1000, 1, 10)]})
    kept = opened(tmp_path)
    new = [(1001, 1, 20), (1002, 1, 30), (1003, 1, 40)]
    kept.append([events(1, new), events(2, [(1000, 1, 15)])])
    before = [listed(kept.history(user)) for user in (1, 2)]
    write_sequences(tmp_path, DS, {1: [(1000, 1, 10), *new[:2]], 2: [(1000, 1, 15)]})
    settled(kept)
    assert [listed(kept.history(user)) for user in (1, 2)] == before
    assert kept.append([events(1, [(1001, 1, 20)])])[0].length == 4
    with sqlite3.connect(serving_state.histories_file(tmp_path, DS)) as raw:
        assert raw.execute("SELECT count(*) FROM events").fetchone() == (4,)
        monkeypatch.setattr(module, "PRUNE_AFTER_S", 0.0)
        kept.append([events(3, [(1, 1, 1)])])
        kept.close()
        assert raw.execute("SELECT user_id, time_ms FROM events").fetchall() == [(1, 40), (3, 1)]
        assert raw.execute("SELECT user_id FROM users").fetchall() == [(1,), (3,)]
    assert [listed(kept.history(user)) for user in (1, 2)] == before


def test_sequences_that_cannot_be_read_leave_those_before(tmp_path, caplog):
    folder = write_sequences(tmp_path, DS, {1: [(1000, 1, 10)]})
    kept = opened(tmp_path)
    other = write_sequences(tmp_path, DS, {1: [(1000, 1, 10), (1001, 1, 11)]})
    (other / "manifest.json").write_text("{")
    os.utime(folder.parent / "sequences.current")
    assert len(settled(kept).history(1).items) == 1
    assert "event=history_base_not_opened" in caplog.text
    assert opened(tmp_path, user_id_type="string").history("1").items.tolist() == []


def test_the_bound_of_a_user_drops_the_oldest_and_keeps_the_count(tmp_path):
    write_sequences(tmp_path, DS, {1: [(1000, 1, 10), (1001, 1, 11)]})
    kept = opened(tmp_path, bounds=Bounds(events_per_user=3))
    for at in range(5):
        assert kept.append([events(1, [(at, 1, 20 + at)])])[0].length == 3 + at
    history = kept.history(1)
    assert (listed(history), history.offset) == ([(2, 1, 22), (3, 1, 23), (4, 1, 24)], 4)
    late = kept.append([events(1, [(0, 1, 20), (9, 1, 21)])])[0]
    assert (late.num_kept, late.num_late, late.length) == (0, 2, 7)
    assert kept.history(1, limit=2).offset == 5
    write_sequences(tmp_path, DS, {1: [(1000, 1, 10), (1001, 1, 11), *((1000, 1, 20 + at) for at in range(4))]})
    whole = settled(kept).history(1)
    assert (len(whole.items), whole.offset) == (7, 0)
    assert kept.append([events(1, [(5, 1, 30)])])[0].length == 8
    kept.prune()
    assert kept.append([events(1, [(6, 1, 31)])])[0].length == 9
    whole = kept.history(1)
    assert (len(whole.items), whole.offset) == (9, 0)


def test_pruning_forgets_what_was_dropped_once_the_sequences_hold_it(tmp_path):
    kept = opened(tmp_path, bounds=Bounds(events_per_user=2))
    kept.append([events(1, [(at, 1, 20 + at) for at in range(5)])])
    write_sequences(tmp_path, DS, {1: [(1000, 1, 20 + at) for at in range(4)]})
    settled(kept).prune()
    with sqlite3.connect(serving_state.histories_file(tmp_path, DS)) as raw:
        assert raw.execute("SELECT num_dropped, dropped_until FROM users").fetchall() == [(0, None)]
        assert raw.execute("SELECT time_ms FROM events").fetchall() == [(24,)]
    assert len(kept.history(1).items) == 5


def test_the_bound_of_the_file_drops_the_users_who_were_quiet_longest(tmp_path):
    kept = opened(tmp_path, bounds=Bounds(total_bytes=200_000))
    for user in range(300):
        kept.append([events(user, [(at, 1, at) for at in range(60)])])
        if user % 20 == 0:
            kept.append([events(0, [(user, 1, 100 + user)])])
    assert kept._store.size_bytes() <= 200_000
    assert len(kept.history(299).items) == 60
    assert len(kept.history(0).items) > 60
    assert len(kept.history(1).items) == 0


def test_text_ids_of_users_and_items(tmp_path):
    types = {"user_id_type": "string", "item_id_type": "string"}
    write_sequences(tmp_path, DS, {"a": [("x", 1, 1)], "\u00e9": [("y", 1, 2)], "b": []}, **types)
    kept = opened(tmp_path, **types)
    kept.append([events("\u00e9", [("new", 2, 3)])])
    assert listed(kept.history("\u00e9")) == [("y", 1, 2), ("new", 2, 3)]
    assert listed(kept.history("a")) == [("x", 1, 1)]
    assert [len(kept.history(user).items) for user in ("b", "", "z")] == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": np.array([1])}, "must be equally long, got 2, 2 and 1"),
        ({"actions": np.array([1, 8])}, r"ACTIONS\[1\] is 8, must be a bitmask of the data set's 3"),
        ({"actions": np.array([-1, 1])}, r"ACTIONS\[0\] is -1"),
        ({"times": np.array([1, 10**6 + 60_001])}, r"TIMES\[1\] is 1060001, more than 60 s ahead"),
        ({"times": np.array([-(1 << 62), 1])}, r"TIMES\[0\] is .* no time"),
        ({"items": np.zeros(10_001, np.int64)}, "ITEMS holds 10001 entries, at most 10000"),
    ],
)
def test_events_that_may_not_be_appended_are_named(change, message):
    with pytest.raises(InvalidRequestError, match=message):
        check_new_events(replace(events(1, [(1, 1, 1), (2, 2, 2)]), **change), num_actions=3, now_ms=10**6)
    check_new_events(events(1, [(1, 7, 10**6 + 60_000)]), num_actions=3, now_ms=10**6)


def test_a_store_that_is_damaged_or_of_another_release_is_named_and_one_of_other_ids_emptied(tmp_path):
    kept = opened(tmp_path)
    kept.append([events(1, [(1, 1, 1)])])
    kept.close()
    path = serving_state.histories_file(tmp_path, DS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(opened(tmp_path).history(1).items) == 1
    assert len(opened(tmp_path, user_id_type="string").history("1").items) == 0
    assert len(opened(tmp_path).history(1).items) == 0
    with sqlite3.connect(path) as raw:
        raw.execute("PRAGMA user_version = 9")
    with pytest.raises(UserError, match="has schema version 9, this release reads 1"):
        opened(tmp_path)
    for extra in path.parent.glob("*"):
        extra.unlink()
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match=r"\$GR_HOME/histories/made.sqlite is damaged") as error:
        opened(tmp_path)
    assert str(tmp_path) not in str(error.value)


KILLED = """
import sys, numpy as np, sqlite3
from pathlib import Path
from serving import history_store
from serving.histories import Histories, NewEvents
kept = Histories(Path(sys.argv[1]), "made", user_id_type="int64", item_id_type="int64")
one = np.arange(10, dtype=np.int64)
kept.append([NewEvents(user=1, items=one, actions=one * 0 + 1, times=one)])
print("ready", flush=True)
for start in range(10, 10**9, 10):
    kept.append([NewEvents(user=1, items=one, actions=one * 0 + 1, times=one + start)])
"""


def test_a_process_that_is_killed_leaves_whole_calls(tmp_path):
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.2)
        process.kill()
    history = opened(tmp_path).history(1)
    assert len(history.items) >= 10
    assert len(history.items) % 10 == 0
    assert history.times.tolist() == list(range(len(history.times)))


def test_threads_that_append_and_read_at_once_lose_nothing(tmp_path):
    kept = opened(tmp_path)
    other = opened(tmp_path)

    def visit(user):
        for at in range(20):
            (kept if at % 2 else other).append([events(user, [(at, 1, at)])])
            assert len(other.history(user).items) == at + 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(16)))
    assert {len(kept.history(user).items) for user in range(16)} == {20}


CODE = """
import sys
import serving.histories, serving.served_log, serving.recommending
forbidden = {"polars", "duckdb", "dagster", "mlflow", "torch", "pandas", "tritonclient", "psutil"} & set(sys.modules)
assert not forbidden, forbidden
"""


def test_what_the_servers_python_imports_is_there():
    done = subprocess.run([platform_settings.serving_python(), "-c", CODE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


Event = st.tuples(st.integers(1000, 1003), st.integers(1, 3), st.integers(0, 6))
Append = st.tuples(st.just("append"), st.integers(1, 2), st.lists(Event, min_size=1, max_size=5))
Materialise = st.tuples(st.just("materialise"), st.integers(0, 6))


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.one_of(Append, Append, Materialise, st.tuples(st.just("prune"))), min_size=3, max_size=10))
def test_whatever_is_appended_materialised_and_pruned_a_history_is_that_of_one_list(tmp_path_factory, steps):
    home = tmp_path_factory.mktemp("state")
    kept = opened(home)
    whole = {1: [], 2: []}
    base_last = {1: -1, 2: -1}
    for step in steps:
        if step[0] == "append":
            user, rows = step[1], step[2]
            for item, mask, ms in rows:
                if ms <= base_last[user]:
                    continue
                same = next((e for e in whole[user] if (e[0], e[2]) == (item, ms)), None)
                if same:
                    same[1] |= mask
                else:
                    whole[user].append([item, mask, ms])
                    whole[user].sort(key=lambda e: e[2])
            assert kept.append([events(user, rows)])[0].length == len(whole[user])
        elif step[0] == "materialise":
            landed = {user: [tuple(e) for e in rows if e[2] <= step[1]] for user, rows in whole.items()}
            # What sequences held once they hold again.
            if any(len(landed[u]) < sum(e[2] <= base_last[u] for e in whole[u]) for u in whole):
                continue
            write_sequences(home, DS, landed)
            settled(kept)
            base_last = {u: max((e[2] for e in rows), default=-1) for u, rows in landed.items()}
        else:
            kept.prune()
        for (user, rows), limit, until in itertools.product(whole.items(), (1, 3, 50), (None, 0, 3)):
            visible = [tuple(e) for e in rows if until is None or e[2] <= until]
            history = kept.history(user, limit=limit, until=until)
            assert listed(history) == visible[-limit:]
            assert history.offset == max(0, len(visible) - limit)
    kept.close()

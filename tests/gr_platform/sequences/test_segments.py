"""Days that come in one by one give what a replay of all of them gives: late, twice, out of order, killed half-way."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_platform import storage
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file
from gr_platform.sequences import sequentialize as module
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.sequentialize import sequentialize
from gr_platform.sequences.splits import check_no_leak
from gr_platform.sequences.vocabulary import build_vocabulary

from .conftest import START_MS, Row, crowd
from .test_sequentialize import content, history

DAY = 86_400_000
DECLARED = """
name = "log"
actions = ["view", "buy"]
positives = ["view", "buy"]
time_unit = "ms"
context = ["device"]
[columns]
user_id = "user_id"
item_id = "item_id"
action = "action"
event_ts = "event_ts"
"""


def names(home: Path) -> list[str]:
    """Return the segments of the current sequences."""
    made = storage.current(home / "sequences" / "log", "sequences")
    return list(storage.read_manifest(made).facts["segments"])


def sequences(home: Path) -> SequenceDataset:
    build_vocabulary(home, "log")
    return SequenceDataset.open(sequentialize(home, "log").folder)


def conserved(home: Path) -> None:
    """Assert for every partition that no row came in that is not accounted for, counting the files' own rows."""
    for each in ingest(home, "log").partitions:
        facts = each.manifest.facts
        kept = sum(pq.read_metadata(file).num_rows for file in each.folder.glob("events-*.parquet"))
        broken = pq.read_metadata(each.folder / "quarantine-0.parquet").num_rows
        assert facts["rows_in"] == kept + broken + facts["duplicates"]
        assert (facts["rows_kept"], sum(facts["quarantined"].values())) == (kept, broken)


@pytest.fixture
def days(make: Callable[..., SequenceDataset]) -> Callable[[list[Row], int], SequenceDataset]:
    """Return days(rows, number): the sequences after a day more, its file and ingest date named by its number."""
    return lambda rows, number: make(rows, f"day{number}", ingest_date=f"2026-01-{number + 1:02d}")


def test_a_day_more_appends_a_segment_and_leaves_the_base_as_it_is(home, days):
    days([*crowd(), *((1, 500, "view", at) for at in range(100))], 0)
    first = names(home)
    before = (home / "sequences" / "log" / first[0] / "sequences.arrow").stat()
    dataset = days([(90, 999, "view", 200), (1, 500, "buy", 200), (7, 501, "view", 200)], 1)
    assert names(home)[:1] == first
    assert len(names(home)) == 2
    assert (home / "sequences" / "log" / first[0] / "sequences.arrow").stat().st_mtime_ns == before.st_mtime_ns
    assert history(dataset, 90)[-1] == (999, 1, 200)
    assert history(dataset, 7) == [(501, 1, 200)]
    assert history(dataset, 1)[-2:] == [(500, 1, 99), (500, 2, 200)]
    assert dataset.num_users == 12
    assert dataset.user_ids.tolist() == sorted(dataset.user_ids.tolist())


def test_a_late_event_comes_to_its_place_and_its_ingest_date(home, days):
    others = [(user, 500, "view", at) for user in range(200, 300) for at in range(4)]
    days([*crowd(), *others, *((1, 500 + at % 3, "view", 10 * at) for at in range(40))], 0)
    dataset = days([(1, 503, "view", 55), (90, 504, "view", 5_000), (1, 501, "buy", 10)], 1)
    assert len(names(home)) == 2
    mine = history(dataset, 1)
    assert [at for _, _, at in mine] == sorted([*range(0, 400, 10), 55])
    assert mine[1] == (501, 3, 10)  # the late purchase joins the exposure that was there
    assert mine[6] == (503, 1, 55)
    late = ingest(home, "log").partitions[1]
    assert (late.ingest_date, late.manifest.facts["num_late"], late.manifest.facts["rows_kept"]) == ("2026-01-02", 2, 3)
    assert check_no_leak(dataset) == []


def test_segments_are_compacted_to_what_one_build_gives(home, days, tmp_path):
    all_days = [[*crowd(100 * n), (n, 500 + n, "view", 100 * n), (1, 500, "buy", 7)] for n in range(5)]
    sizes = []
    for number, rows in enumerate(all_days):
        dataset = days(rows, number)
        sizes.append(len(names(home)))
    assert 1 in sizes[1:]
    assert all(size <= 3 for size in sizes)
    shutil.copytree(home / "landing", tmp_path / "replay" / "landing")
    ingest(tmp_path / "replay", "log")
    replayed = sequences(tmp_path / "replay")
    assert content(replayed) == content(dataset)
    assert replayed.digest == dataset.digest


events = st.tuples(
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from(["view", "buy"]),
    st.integers(0, 12),
    st.sampled_from([None, "", "app", "web", "tv"]),
)


@settings(max_examples=12, deadline=None)
@given(
    all_days=st.lists(st.lists(events, min_size=1, max_size=12), min_size=2, max_size=4),
    dates=st.permutations([3, 4, 5, 3]),
    compact=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_incremental_equals_replay(tmp_path_factory, all_days, dates, compact):
    """Random days with ties, repeats of other days under another context, late events and dates that run backwards."""
    folder = tmp_path_factory.mktemp("days")
    (folder / "log.toml").write_text(DECLARED)
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "COMPACT_SHARE", compact)
        for incremental in (True, False):
            home, different = folder / f"incremental-{incremental}", set()
            for number, day in enumerate(all_days):
                fixed = [*crowd(3 * number), (1, 1, "view", 0), (1, 1, "buy", 0)]
                rows = [*((*row, f"day {number}") for row in fixed), *day]
                different |= {row[:4] for row in rows}
                users, items, actions, times, devices = (list(column) for column in zip(*rows, strict=True))
                table = {"user_id": users, "item_id": items, "action": actions, "device": devices}
                pq.write_table(pa.table(table | {"event_ts": [START_MS + at for at in times]}), folder / "day.parquet")
                # The same rows may come as the same file: the ledger knows it, and its date moves.
                import_file(
                    folder / "day.parquet",
                    home=home,
                    declaration=str(folder / "log.toml"),
                    ingest_date=f"2026-01-0{dates[number]}",
                )
                if incremental:
                    ingest(home, "log")
                    sequences(home)
            result = ingest(home, "log")
            conserved(home)
            dataset = sequences(home)
            # Said again without our code: what counts is what differs.
            assert result.rows_kept == len(different)
            assert dataset.num_exposures == len({(user, item, at) for user, item, _, at in different})
            made.append((content(dataset), result.digest, result.rows_kept, result.duplicates))
    assert made[0] == made[1]


@pytest.mark.parametrize("backwards", [False, True])
def test_a_repeat_at_the_edge_of_two_dates_counts_once(home, make, backwards):
    """The one time that two dates share is the last of one and the first of the other."""
    parts = [[*crowd(-1000), (1, 500, "view", 0), (1, 501, "view", 10)], [(1, 501, "view", 10), (2, 502, "view", 20)]]
    for number, rows in enumerate(reversed(parts) if backwards else parts):
        rows = [*rows, *((user, 9, "view", 15 + user) for user in range(20, 31))] if len(rows) < 10 else rows
        dataset = make(rows, f"part{number}", ingest_date=f"2026-01-0{number + 1}")
    assert history(dataset, 1) == [(500, 1, 0), (501, 1, 10)]
    result = ingest(home, "log")
    assert (result.rows_kept, result.duplicates) == (40 + 3 + 11, 1)


def test_a_repeat_between_two_files_of_one_date_and_another_date_is_kept_once(home, make):
    """The file in between was landed second: its row counts, and the one of the third file does not."""
    make([*crowd(), (1, 500, "view", 5)], "first", ingest_date="2026-01-05")
    make([*crowd(1000), (2, 501, "view", 1005)], "second", ingest_date="2026-01-01")
    dataset = make([*crowd(2000), (2, 501, "view", 1005)], "third", ingest_date="2026-01-05")
    assert history(dataset, 2) == [(501, 1, 1005)]
    result = ingest(home, "log")
    assert (result.rows_kept, result.duplicates) == (3 * 40 + 2, 1)
    assert [p.manifest.facts["duplicates"] for p in result.partitions] == [0, 1]


def test_a_day_that_begins_at_the_last_time_of_the_day_before_joins_its_exposures(home, days):
    days([*crowd(), *((user, 500, "view", at) for user in range(200, 300) for at in range(4))], 0)
    dataset = days([(200, 500, "buy", 3), (200, 501, "view", 3), (201, 500, "view", 4)], 1)
    assert len(names(home)) == 2
    assert history(dataset, 200)[-2:] == [(500, 3, 3), (501, 1, 3)]
    assert history(dataset, 201)[-2:] == [(500, 1, 3), (500, 1, 4)]


def test_a_date_that_only_repeats_is_an_empty_partition(home, days):
    first = days(crowd(), 0)
    again = days(list(reversed(crowd())), 1)
    partitions = ingest(home, "log").partitions
    assert [(p.manifest.facts["rows_kept"], p.manifest.facts["duplicates"]) for p in partitions] == [(40, 0), (0, 40)]
    assert content(again) == content(first)
    conserved(home)
    assert history(days([(90, 600, "view", 900)], 2), 90)[-1] == (600, 1, 900)


def test_the_same_file_twice_or_renamed_counts_once(home, days, tmp_path):
    rows = [*crowd(), (1, 500, "view", 5)]
    first = days(rows, 0)
    (tmp_path / "day0.parquet").rename(tmp_path / "renamed.parquet")
    for _ in range(2):
        import_file(tmp_path / "renamed.parquet", home=home, dataset="log")
        assert ingest(home, "log").reused
        assert sequences(home).digest == first.digest


STAGES = """
import sys
from pathlib import Path
from gr_platform.events.ingest import ingest
from gr_platform.sequences.vocabulary import build_vocabulary
from gr_platform.sequences.sequentialize import sequentialize
home, kill_at = Path(sys.argv[1]), int(sys.argv[2])
import os, signal, builtins
from gr_platform import storage
calls = 0
def counted(function):
    def run(*arguments, **named):
        global calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        done = function(*arguments, **named)
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    return run
# Every step by which something becomes visible or goes away, before and after it.
os.rename, os.replace = counted(os.rename), counted(os.replace)
import shutil
shutil.rmtree = counted(shutil.rmtree)
import pyarrow.parquet as pq
pq.write_table = counted(pq.write_table)
storage.write_manifest = counted(storage.write_manifest)
ingest(home, "log"); build_vocabulary(home, "log"); sequentialize(home, "log")
print(calls)
"""


def _stages(home: Path, kill_at: int) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", STAGES, str(home), str(kill_at)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_killed_at_any_step_the_last_good_state_is_readable_and_a_rerun_finishes(home, days, land, tmp_path):
    days([*crowd(), *((1, 500 + at % 3, "view", 10 * at) for at in range(40))], 0)
    old = content(SequenceDataset.current(home, "log"))
    old_digest = ingest(home, "log").digest
    rows = {"user_id": [1, 7, 7], "item_id": [600, 500, 500], "action": ["view"] * 3}
    pq.write_table(pa.table(rows | {"event_ts": [START_MS + at for at in (15, 900, 900)]}), tmp_path / "more.parquet")
    import_file(tmp_path / "more.parquet", home=home, dataset="log", ingest_date="2026-01-01")
    done = shutil.copytree(home, tmp_path / "done")
    finished = _stages(done, 0)
    assert finished.returncode == 0, finished.stderr
    num_steps = int(finished.stdout)
    expected = content(SequenceDataset.current(done, "log"))
    assert expected != old
    assert num_steps > 20
    for kill_at in range(1, num_steps + 1, max(1, num_steps // 6)):
        killed = shutil.copytree(home, tmp_path / f"killed{kill_at}")
        assert _stages(killed, kill_at).returncode == -signal.SIGKILL
        assert content(SequenceDataset.current(killed, "log")) in (old, expected)
        assert _partitions_are_whole(killed)
        ingest(killed, "log")
        assert content(sequences(killed)) == expected
        assert not list((killed / "events" / "log").glob(".building-*"))
        assert ingest(killed, "log").digest != old_digest


def _partitions_are_whole(home: Path) -> bool:
    from gr_platform.events.partitions import partition_folders

    folders = partition_folders(home, "log").values()
    return all(storage.read_manifest(folder, verify=True) for folder in folders) and len(folders) == 1

import datetime
import os
import shutil
import time
from types import SimpleNamespace

import duckdb
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gr_platform.errors import UserError, sentence_for
from gr_platform.events import cleaning
from gr_platform.events.ingest import clean_events, ingest
from gr_platform.events.landing import import_file
from gr_platform.events.quality import RULES, describe

FAR = 4_102_444_800  # 2100-01-01


def quarantine(home, ds):
    paths = sorted((home / "events" / ds).glob("ingest_date=*/*/quarantine-*.parquet"))
    return [row for path in paths for row in pq.ParquetFile(path).read().to_pylist()]


def test_each_rule_catches_its_row_and_names_file_and_row(home, rows, write_csv):
    good = [r | {"value": 1.5} for r in rows]
    broken = {
        "null_user": {"user_id": None},
        "null_item": {"item_id": None},
        "null_time": {"timestamp": None},
        "invalid_time": {"timestamp": "noon"},
        "time_before_1990": {"timestamp": 5},
        "time_in_future": {"timestamp": FAR},
        "nan_value": {"value": "NaN"},
        "invalid_value": {"value": "much"},
        "null_action": {"action": None},
    }
    bad = [good[0] | change for change in broken.values()]
    import_file(write_csv(good + bad), home=home)
    toml = home / "landing" / "log" / "dataset.toml"
    toml.write_text(toml.read_text().replace('"buy"', '"bought"').replace("buy", "bought"))
    result = ingest(home, "log")
    num_buys = sum(r["action"] == "buy" for r in rows)
    assert result.quarantined == dict.fromkeys(broken, 1) | {"unknown_action": num_buys}
    assert set(result.quarantined) | {"invalid_user", "invalid_item"} == set(RULES)
    assert (result.rows_in, result.rows_kept, result.duplicates) == (len(good + bad), len(rows) - num_buys, 0)
    found = quarantine(home, "log")
    ours = [(row["rule"], row["source_row"]) for row in found if row["rule"] != "unknown_action"]
    assert ours == [(rule, len(good) + 1 + i) for i, rule in enumerate(broken)]
    assert {row["source_file"] for row in found} == {"log.csv"}
    assert next(row for row in found if row["rule"] == "invalid_time")["event_ts"] == "noon"
    assert f"null_user 1 ({RULES['null_user'][1]})" in describe(result.quarantined)


def test_infinite_values_and_missing_integer_ids_are_quarantined(home, rows, write_csv):
    bad = [
        rows[0] | {"value": "inf"},
        rows[0] | {"value": 1, "user_id": "NaN"},
        rows[0] | {"value": 1, "item_id": "NULL"},
    ]
    landed = import_file(write_csv([r | {"value": 1} for r in rows] + bad), home=home)
    assert (landed.declaration.user_id_type, landed.declaration.item_id_type) == ("int64", "int64")
    assert ingest(home, "log").quarantined == {"invalid_value": 1, "null_user": 1, "null_item": 1}


def test_events_are_sorted_by_user_time_and_source_order(home, rows, write_csv):
    import_file(write_csv([r | {"timestamp": r["timestamp"] // 2 * 2} for r in reversed(rows)]), home=home)
    result = ingest(home, "log")
    events = pq.ParquetFile(result.partitions[0].folder / "events-000.parquet").read().to_pylist()
    keys = [(e["user_id"], e["event_ts"], e["source_file"], e["source_row"]) for e in events]
    assert keys == sorted(keys)
    assert len(keys) == len(rows)


def test_exact_duplicates_go_and_near_ones_stay(home, rows, write_csv):
    near = [rows[0] | {"timestamp": rows[0]["timestamp"] + 1}, rows[1] | {"action": "buy"}]
    import_file(write_csv(rows + rows[:5] + near), home=home)
    result = ingest(home, "log")
    assert (result.duplicates, result.rows_kept) == (5, len(rows) + 2)


def test_the_event_id_decides_what_a_duplicate_is(home, rows, write_csv):
    with_ids = [r | {"event_id": f"e{i}"} for i, r in enumerate(rows)]
    same_id = [with_ids[0] | {"action": "buy"}]
    other_id = [with_ids[1] | {"event_id": "new"}]
    without_id = [rows[2] | {"event_id": None}] * 3
    import_file(write_csv(with_ids + same_id + other_id + without_id), home=home)
    result = ingest(home, "log")
    assert result.duplicates == 3
    kept = clean_events(home, "log").query("SELECT action FROM events WHERE event_id = 'e0'").to_pylist()
    assert kept == [{"action": with_ids[0]["action"]}]


def test_a_second_run_rewrites_nothing_and_a_fresh_one_gives_the_same_digest(home, tmp_path, rows, write_csv):
    path = write_csv(rows)
    import_file(path, home=home, ingest_date="2026-01-01")
    first = ingest(home, "log")
    files = {p: p.stat().st_mtime_ns for p in first.partitions[0].folder.iterdir()}
    second = ingest(home, "log")
    assert (first.reused, second.reused) == (False, True)
    assert first.digest == second.digest
    assert {p: p.stat().st_mtime_ns for p in first.partitions[0].folder.iterdir()} == files
    import_file(path, home=tmp_path / "elsewhere", ingest_date="2026-02-02")
    assert ingest(tmp_path / "elsewhere", "log").digest == first.digest


def test_a_new_day_leaves_older_partitions_alone(home, rows, write_csv):
    import_file(write_csv(rows), home=home, ingest_date="2026-01-01")
    first = ingest(home, "log")
    later = [r | {"timestamp": r["timestamp"] + 1000, "action": "share"} for r in rows]
    import_file(write_csv(later, "later.csv"), home=home, dataset="log", ingest_date="2026-01-02")
    second = ingest(home, "log")
    assert [p.reused for p in second.partitions] == [True, False]
    assert second.partitions[0].manifest == first.partitions[0].manifest
    assert second.digest != first.digest
    assert second.rows_kept == 2 * len(rows)


def test_the_same_rows_landed_on_two_days_count_once_in_what_later_stages_read(home, rows, write_csv):
    import_file(write_csv(rows), home=home, ingest_date="2026-01-01")
    more = [*rows, rows[0] | {"timestamp": rows[0]["timestamp"] + 7}]
    import_file(write_csv(more, "again.csv"), home=home, dataset="log", ingest_date="2026-01-02")
    assert ingest(home, "log").rows_kept == len(more)
    seen = clean_events(home, "log").query("SELECT source_file, count(*) AS n FROM events GROUP BY 1 ORDER BY 1")
    assert seen["n"].to_pylist() == [len(rows), 1]


def test_what_a_killed_run_left_days_ago_is_swept(home, rows, write_csv):
    old = time.time() - 3 * 86_400
    import_file(write_csv(rows), home=home)
    left = [home / ".spill-x", home / ".landing-x", home / "events" / "log" / ".building-x"]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "part").write_text("half")
        os.utime(folder, (old, old))
    (home / ".spill-new").mkdir()
    ingest(home, "log")
    assert not any(folder.exists() for folder in left)
    assert (home / ".spill-new").exists()


def test_two_files_of_one_day_share_a_partition_and_their_duplicates(home, rows, write_csv):
    import_file(write_csv(rows), home=home, ingest_date="2026-01-01")
    import_file(write_csv(rows[:20], "again.csv"), home=home, dataset="log", ingest_date="2026-01-01")
    result = ingest(home, "log")
    assert len(result.partitions) == 1
    assert (result.rows_kept, result.duplicates) == (len(rows), 20)
    assert clean_events(home, "log").query("SELECT DISTINCT source_file FROM events").to_pylist() == [
        {"source_file": 0}
    ]


def test_moving_a_file_to_another_day_removes_its_old_partition(home, rows, write_csv):
    path = write_csv(rows)
    import_file(path, home=home, ingest_date="2026-01-01")
    before = ingest(home, "log")
    import_file(path, home=home, ingest_date="2026-01-05")
    after = ingest(home, "log")
    assert [p.ingest_date for p in after.partitions] == ["2026-01-05"]
    assert len(list((home / "events" / "log").glob("ingest_date=*"))) == 1
    assert after.digest == before.digest


def test_a_damaged_partition_is_made_again(home, rows, write_csv):
    import_file(write_csv(rows), home=home)
    first = ingest(home, "log")
    (first.partitions[0].folder / "events-000.parquet").write_bytes(b"PAR1")
    second = ingest(home, "log")
    assert (second.reused, second.digest) == (False, first.digest)
    shutil.rmtree(first.partitions[0].folder)
    assert ingest(home, "log").digest == first.digest


def test_a_file_of_which_nothing_is_usable_is_refused_and_the_last_state_stays(home, rows, write_csv):
    import_file(write_csv(rows), home=home, ingest_date="2026-01-01")
    first = ingest(home, "log")
    bad = [r | {"item_id": None} for r in rows[:-1]] + [rows[-1] | {"timestamp": None}]
    import_file(write_csv(bad, "bad.csv"), home=home, dataset="log", ingest_date="2026-01-02")
    with pytest.raises(UserError, match=rf"no usable event in bad.csv: null_item {len(rows) - 1} \(no item id\)"):
        ingest(home, "log")
    assert clean_events(home, "log").digest == first.digest
    assert not list((home / "events" / "log").glob(".building-*"))


def test_stages_asked_for_too_early_say_what_to_run(home, rows, write_csv):
    import_file(write_csv(rows), home=home)
    with pytest.raises(UserError, match="run the events stage first"):
        clean_events(home, "log")


def test_naive_times_use_the_declared_zone(home, rows, write_csv):
    import_file(write_csv([r | {"timestamp": "2026-01-02 12:00:00"} for r in rows]), home=home)
    toml = home / "landing" / "log" / "dataset.toml"
    toml.write_text(toml.read_text().replace('"UTC"', '"Asia/Tokyo"'))
    ingest(home, "log")
    found = clean_events(home, "log").query("SELECT DISTINCT event_ts FROM events").to_pylist()[0]["event_ts"]
    assert found == int(datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.UTC).timestamp() * 1000)


cells = st.one_of(st.none(), st.integers(0, 12))
times = st.one_of(st.none(), st.sampled_from(["", "x", "1700000000", "1700000001.5", "-4", "99999999999999999999"]))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.lists(st.tuples(cells, cells, st.sampled_from(["view", "buy", ""]), times), max_size=30))
def test_every_row_is_kept_quarantined_or_a_duplicate(tmp_path_factory, rows, write_csv, noise):
    names = ("user_id", "item_id", "action", "timestamp")
    home = tmp_path_factory.mktemp("home")
    everything = rows + [dict(zip(names, row, strict=True)) for row in noise]
    import_file(write_csv(everything), home=home)
    result = ingest(home, "log")
    assert result.rows_in == len(everything)
    assert result.rows_in == result.rows_kept + result.duplicates + sum(result.quarantined.values())
    assert len(quarantine(home, "log")) == sum(result.quarantined.values())


@pytest.mark.parametrize(
    "says",
    ["failed to offload\nThis limit was set by the 'max_temp_directory_size' setting", "No space left on device"],
)
def test_a_disk_that_fills_up_during_the_sort_leaves_the_last_good_state_and_a_rerun_finishes(
    home, rows, write_csv, monkeypatch, says
):
    """The texts are DuckDB's, as seen on a file system of 34 MB while 3 M rows were sorted."""
    import_file(write_csv(rows), home=home, ingest_date="2026-01-01")
    first = ingest(home, "log")
    later = [row | {"timestamp": row["timestamp"] + 100} for row in rows]
    import_file(write_csv(later, "later.csv"), home=home, dataset="log", ingest_date="2026-01-02")

    def full(stream, _):
        yield next(iter(stream))
        raise duckdb.OutOfMemoryException(says)

    monkeypatch.setattr(cleaning, "_followed", full)
    with pytest.raises(duckdb.Error) as raised:
        ingest(home, "log")
    assert "the disk of the state folder is full" in str(sentence_for(raised.value))
    assert clean_events(home, "log").digest == first.digest
    monkeypatch.undo()
    assert ingest(home, "log").rows_kept == 2 * len(rows)
    assert not list((home / "events" / "log").glob(".building-*"))


def test_too_small_a_disk_is_said_before_anything_is_written(home, rows, write_csv, monkeypatch):
    import_file(write_csv(rows), home=home)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(UserError, match=r"48 rows need about .* GB of disk to be cleaned, .* set GR_HOME to a larger"):
        ingest(home, "log")
    assert not list((home / "events" / "log").iterdir())

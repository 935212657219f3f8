import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr_platform.errors import UserError
from gr_platform.events.ingest import clean_events, ingest
from gr_platform.events.landing import active_dataset, import_file, landed_files, load_declaration, titles

SHOP = """customer,product,event,when,eventid
ann,tea,view,2026-01-02T10:00:00Z,e1
ann,tea,purchase,2026-01-02T10:05:00Z,e2
"""


def events_of(home, ds):
    ingest(home, ds)
    return clean_events(home, ds).query("SELECT * FROM events ORDER BY source_file, source_row").to_pylist()


def test_a_shop_log_with_names_of_its_own_is_understood(home, tmp_path):
    lines = [SHOP] + [
        f"user{i},\u00fcn\u00efcode {i} \u8336,view,2026-01-03T00:00:{i:02d}+02:00,x{i}\n" for i in range(10)
    ]
    path = tmp_path / "shop.csv"
    path.write_text("\ufeff" + "".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match="looks like event_ts"):
        import_file(path, home=home)
    landed = import_file(path, home=home, time_column="when")
    assert landed.dataset == active_dataset(home) == "shop"
    declaration = landed.declaration
    assert declaration.actions == ("view", "purchase")
    assert declaration.tasks == {"purchase": ("purchase",)}
    assert (declaration.user_id_type, declaration.item_id_type, declaration.exclude_seen) == (
        "string",
        "string",
        "none",
    )
    assert landed.guesses["item_id"] == "product"
    assert "event_ts" not in landed.guesses
    events = events_of(home, "shop")
    assert len(events) == 12
    assert events[0] | {"event_ts": 1_767_348_000_000} == events[0]
    assert events[2]["item_id"] == "\u00fcn\u00efcode 0 \u8336"
    assert events[2]["event_ts"] == 1_767_391_200_000
    assert load_declaration(home, "shop") == declaration
    assert titles(home, "shop") == {}


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_delimiters_quotes_and_gzip_read_alike(home, rows, write_csv, tmp_path, delimiter):
    path = write_csv(rows, "log.csv", delimiter)
    text = path.read_text().replace("view", f'"vi{delimiter}ew"')
    packed = tmp_path / "packed.csv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    landed = import_file(packed, home=home)
    assert set(landed.declaration.actions) == {f"vi{delimiter}ew", "buy"}
    assert landed.num_rows == len(rows)


def test_integers_never_go_through_a_float(home, tmp_path, rows, write_csv, write_parquet):
    big = 2**53 + 1
    lines = [{"user": big + r["user_id"], "item": 2**63 - 1 - r["item_id"], "ts": r["timestamp"]} for r in rows]
    jsonl = tmp_path / "big.jsonl"
    jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in (jsonl, write_csv(lines, "big.csv"), write_parquet(lines, "big.parquet")):
        import_file(path, home=home, dataset=path.suffix[1:])
        events = events_of(home, path.suffix[1:])
        assert [e["user_id"] for e in events] == [line["user"] for line in lines]
        assert [e["item_id"] for e in events] == [line["item"] for line in lines]


def test_ids_with_leading_zeros_or_beyond_int64_stay_text(home, rows, write_csv, write_parquet):
    path = write_csv([r | {"user_id": f"{r['user_id']:04d}", "item_id": 2**63 + r["item_id"]} for r in rows])
    declaration = import_file(path, home=home).declaration
    assert (declaration.user_id_type, declaration.item_id_type) == ("string", "string")
    assert events_of(home, "log")[1]["user_id"] == "0001"


def test_integers_that_pandas_turned_into_floats_are_integers_again(home, rows, write_parquet):
    path = write_parquet([r | {"item_id": float(r["item_id"])} for r in rows] + [rows[0] | {"item_id": float("nan")}])
    assert import_file(path, home=home).declaration.item_id_type == "int64"
    result = ingest(home, "log")
    assert result.quarantined == {"null_item": 1}


def test_the_same_file_lands_once_and_another_meaning_replaces_it(home, rows, write_csv):
    path = write_csv([r | {"other": r["item_id"] + 1} for r in rows])
    first = import_file(path, home=home, ingest_date="2026-01-01")
    again = import_file(path, home=home)
    named = import_file(path, home=home, item_column="item_id", time_unit="s")
    assert (first.reused, again.reused, named.reused) == (False, True, True)
    assert again.ingest_date == "2026-01-01"
    assert again.guesses == first.guesses
    changed = import_file(path, home=home, item_column="other")
    assert (changed.reused, changed.ingest_date) == (False, "2026-01-01")
    assert [file.entry.columns["item_id"] for file in landed_files(home, "log")] == ["other"]
    assert events_of(home, "log")[0]["item_id"] == rows[0]["item_id"] + 1


def test_a_damaged_landed_copy_is_noticed_and_mended_by_importing_again(home, rows, write_csv):
    path = write_csv(rows)
    landed = import_file(path, home=home)
    landed.path.write_bytes(b"PAR1 damaged")
    with pytest.raises(UserError, match="missing or damaged; import the file again"):
        ingest(home, "log")
    assert not import_file(path, home=home).reused
    assert ingest(home, "log").rows_kept == len(rows)


def test_a_second_file_appends_its_actions_and_may_name_columns_differently(home, rows, write_csv, write_parquet):
    first = import_file(write_csv(rows), home=home).declaration
    later = [
        {"uid": r["user_id"], "sku": r["item_id"], "event_type": "share", "ts": (r["timestamp"] + 99) * 1000}
        for r in rows
    ]
    second = import_file(write_parquet(later, "later.parquet"), home=home, dataset="log").declaration
    assert second.actions == (*first.actions, "share")
    assert second.positives == second.actions
    assert second.tasks == first.tasks
    events = events_of(home, "log")
    assert [e["source_file"] for e in events] == [0] * len(rows) + [1] * len(rows)
    assert events[-1]["event_ts"] == (rows[-1]["timestamp"] + 99) * 1000


def test_ratings_become_actions_with_a_like_task(home, rows, write_csv):
    rated = [{k: r[k] for k in ("user_id", "item_id", "timestamp")} | {"rating": 1 + i % 5} for i, r in enumerate(rows)]
    declaration = import_file(write_csv(rated), home=home).declaration
    assert declaration.actions == tuple(f"rate_{i}" for i in range(1, 6))
    assert declaration.tasks == {"like": ("rate_4", "rate_5")}
    assert events_of(home, "log")[1]["action"] == "rate_2"


def test_a_log_without_actions_is_interactions_without_tasks(home, rows, write_csv):
    plain = [{k: r[k] for k in ("user_id", "item_id", "timestamp")} for r in rows]
    declaration = import_file(write_csv(plain), home=home).declaration
    assert (declaration.actions, declaration.tasks, declaration.positives) == (("interaction",), {}, ("interaction",))


def test_movielens_in_its_three_forms_gives_the_same_events(home, tmp_path, rows):
    folder = tmp_path / "ml-mini"
    folder.mkdir()
    rated = [(r["user_id"] + 1, r["item_id"], 1 + i % 5, r["timestamp"]) for i, r in enumerate(rows)]
    (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in rated))
    (folder / "movies.dat").write_bytes(b"100::Am\xe9lie (2001)::Comedy\n101::M (1931)::Crime\n")
    (folder / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n" + "".join(f"{u},{i},{r}.0,{t}\n" for u, i, r, t in rated)
    )
    names = ["user_id", "movie_id", "rating", "timestamp"]
    pq.write_table(pa.table(dict(zip(names, zip(*rated, strict=True), strict=True))), folder / "ratings.parquet")
    digests, found = set(), []
    for suffix in ("dat", "csv", "parquet"):
        landed = import_file(folder / f"ratings.{suffix}", home=home / suffix)
        assert landed.dataset == "ml-mini"
        assert (landed.guesses["format"], landed.declaration.exclude_seen) == ("movielens", "all")
        assert landed.declaration.tasks == {"like": ("rate_4", "rate_5")}
        assert titles(home / suffix, "ml-mini") == {100: "Am\u00e9lie (2001)", 101: "M (1931)"}
        events = events_of(home / suffix, "ml-mini")
        found.append([(e["user_id"], e["item_id"], e["action"], e["event_ts"]) for e in events])
        digests.add(str(found[-1]))
    assert len(digests) == 1
    assert found[0][0] == (1, rows[0]["item_id"], "rate_1", rows[0]["timestamp"] * 1000)


def test_half_ratings_become_half_step_actions(home, tmp_path, rows):
    path = tmp_path / "ratings.csv"
    lines = [f"{r['user_id']},{r['item_id']},{0.5 + i % 10 / 2},{r['timestamp']}\n" for i, r in enumerate(rows)]
    path.write_text("userId,movieId,rating,timestamp\n" + "".join(lines))
    declaration = import_file(path, home=home, format="movielens").declaration
    assert declaration.name == "movielens"
    assert declaration.actions[:3] == ("rate_0.5", "rate_1", "rate_1.5")
    assert declaration.tasks == {"like": ("rate_4", "rate_4.5", "rate_5")}
    assert events_of(home, "movielens")[0]["action"] == "rate_0.5"


def test_parquet_times_of_every_kind_mean_the_same_instant(home, rows, write_parquet):
    kinds = [pa.timestamp("s"), pa.timestamp("ms"), pa.timestamp("us"), pa.timestamp("ns"), pa.timestamp("us", "UTC")]
    kinds += [
        pa.timestamp("ns", "UTC"),
        pa.timestamp("us", "America/New_York"),
        pa.int64(),
        pa.float64(),
        pa.string(),
        pa.uint32(),
    ]
    for number, kind in enumerate(kinds):
        table = pa.Table.from_pylist(rows)
        seconds = table["timestamp"]
        if pa.types.is_timestamp(kind):
            column = seconds.cast(pa.timestamp("s")).cast(pa.timestamp(kind.unit))
            column = column if kind.tz is None else column.cast(pa.timestamp(kind.unit, "UTC")).cast(kind)
        else:
            column = seconds.cast(kind)
        path = write_parquet(rows, "t.parquet")
        pq.write_table(table.set_column(3, "timestamp", column), path)
        import_file(path, home=home, dataset=f"kind{number}")
        assert [e["event_ts"] for e in events_of(home, f"kind{number}")] == [r["timestamp"] * 1000 for r in rows], kind


def test_a_time_with_a_zone_is_not_moved_by_the_declared_one(home, rows, write_parquet):
    path = write_parquet(rows, "zoned.parquet")
    table = pa.Table.from_pylist(rows)
    zoned = table["timestamp"].cast(pa.timestamp("s")).cast(pa.timestamp("s", "UTC"))
    pq.write_table(table.set_column(3, "timestamp", zoned), path)
    import_file(path, home=home)
    toml = home / "landing" / "zoned" / "dataset.toml"
    toml.write_text(toml.read_text().replace('"UTC"', '"Asia/Tokyo"'))
    assert [e["event_ts"] for e in events_of(home, "zoned")] == [r["timestamp"] * 1000 for r in rows]


def test_a_small_file_may_follow_a_large_one(home, rows, write_csv):
    import_file(write_csv(rows), home=home)
    later = [r | {"timestamp": r["timestamp"] + 9} for r in rows[:2]]
    assert import_file(write_csv(later, "later.csv"), home=home, dataset="log").num_rows == 2


def test_json_keys_that_come_late_or_rarely_are_columns(home, rows, tmp_path):
    path = tmp_path / "sparse.jsonl"
    many = [r | {f"rare{i}": i} for i, r in enumerate(rows * 300)]
    path.write_text("\n".join(map(json.dumps, [*many, *({**r, "rating": 4} for r in rows)])))
    landed = import_file(path, home=home)
    assert landed.entry.columns["value"] == "rating"
    assert landed.num_rows == 301 * len(rows)


def test_a_column_named_like_the_row_number_is_not_taken_for_it(home, rows, write_csv):
    path = write_csv([r | {"gr_source_row": r["action"]} for r in rows])
    import_file(path, home=home, action_column="gr_source_row")
    assert [e["source_row"] for e in events_of(home, "log")] == list(range(1, len(rows) + 1))


def test_event_ids_that_mean_none_are_none(home, rows, write_csv):
    import_file(write_csv([r | {"event_id": "NULL"} for r in rows]), home=home)
    assert ingest(home, "log").rows_kept == len(rows)


def test_imports_at_once_wait_for_each_other(home, rows, write_csv):
    paths = [write_csv([r | {"user_id": 100 * n + r["user_id"]} for r in rows], f"{n}.csv") for n in range(4)]
    code = "import sys; from pathlib import Path; from gr_platform.events.landing import import_file as f; "
    code += "f(sys.argv[1], home=Path(sys.argv[2]), dataset='log')"
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), str(home)]) for path in paths]
    assert [process.wait(timeout=300) for process in running] == [0] * 4
    assert sorted(file.entry.sequence for file in landed_files(home, "log")) == [0, 1, 2, 3]


def test_a_catalogue_beside_the_log_gives_titles(home, rows, write_csv, tmp_path):
    (tmp_path / "log.catalogue.csv").write_text('item_id,title\n100,"Tea, green"\n101,Cup\n')
    landed = import_file(write_csv(rows), home=home)
    assert landed.guesses["catalogue"] == "log.catalogue.csv"
    assert titles(home, "log") == {100: "Tea, green", 101: "Cup"}


def test_nothing_imported_yet_says_what_to_do(home):
    with pytest.raises(UserError, match="gr import"):
        active_dataset(home)
    with pytest.raises(UserError, match="gr import"):
        landed_files(home, "log")

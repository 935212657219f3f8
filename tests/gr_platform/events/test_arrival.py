"""Files on their way in: verbatim, whole, once, whatever is killed."""
# ruff: noqa: S608 - the queries are made by `judged_query`

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events import arrival
from gr_platform.events.database import connect
from gr_platform.events.landing import active_dataset, import_file, import_folder, landed_files
from gr_platform.events.ledger import is_intact
from gr_platform.events.quality import judged_query


def events(home, landed, columns="user_id, item_id, action, event_ts, rule"):
    with connect(home) as connection:
        connection.execute("SET threads = 4")
        return connection.sql(f"SELECT {columns} FROM ({judged_query(landed)}) ORDER BY source_row").fetchall()


def test_parquet_lands_byte_for_byte_and_its_rows_keep_their_numbers(home, tmp_path):
    path = tmp_path / "many.parquet"
    table = pa.table({"user": [i % 500 for i in range(50_000)], "item": range(50_000), "ts": [1_700_000_000] * 50_000})
    pq.write_table(table, path, row_group_size=3_000)
    landed = import_file(path, home=home)
    assert landed.path.read_bytes() == path.read_bytes()
    assert landed.entry.sha256 == landed.entry.landed_sha256 == storage.file_sha256(path)
    assert events(home, landed, "item_id, source_row") == [(i, i + 1) for i in range(50_000)]


def test_text_keeps_the_numbers_of_its_rows(home, tmp_path):
    path = tmp_path / "many.csv"
    path.write_text("user,item,ts\n" + "".join(f"{i % 500},{i},1700000000\n" for i in range(300_000)))
    landed = import_file(path, home=home)
    with connect(home) as connection:
        wrong = f"SELECT count(*) FROM ({judged_query(landed)}) WHERE item_id + 1 <> source_row"
        assert connection.sql(wrong).fetchall() == [(0,)]


@pytest.mark.parametrize("suffix", [".csv.gz", ".csv.zst", ".jsonl.gz", ".jsonl.zst"])
def test_compressed_text_reads_whole_or_not_at_all(home, tmp_path, rows, suffix):
    whole = [r | {"item_id": r["item_id"] + n} for n in range(300) for r in rows]
    lines = [",".join(whole[0]), *(",".join(map(str, row.values())) for row in whole)]
    text = "\n".join(lines if ".csv" in suffix else map(json.dumps, whole)) + "\n"
    path = tmp_path / f"log{suffix}"
    with pa.output_stream(str(path), compression="gzip" if suffix.endswith(".gz") else "zstd") as stream:
        stream.write(text.encode())
    assert import_file(path, home=home).num_rows == len(whole)
    data = path.read_bytes()
    for cut in (1, 4, len(data) // 3, len(data) - 20):
        torn = tmp_path / f"torn{suffix}"
        torn.write_bytes(data[:-cut])
        with pytest.raises(UserError, match=rf"torn{suffix} cannot be read"):
            import_file(torn, home=home)


@pytest.mark.parametrize("name", ["log.csv.part", "log.parquet.tmp", "log.csv.crdownload"])
def test_a_name_of_a_half_written_file_is_refused(home, tmp_path, rows, write_csv, name):
    path = write_csv(rows, name)
    with pytest.raises(UserError, match=f"{name} is half-written"):
        import_file(path, home=home, format="csv")


def test_parquet_without_its_footer_is_half_written(home, rows, write_parquet, tmp_path):
    data = write_parquet(rows).read_bytes()
    (tmp_path / "half.parquet").write_bytes(data[:-9])
    with pytest.raises(UserError, match=r"half\.parquet cannot be read: .* half-written"):
        import_file(tmp_path / "half.parquet", home=home)


@pytest.mark.parametrize("name", ["log.csv", "log.parquet"])
def test_a_file_that_grows_while_it_is_read_is_refused(home, rows, write_csv, write_parquet, monkeypatch, name):
    path = write_csv(rows) if name.endswith(".csv") else write_parquet(rows)
    hashed, copied = storage.file_sha256, arrival._copy

    def grow(result):
        with path.open("ab") as stream:
            stream.write(b"\n")
        return result

    monkeypatch.setattr(storage, "file_sha256", lambda read: grow(hashed(read)))
    monkeypatch.setattr(arrival, "_copy", lambda read, to: grow(copied(read, to)))
    with pytest.raises(UserError, match=f"{name} changed while it was read"):
        import_file(path, home=home)
    assert not (home / "landing").exists()


def test_a_file_landed_twice_or_renamed_counts_once(home, rows, write_csv, tmp_path):
    first = import_file(write_csv(rows), home=home)
    renamed = tmp_path / "renamed.csv"
    renamed.write_bytes((tmp_path / "log.csv").read_bytes())
    again = import_file(renamed, home=home, dataset="log")
    assert again.reused
    assert again.entry == first.entry == landed_files(home, "log")[0].entry
    assert (len(landed_files(home, "log")), first.entry.state) == (1, "landed")


KILLED = """
import os, sys
from pathlib import Path
from gr_platform.events.landing import import_file
left = int(sys.argv[3])
def counted(real):
    def replace(*args, **options):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return real(*args, **options)
    return replace
os.replace, Path.replace = counted(os.replace), counted(Path.replace)
import_file(sys.argv[1], home=Path(sys.argv[2]), dataset="log", item_column="item_id")
"""


def test_an_import_killed_before_any_rename_leaves_the_last_state_and_can_be_done_again(home, rows, write_csv):
    import_file(write_csv(rows, "first.csv"), home=home, dataset="log")
    before = landed_files(home, "log")
    second = write_csv([r | {"action": "share", "item_id": r["item_id"] + 7} for r in rows], "second.csv")
    for allowed in range(20):
        ended = subprocess.run([sys.executable, "-c", KILLED, str(second), str(home), str(allowed)], timeout=120)
        landed = landed_files(home, "log")
        assert all(is_intact(file) for file in landed)
        assert [file.entry for file in landed][:1] == [file.entry for file in before]
        assert [row[:4] for row in events(home, landed[0])][:2] == [
            (0, 100, "buy", 1_700_000_000_000),
            (1, 103, "view", 1_700_000_000_000),
        ]
        if ended.returncode == 0:
            break
        assert ended.returncode == 9
    assert allowed >= 3
    assert [file.num_rows for file in landed_files(home, "log")] == [len(rows)] * 2
    assert not list(home.glob(".landing-*"))
    assert len(list((home / "landing" / "log").glob("*.parquet"))) == 2


def test_ids_that_do_not_fit_are_quarantined_where_most_do_and_refused_where_most_do_not(home, rows, write_csv):
    import_file(write_csv(rows), home=home)
    odd = [r | {"timestamp": r["timestamp"] + 9} for r in rows]
    odd[0] |= {"user_id": "x7"}
    odd[1] |= {"user_id": "007", "item_id": ""}
    odd[2] |= {"item_id": 2**63}
    odd[3] |= {"item_id": "nan"}
    landed = import_file(write_csv(odd, "odd.csv"), home=home, dataset="log")
    found = events(home, landed, "rule, raw_user, raw_item")
    assert found[:4] == [
        ("invalid_user", "x7", "100"),
        ("invalid_user", "007", None),
        ("invalid_item", "2", str(2**63)),
        ("null_item", "3", "nan"),
    ]
    assert {row[0] for row in found[4:]} == {None}
    text = write_csv([r | {"user_id": f"x{i}" if i % 3 else i} for i, r in enumerate(odd)], "text.csv")
    with pytest.raises(UserError, match="holds string ids, but user_id of this data set is int64"):
        import_file(text, home=home, dataset="log")


def test_a_column_may_change_its_type_between_days(home, rows, write_parquet):
    import_file(write_parquet(rows), home=home)
    for number, kind in enumerate((pa.float64(), pa.string(), pa.uint64(), pa.int16(), pa.decimal128(20, 0))):
        table = pa.Table.from_pylist([r | {"timestamp": r["timestamp"] + number} for r in rows])
        path = write_parquet(rows, f"day{number}.parquet")
        pq.write_table(table.set_column(1, "item_id", table["item_id"].cast(kind)), path)
        found = events(home, import_file(path, home=home, dataset="log"))
        assert [row[1] for row in found] == [r["item_id"] for r in rows], kind
        assert {row[-1] for row in found} == {None}


def test_numbers_do_not_join_a_data_set_of_text_ids(home, rows, write_parquet):
    import_file(write_parquet([r | {"item_id": f"sku{r['item_id']}"} for r in rows]), home=home)
    with pytest.raises(UserError, match="holds int64 ids, but item_id of this data set is string"):
        import_file(write_parquet(rows, "b.parquet"), home=home, dataset="log")


def test_mixed_types_in_json_are_text(home, rows, tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(r | {"user_id": f"x{i}" if i % 2 else i}) + "\n" for i, r in enumerate(rows)))
    landed = import_file(path, home=home)
    assert landed.declaration.user_id_type == "string"
    assert [row[0] for row in events(home, landed)][:3] == ["0", "x1", "2"]


CELLS = ["", "soon", "infinity", "-infinity", "nan", "1e400", "-1", "9" * 30, "294247-01-10 03:00:54", "0000-00-00"]
CELLS += [
    "290309-12-22 (BC)",
    "1700000000",
    "1700000000.5",
    "2023-11-14T22:13:20Z",
    "9999-12-31T23:59:59+14:00",
    "\x00\n",
]


@pytest.mark.parametrize("unit", ["s", "iso"])
def test_no_cell_fails_the_query(home, rows, write_parquet, unit):
    good = "1700000000" if unit == "s" else "2023-11-14T22:13:20"
    fine = [r | {"timestamp": good, "value": "1"} for r in rows]
    bad = [rows[0] | {"timestamp": cell, "value": other} for cell in CELLS for other in CELLS]
    landed = import_file(write_parquet(fine * 20 + bad), home=home)
    home_toml = home / "landing" / "log" / "dataset.toml"
    home_toml.write_text(home_toml.read_text().replace('"UTC"', '"America/New_York"'))
    landed = landed_files(home, "log")[0]
    assert landed.entry.time_unit == unit
    found = events(home, landed)
    assert len(found) == len(rows) * 20 + len(bad)
    assert {row[-1] for row in found[: len(rows)]} == {None}
    assert all(row[-1] for row, cell in zip(found[-len(bad) :], bad, strict=True) if cell["timestamp"] == "soon")


def test_a_folder_lands_as_files_of_one_data_set_in_the_order_of_their_names(home, rows, tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    for number in (2, 0, 1):
        table = pa.Table.from_pylist([r | {"timestamp": r["timestamp"] + number} for r in rows])
        pq.write_table(table, folder / f"part-{number}.parquet")
    (folder / "README.md").write_text("no log")
    (folder / ".hidden.csv").write_text("no log")
    pq.write_table(pa.table({"item_id": [1], "title": ["x"]}), folder / "part-0.catalogue.parquet")
    landed = import_folder(folder, home=home)
    assert [file.entry.source_name for file in landed] == [f"part-{number}.parquet" for number in range(3)]
    assert [file.entry.sequence for file in landed_files(home, "shop")] == [0, 1, 2]
    assert active_dataset(home) == "shop"
    assert all(file.reused for file in import_folder(folder, home=home))
    (folder / "part-3.parquet.tmp").touch()
    with pytest.raises(UserError, match=r"part-3\.parquet\.tmp in shop is half-written"):
        import_folder(folder, home=home)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none is a folder without a log"):
        import_folder(tmp_path / "none", home=home)


def test_of_a_folder_of_movielens_the_ratings_are_the_log(home, tmp_path):
    folder = tmp_path / "ml-tiny"
    folder.mkdir()
    (folder / "movies.dat").write_text("1::Film (1995)::Drama\n")
    (folder / "users.dat").write_text("1::F::1::10::48067\n")
    with pytest.raises(UserError, match=r"movies\.dat"):
        import_folder(folder, home=home)
    (folder / "ratings.dat").write_text("".join(f"{n % 12}::{n}::5::{978300760 + n}\n" for n in range(60)))
    landed = import_folder(folder, home=home)
    assert [file.entry.source_name for file in landed] == ["ratings.dat"]


def test_a_state_folder_with_wildcards_and_equals_signs_in_its_name(tmp_path, rows, write_parquet):
    home = tmp_path / "day=1 [x]*"
    landed = import_file(write_parquet(rows), home=home)
    assert [row[0] for row in events(home, landed)] == [r["user_id"] for r in rows]


def test_a_column_called_like_the_readers_row_number_is_refused(home, rows, write_csv):
    path = write_csv([r | {"file_row_number": 1} for r in rows])
    with pytest.raises(UserError, match="has a column 'file_row_number'"):
        import_file(path, home=home)


def test_a_ledger_of_another_release_is_a_named_error(home, rows, write_csv):
    import_file(write_csv(rows), home=home)
    (ledger,) = (home / "landing" / "log").glob("*.json")
    ledger.write_text(json.dumps(json.loads(ledger.read_text()) | {"schema_version": 1}))
    with pytest.raises(UserError, match="landed by another release"):
        landed_files(home, "log")


def test_invalid_utf8_is_named_with_its_line(home, rows, write_csv, tmp_path):
    good = write_csv(rows).read_bytes()
    (tmp_path / "u.csv").write_bytes(good + b"1,2,v\xff\xfe,1700000000\n")
    with pytest.raises(UserError, match=rf"Line: {len(rows) + 2}.*not utf-8"):
        import_file(tmp_path / "u.csv", home=home)
    lines = "".join(json.dumps(r) + "\n" for r in rows).encode()
    (tmp_path / "u.jsonl").write_bytes(lines + b'{"user_id": "\xff"}\n')
    with pytest.raises(UserError, match=r"in line \d+: invalid UTF-8"):
        import_file(tmp_path / "u.jsonl", home=home)

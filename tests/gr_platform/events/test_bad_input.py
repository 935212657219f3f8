"""Every bad input of the import ends in one sentence that names the file and what to do, and changes nothing."""

import gzip
import json
import time

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr_platform.errors import UserError, machine_fault
from gr_platform.events import landing
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import active_dataset, import_file, landed_files, load_declaration


def snapshot(home):
    return {p.relative_to(home).as_posix(): p.read_bytes() for p in sorted(home.rglob("*")) if p.is_file()}


def refused(home, source, **options):
    """Import a good file first, then check that the refusal leaves no trace; return the message."""
    before = snapshot(home)
    with pytest.raises(UserError) as error:
        import_file(source, home=home, **options)
    assert snapshot(home) == before
    message = str(error.value)
    assert "\n" not in message
    assert str(source.parent) not in message
    return message


@pytest.fixture
def landed(home, rows, write_csv):
    import_file(write_csv(rows, "good.csv"), home=home, dataset="good")
    return home


def test_no_such_file_folder_empty_file_and_unknown_format(landed, tmp_path):
    assert "there is no file nothing.csv" in refused(landed, tmp_path / "nothing.csv")
    (tmp_path / "folder").mkdir()
    assert "folder is a folder" in refused(landed, tmp_path / "folder")
    (tmp_path / "empty.csv").touch()
    assert "empty (0 bytes)" in refused(landed, tmp_path / "empty.csv")
    (tmp_path / "log.xlsx").write_bytes(b"PK")
    assert "the format of log.xlsx is unknown" in refused(landed, tmp_path / "log.xlsx")
    assert "unknown format 'xml'" in refused(landed, tmp_path / "log.xlsx", format="xml")


def test_an_event_id_that_most_rows_share_is_refused_unless_it_is_left_out(landed, rows, write_csv):
    path = write_csv([r | {"event_id": 1 + i % 2} for i, r in enumerate(rows)], "typed.csv")
    message = refused(landed, path)
    assert "column 'event_id' of typed.csv has 2 different values in 48 rows" in message
    assert "--event-id-column, or none" in message
    assert import_file(path, home=landed, event_id_column="none").num_rows == 48
    assert ingest(landed, "typed").rows_kept == 48


def test_metadata_that_is_no_declaration_is_refused(landed, rows, tmp_path):
    for number, text in enumerate((b"{", b"[1]", b'{"actions": 5}', b'{"actions": [5]}')):
        table = pa.Table.from_pylist(rows).replace_schema_metadata({b"gr_platform.declaration": text})
        pq.write_table(table, tmp_path / f"m{number}.parquet")
        assert "is no declaration" in refused(landed, tmp_path / f"m{number}.parquet")


def test_json_lines_with_a_byte_order_mark(landed, rows, tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_text("\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert "byte order mark" in refused(landed, path)


def test_an_unreadable_json_line_is_named_without_advice_for_programmers(landed, rows, tmp_path):
    path = tmp_path / "torn.jsonl"
    path.write_text("\n".join([*map(json.dumps, rows), '{"user_id": 1, "item']) + "\n")
    message = refused(landed, path)
    assert "torn.jsonl cannot be read" in message
    assert "Try" not in message


def test_header_without_rows(landed, tmp_path):
    (tmp_path / "h.csv").write_text("user_id,item_id,timestamp\n")
    assert "holds no events" in refused(landed, tmp_path / "h.csv")


def test_missing_columns_name_those_that_exist(landed, rows, write_csv):
    path = write_csv([{"who": r["user_id"], "what": r["item_id"], "timestamp": r["timestamp"]} for r in rows], "x.csv")
    message = refused(landed, path)
    assert "looks like user_id" in message
    assert "who, what, timestamp" in message
    assert "--user-column" in message
    assert "no column 'person'" in refused(landed, path, user_column="person")
    same = refused(landed, path, user_column="who", item_column="who")
    assert "cannot be both user_id and item_id" in same


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 1_000), ("us", 10**6), ("ns", 10**9)])
def test_a_wrong_time_unit_names_the_one_that_fits(landed, rows, write_csv, unit, factor):
    path = write_csv([r | {"timestamp": r["timestamp"] * factor} for r in rows], "x.csv")
    for wrong in {"s", "ms", "us", "ns"} - {unit}:
        assert f"unit {unit} would fit" in refused(landed, path, time_unit=wrong)
    assert import_file(path, home=landed).guesses["time_unit"] == unit


def test_times_that_no_unit_explains(landed, rows, write_csv):
    path = write_csv([r | {"timestamp": i} for i, r in enumerate(rows)], "x.csv")
    assert "no unit fits" in refused(landed, path)
    path = write_csv([r | {"timestamp": "soon"} for r in rows], "y.csv")
    assert "no readable time" in refused(landed, path)
    path = write_csv([r | {"timestamp": "2024-02-03"} for r in rows], "z.csv")
    assert "holds dates" in refused(landed, path, time_unit="ms")
    future = int(time.time()) + 40 * 86_400
    path = write_csv([r | {"timestamp": future} for r in rows], "f.csv")
    assert "no unit fits" in refused(landed, path)


def test_truncated_parquet_and_gzip(landed, rows, write_parquet, write_csv, tmp_path):
    whole = write_parquet(rows * 200).read_bytes()
    for name, data in {
        "head.parquet": whole[: len(whole) // 2],
        "magic.parquet": b"PAR1",
        "no.parquet": b"abc",
    }.items():
        (tmp_path / name).write_bytes(data)
        assert f"{name} cannot be read" in refused(landed, tmp_path / name)
    packed = gzip.compress(write_csv(rows * 200).read_bytes())
    (tmp_path / "half.csv.gz").write_bytes(packed[: len(packed) // 2])
    assert "half.csv.gz cannot be read" in refused(landed, tmp_path / "half.csv.gz")
    damaged = bytearray(whole)
    damaged[200:600] = bytes(400)
    (tmp_path / "page.parquet").write_bytes(damaged)
    assert "page.parquet" in refused(landed, tmp_path / "page.parquet")


def test_text_that_does_not_decode_or_does_not_fit_its_header(landed, rows, write_csv, tmp_path):
    good = write_csv(rows).read_bytes()
    for name, line in {
        "u.csv": b"1,\xff\xfe,view,1700000000\n",
        "few.csv": b"1,2\n",
        "many.csv": b"1,2,view,1,9\n",
    }.items():
        (tmp_path / name).write_bytes(good + line)
        assert f"{name} cannot be read" in refused(landed, tmp_path / name)
    (tmp_path / "latin.csv").write_bytes(b"us\xe9r,item,time\n" + good)
    assert "latin.csv cannot be read as UTF-8" in refused(landed, tmp_path / "latin.csv")


def test_broken_json_lines(landed, tmp_path):
    lines = "".join(f'{{"user": {u}, "item": 1, "ts": 1700000000}}\n' for u in range(20))
    for name, tail in {"cut.jsonl": '{"user": 1, "it', "list.jsonl": "[1, 2]\n"}.items():
        (tmp_path / name).write_text(lines + tail)
        assert name in refused(landed, tmp_path / name)
    (tmp_path / "array.json").write_text("[" + lines.replace("\n", ",\n") + "{}]")
    assert "array.json is not JSON lines" in refused(landed, tmp_path / "array.json")


def test_fewer_than_ten_users(landed, rows, write_csv):
    path = write_csv([r | {"user_id": r["user_id"] % 9} for r in rows], "few.csv")
    message = refused(landed, path)
    assert "9 user(s)" in message
    assert "at least 10" in message


def test_columns_that_differ_in_case_alone(landed, rows, write_csv):
    path = write_csv([r | {"USER_ID": r["user_id"]} for r in rows], "case.csv")
    assert "different column names" in refused(landed, path)


def test_a_damaged_landing_folder_says_what_to_delete_and_import_heals_it(landed, rows, write_csv):
    (ledger,) = (landed / "landing" / "good").glob("*.json")
    for text in (b"", b"[]", b"{", b"\xff", b'{"schema_version": 2}'):
        ledger.write_bytes(text)
        with pytest.raises(UserError, match=rf"{ledger.name} is damaged; delete it"):
            landed_files(landed, "good")
    ledger.unlink()
    import_file(write_csv(rows, "good.csv"), home=landed, dataset="good")
    assert len(landed_files(landed, "good")) == 1
    (landed / "landing" / "good" / "dataset.toml").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        load_declaration(landed, "good")
    for text in (b"", b"\xff\n", b"../x\n"):
        (landed / "landing" / "active").write_bytes(text)
        with pytest.raises(UserError, match="active does not name a data set"):
            active_dataset(landed)


def test_a_sequence_number_is_not_given_twice(landed, rows, write_csv):
    for name in ("b.csv", "c.csv"):
        import_file(
            write_csv([r | {"item_id": r["item_id"] + len(name) + ord(name[0])} for r in rows], name),
            home=landed,
            dataset="good",
        )
    first = landed_files(landed, "good")[0]
    (landed / "landing" / "good" / f"{first.sha256[:16]}.json").unlink()
    import_file(write_csv(rows, "good.csv"), home=landed, dataset="good")
    assert [file.entry.sequence for file in landed_files(landed, "good")] == [1, 2, 3]


def test_a_full_disk_is_not_taken_for_an_unreadable_log(landed, rows, write_csv, monkeypatch):
    def full(*_, **__):
        raise duckdb.IOException("Could not write file: No space left on device")

    monkeypatch.setattr(landing, "profile", full)
    with pytest.raises(duckdb.IOException) as error:
        import_file(write_csv([*rows, rows[0]], "x.csv"), home=landed)
    assert "disk of the state folder is full" in machine_fault(error.value)


def test_too_many_actions_and_fractional_ids(landed, rows, write_csv, write_parquet):
    path = write_csv([r | {"action": f"a{i}", "user_id": i} for i, r in enumerate(rows * 2)], "many.csv")
    assert "more than 62" in refused(landed, path)
    path = write_parquet([r | {"item_id": r["item_id"] + 0.5} for r in rows], "fraction.parquet")
    assert "not ids" in refused(landed, path)
    nested = pa.Table.from_pylist([r | {"item_id": [r["item_id"]]} for r in rows])
    pq.write_table(nested, path)
    assert "cannot be an id" in refused(landed, path)


def test_id_types_must_agree_with_the_data_set(landed, rows, write_csv):
    path = write_csv([r | {"item_id": f"sku-{r['item_id']}"} for r in rows], "text.csv")
    message = refused(landed, path, dataset="good")
    assert "string ids" in message
    assert "int64" in message
    assert load_declaration(landed, "good").item_id_type == "int64"
    assert len(landed_files(landed, "good")) == 1


def test_names_dates_and_unknown_data_sets(landed, rows, write_csv):
    path = write_csv(rows, "x.csv")
    assert "cannot name a data set" in refused(landed, path, dataset="../x")
    assert "is not a date" in refused(landed, path, ingest_date="yesterday")
    assert "exclude_seen" in refused(landed, path, exclude_seen="maybe")
    assert "unknown time unit" in refused(landed, path, time_unit="minutes")
    with pytest.raises(UserError, match=r"no data set 'other' \(imported: good\)"):
        load_declaration(landed, "other")

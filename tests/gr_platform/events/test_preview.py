import pytest

from gr_platform.commands.importing import Import, report
from gr_platform.errors import UserError
from gr_platform.events.landing import import_file, preview_file


def snapshot(home):
    return {p.relative_to(home).as_posix(): p.read_bytes() for p in sorted(home.rglob("*")) if p.is_file()}


@pytest.fixture
def log(rows, write_csv):
    broken = [rows[0] | {"timestamp": ""}, rows[0] | {"timestamp": 5}, *[rows[0] | {"timestamp": "soon"}] * 7]
    return write_csv(rows + broken)


def test_a_preview_shows_what_an_import_does_and_writes_nothing(home, log, rows, write_csv):
    import_file(write_csv(rows, "other.csv"), home=home, dataset="other")
    before = snapshot(home)
    found = preview_file(log, home=home)
    assert snapshot(home) == before
    assert {rule: broken.num_rows for rule, broken in found.broken.items()} == {
        "invalid_time": 7,
        "null_time": 1,
        "time_before_1990": 1,
    }
    examples = found.broken["invalid_time"].examples
    assert [row["source_row"] for row in examples] == [len(rows) + 3 + i for i in range(5)]
    assert examples[0]["raw_time"] == "soon"
    assert found.events[0] == {
        "user_id": 0,
        "item_id": 100,
        "action": "buy",
        "value": None,
        "event_ts": 1_700_000_000_000,
        "event_id": None,
    }
    landed = import_file(log, home=home)
    assert landed.declaration == found.file.declaration
    assert (landed.num_rows, landed.guesses) == (found.file.num_rows, found.file.guesses)


def test_a_preview_reads_parquet_where_it_lies(home, rows, write_parquet):
    path = write_parquet(rows)
    found = preview_file(path, home=home)
    assert (found.file.path, found.broken) == (path, {})
    assert found.source_columns["user_id"] == "BIGINT"


def test_a_preview_refuses_what_an_import_refuses(home, tmp_path):
    (tmp_path / "h.csv").write_text("user_id,item_id,timestamp\n")
    with pytest.raises(UserError, match="holds no events"):
        preview_file(tmp_path / "h.csv", home=home)


def test_the_command_shows_the_same_and_no_control_characters(home, tmp_path, log):
    log.write_text(log.read_text().replace("soon", "\x1b[31msoon"))
    lines = list(report(Import(source=log, home=home, dry_run=True, named={})))
    assert "invalid_time: 7 rows (a time that cannot be read)" in lines
    assert any(line.startswith("  actions = [") for line in lines)
    assert not any("\x1b" in line for line in lines)
    assert not (home / "landing").exists()
    folder = tmp_path / "folder"
    folder.mkdir()
    log.rename(folder / "log.csv")
    lines = list(report(Import(source=folder, home=home, dry_run=True, named={})))
    assert "  dataset      folder" in lines
    lines = list(report(Import(source=folder, home=home, dry_run=False, named={"dataset": "mine"})))
    assert lines[0].startswith("log.csv imported: 57 rows in data set mine")
    assert lines[-1] == "next: gr materialize"

import shutil

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from gr_platform import cli
from gr_platform.errors import UserError
from gr_platform.events import forget as module
from gr_platform.events.forget import forget
from gr_platform.events.ingest import clean_events, ingest
from gr_platform.events.landing import import_file
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.sequentialize import sequentialize
from gr_platform.sequences.vocabulary import build_vocabulary


@pytest.fixture
def made(home, write_csv):
    """A log whose users are names that stand in no other cell, taken to sequences."""
    rows = [
        {"user_id": f"person-{user}", "item_id": item, "action": "view", "timestamp": 1_700_000_000 + at}
        for user in range(12)
        for at, item in enumerate(range(user, user + 4))
    ]
    rows.append({"user_id": "person-3", "item_id": 77, "action": "view", "timestamp": "noon"})
    import_file(write_csv(rows), home=home)
    ingest(home, "log")
    build_vocabulary(home, "log")
    sequentialize(home, "log")
    return rows


def everywhere(home, text):
    """Return the files below home that hold a text, plain or inside Parquet or Arrow."""
    found = []
    for path in home.rglob("*"):
        if not path.is_file():
            continue
        held = path.read_bytes()
        if path.suffix == ".parquet":
            held += str(pq.ParquetFile(path).read().to_pydict()).encode()
        if text.encode() in held:
            found.append(path.relative_to(home).as_posix())
    return found


def test_nothing_of_a_forgotten_person_is_left_and_all_others_are_as_they_were(home, made):
    before = clean_events(home, "log").query("SELECT * FROM events WHERE user_id <> 'person-3'").to_pylist()
    assert everywhere(home, "person-3")
    done = forget(home, "log", "person-3")
    assert (done.num_rows, done.files) == (5, ["log.csv"])
    assert everywhere(home, "person-3") == []
    assert clean_events(home, "log").query("SELECT * FROM events").to_pylist() == before
    assert SequenceDataset.current(home, "log").user_ids.tolist() == [
        f"person-{u}" for u in sorted(range(12), key=str) if u != 3
    ]
    facts = ingest(home, "log").partitions[0].manifest.facts
    assert facts["quarantined"] == {"null_user": 5}
    assert facts["rows_in"] == len(made) == facts["rows_kept"] + 5
    assert ingest(home, "log").reused


def test_the_same_log_imported_again_does_not_bring_the_person_back(home, made, tmp_path):
    forget(home, "log", "person-3")
    assert import_file(next(tmp_path.rglob("log.csv")), home=home).reused
    ingest(home, "log")
    assert everywhere(home, "person-3") == []


def test_a_run_that_was_killed_is_finished_by_the_next_and_the_record_tells(home, made, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_make_again", killed)
    with pytest.raises(KeyboardInterrupt):
        forget(home, "log", "person-3")
    monkeypatch.undo()
    assert everywhere(home, "person-3")
    again = forget(home, "log", "person-3")
    assert (again.num_rows, again.files) == (0, [])
    assert everywhere(home, "person-3") == []
    with pytest.raises(UserError, match="no events of user person-99, and forgot none"):
        forget(home, "log", "person-99")


def test_the_command_asks_first(home, made, monkeypatch):
    monkeypatch.setenv("GR_HOME", str(home))
    copy = shutil.copytree(home, home.parent / "before")
    refused = CliRunner().invoke(cli.app, ["forget", "--user", "person-3"], input="n\n")
    assert refused.exit_code != 0
    assert everywhere(home, "person-3") == everywhere(copy, "person-3")
    done = CliRunner().invoke(cli.app, ["forget", "--user", "person-3", "--yes"])
    assert done.exit_code == 0, done.output
    assert "5 rows erased in log.csv" in done.output
    assert everywhere(home, "person-3") == []


def test_integer_users_are_found_by_their_number(home, rows, write_csv):
    import_file(write_csv(rows), home=home)
    ingest(home, "log")
    with pytest.raises(UserError, match="not an integer"):
        forget(home, "log", "3 OR true")
    assert forget(home, "log", "3").num_rows == sum(row["user_id"] == 3 for row in rows)
    assert clean_events(home, "log").query("SELECT count(*) AS n FROM events WHERE user_id = 3")["n"][0].as_py() == 0


@pytest.mark.parametrize("dates", [("2026-01-01", "2026-01-02"), ("2026-01-02", "2026-01-01")])
def test_a_date_of_nobody_but_the_person_becomes_an_empty_partition(home, made, write_csv, dates):
    """Whether it comes after the dates of others or before them all."""
    import_file(home.parent / "log.csv", home=home, ingest_date=dates[0])
    theirs = [{"user_id": "zoe", "item_id": at, "action": "view", "timestamp": 1_600_000_000 + at} for at in range(30)]
    import_file(write_csv(theirs, "late.csv"), home=home, dataset="log", ingest_date=dates[1])
    ingest(home, "log")
    build_vocabulary(home, "log")
    sequentialize(home, "log")
    assert everywhere(home, "zoe")
    assert forget(home, "log", "zoe").num_rows == 30
    assert everywhere(home, "zoe") == []
    facts = {p.ingest_date: p.manifest.facts for p in ingest(home, "log").partitions}
    assert (facts[dates[1]]["rows_kept"], facts[dates[1]]["quarantined"]) == (0, {"null_user": 30})
    assert SequenceDataset.current(home, "log").num_users == 12

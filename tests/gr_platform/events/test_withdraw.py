"""A day that should not have been learned from leaves the logs, and everything made after it."""

import pytest
from typer.testing import CliRunner

from gr_platform import cli
from gr_platform.errors import UserError
from gr_platform.events import ledger
from gr_platform.events.ingest import clean_events, ingest
from gr_platform.events.landing import import_file, landed_files
from gr_platform.events.withdraw import withdraw
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.sequentialize import sequentialize
from gr_platform.sequences.vocabulary import build_vocabulary

DAYS = ("2024-01-01", "2024-01-02", "2024-01-03")


def make(home):
    ingest(home, "log")
    build_vocabulary(home, "log")
    sequentialize(home, "log")
    return SequenceDataset.current(home, "log")


def land(home, write_csv, day):
    at = 1_700_000_000 + 86_400 * day
    rows = [
        {"user_id": user, "item_id": 10 * day + user % 3, "action": "view", "timestamp": at + user}
        for user in range(12)
    ]
    return import_file(write_csv(rows, name=f"day{day}.csv"), home=home, dataset="log", ingest_date=DAYS[day])


@pytest.fixture
def landed(home, write_csv):
    for day in range(3):
        land(home, write_csv, day)
    return home


def test_what_is_made_afterwards_holds_nothing_of_the_day_and_items_keep_their_places(landed):
    before = make(landed)
    done = withdraw(landed, "log", DAYS[1])
    assert (done.files, done.num_rows) == (["day1.csv"], 12)
    after = make(landed)
    assert sorted(clean_events(landed, "log").partitions) == [DAYS[0], DAYS[2]]
    assert after.num_exposures == before.num_exposures - 12
    assert after.vocabulary.digest == before.vocabulary.digest
    assert len(list((landed / "landing" / "log").glob("*.parquet"))) == 2


def test_a_mended_file_takes_the_days_place(landed, write_csv):
    make(landed)
    withdraw(landed, "log", DAYS[1])
    assert not land(landed, write_csv, 1).reused
    assert sorted(file.ingest_date for file in landed_files(landed, "log")) == list(DAYS)
    assert make(landed).num_exposures == 36


def test_one_that_was_killed_is_finished_by_running_it_again(landed, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ledger, "_landed_name", killed)
        with pytest.raises(KeyboardInterrupt):
            withdraw(landed, "log", DAYS[1])
    assert make(landed).num_exposures in (24, 36)
    if DAYS[1] in {file.ingest_date for file in landed_files(landed, "log")}:
        withdraw(landed, "log", DAYS[1])
    assert make(landed).num_exposures == 24


def test_an_unknown_date_and_the_last_one_left_are_refused(landed):
    with pytest.raises(UserError, match="nothing of log was landed under 2023-05-05; its dates: 2024-01-01"):
        withdraw(landed, "log", "2023-05-05")
    withdraw(landed, "log", DAYS[0])
    withdraw(landed, "log", DAYS[1])
    with pytest.raises(UserError, match="2024-01-03 is all that log has"):
        withdraw(landed, "log", DAYS[2])


def test_a_person_is_asked_first(landed, monkeypatch):
    monkeypatch.setenv("GR_HOME", str(landed))
    told = CliRunner().invoke(cli.app, ["withdraw", "--date", DAYS[1]], input="n\n")
    assert "Withdraw 12 rows of 2024-01-02 (day1.csv) from data set log?" in told.output
    assert len(landed_files(landed, "log")) == 3
    told = CliRunner().invoke(cli.app, ["withdraw", "--date", DAYS[1], "--yes"])
    assert "12 rows of 2024-01-02 withdrawn from log: day1.csv" in told.output
    assert len(landed_files(landed, "log")) == 2

"""The inbox: whose day a file is, what leaves it and what stays, whatever is killed or damaged."""

import errno
import os
import shutil
import time
from pathlib import Path

import pytest

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events import landing
from gr_platform.lifecycle import days, inbox
from gr_platform.lifecycle.inbox import Taken

DAY = 1_780_272_000  # 2026-06-01 00:00 UTC
NOW = time.time() + 100.0
TODAY = time.strftime("%Y-%m-%d", time.gmtime(NOW))


def _drop(home: Path, name: str, *, offset: int = 0, users: int = 12, ds: str = "shop") -> Path:
    """Write a log of two events a user into the inbox; offset: seconds, so that no two files are alike."""
    path = home / "inbox" / ds / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{user},{item},view,{DAY + offset + 60 * user + item}" for user in range(users) for item in (1, 2)]
    path.write_text("\n".join(["user_id,item_id,action,timestamp", *rows]) + "\n")
    return path


def _take(home: Path, date: str, ds: str = "shop") -> Taken:
    return inbox.take(home, ds, date, now_s=NOW)


def _names(home: Path, ds: str = "shop") -> dict[str, list[str]]:
    return {date: [drop.path.name for drop in drops] for date, drops in inbox.waiting(home, ds, now_s=NOW).items()}


def _lying(home: Path, place: str) -> list[str]:
    folder = home / "inbox" / "shop" / place
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("name", "date"),
    [
        ("2026-06-01.csv", "2026-06-01"),
        ("shop_2026-06-01T10.csv", "2026-06-01"),
        ("date=2026-06-01/part-0.csv", "2026-06-01"),
        ("date=2026-06-01/2026-06-02.csv", "2026-06-01"),
        ("2026-06-01/a/part-0.csv", "2026-06-01"),
        ("deep/date=2026-06-01/hour=3/x.csv", "2026-06-01"),
        ("x.csv", TODAY),
        ("12026-06-011.csv", TODAY),
        ("2026-13-41.csv", TODAY),
    ],
)
def test_a_file_belongs_to_the_day_in_its_path_else_to_that_of_its_arrival(
    tmp_path: Path, name: str, date: str
) -> None:
    _drop(tmp_path, name)
    assert _names(tmp_path) == {date: [Path(name).name]}
    assert [drop.objection for drop in inbox.waiting(tmp_path, "shop", now_s=NOW)[date]] == [""]


def test_a_file_that_may_still_be_written_is_left_alone(tmp_path: Path) -> None:
    _drop(tmp_path, "2026-06-01.csv")
    for name in (".x.csv", "_SUCCESS", "x.csv.part", "x.TMP", ".x.csv.crc", "_temporary/0/x.csv", ".stage/x.csv"):
        _drop(tmp_path, name)
    assert _names(tmp_path) == {"2026-06-01": ["2026-06-01.csv"]}
    assert inbox.waiting(tmp_path, "shop") == {}
    assert inbox.settling(tmp_path, "shop") == 1
    assert inbox.settling(tmp_path, "shop", now_s=NOW) == 0


def test_taken_files_land_in_their_partition_and_leave_the_inbox(tmp_path: Path) -> None:
    _drop(tmp_path, "a/2026-06-01.csv")
    _drop(tmp_path, "b/2026-06-01.csv", offset=5)
    _drop(tmp_path, "2026-06-02.csv", offset=86_400)
    assert _take(tmp_path, "2026-06-01") == Taken(dataset="shop", date="2026-06-01", files=2, rows=48)
    assert days.landed(tmp_path, "shop") == {"2026-06-01": days.Landed(files=2, rows=48)}
    assert _lying(tmp_path, "taken") == ["2026-06-01/2026-06-01.csv", "2026-06-01/2026-06-01~2.csv"]
    assert _names(tmp_path) == {"2026-06-02": ["2026-06-02.csv"]}
    assert _take(tmp_path, "2026-06-01").files == 0


def test_the_first_file_makes_the_data_set_and_later_ones_do_not_change_which_is_active(tmp_path: Path) -> None:
    _drop(tmp_path, "2026-06-01.csv")
    _drop(tmp_path, "2026-06-01.csv", ds="other", offset=9)
    _take(tmp_path, "2026-06-01")
    _take(tmp_path, "2026-06-01", ds="other")
    assert landing.active_dataset(tmp_path) == "shop"
    assert landing.load_declaration(tmp_path, "other").name == "other"


def test_a_refused_file_lies_beside_its_reason_and_the_others_land(tmp_path: Path) -> None:
    _drop(tmp_path, "2026-06-01-a.csv").write_text("nonsense\n")
    _drop(tmp_path, "2026-06-01-b.csv")
    _drop(tmp_path, "2026-06-01-c.xlsx").write_bytes(b"PK\x03\x04")
    taken = _take(tmp_path, "2026-06-01")
    assert (taken.files, sorted(taken.refused)) == (1, ["2026-06-01-a.csv", "2026-06-01-c.xlsx"])
    assert _lying(tmp_path, "refused") == [
        f"2026-06-01/2026-06-01-{name}" for name in ("a.csv", "a.csv.reason.txt", "c.xlsx", "c.xlsx.reason.txt")
    ]
    reason = (tmp_path / "inbox/shop/refused/2026-06-01/2026-06-01-a.csv.reason.txt").read_text()
    assert reason == taken.refused["2026-06-01-a.csv"] + "\n"
    assert "no column that looks like user_id" in reason
    assert _names(tmp_path) == {}


@pytest.mark.parametrize(
    "name", ["date=1999-12-31/x.csv", "date=2999-01-01/x.csv", "date=soon/x.csv", "2999-01-01.csv"]
)
def test_a_day_that_can_be_none_is_refused_by_name(tmp_path: Path, name: str) -> None:
    _drop(tmp_path, name)
    taken = _take(tmp_path, TODAY)
    assert taken.files == 0
    assert "no day from 2000-01-01 to today" in next(iter(taken.refused.values()))


def test_a_file_of_tomorrow_waits(tmp_path: Path) -> None:
    _drop(tmp_path, f"{time.strftime('%Y-%m-%d', time.gmtime(NOW + 86_400))}.csv")
    assert _names(tmp_path) == {}
    assert len(inbox.waiting(tmp_path, "shop", now_s=NOW + 86_400)) == 1


def test_a_kill_between_landing_and_moving_is_finished_by_the_next_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _drop(tmp_path, "2026-06-01.csv")

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill)
        with pytest.raises(Killed):
            _take(tmp_path, "2026-06-01")
    assert _names(tmp_path) == {"2026-06-01": ["2026-06-01.csv"]}
    assert days.landed(tmp_path, "shop") == {"2026-06-01": days.Landed(files=1, rows=24)}
    assert _take(tmp_path, "2026-06-01") == Taken(dataset="shop", date="2026-06-01", files=1, rows=24, known=1)
    assert days.landed(tmp_path, "shop") == {"2026-06-01": days.Landed(files=1, rows=24)}
    _drop(tmp_path, "2026-06-02.csv").write_text("nonsense\n")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill)
        with pytest.raises(Killed):
            _take(tmp_path, "2026-06-02")
    assert len(_take(tmp_path, "2026-06-02").refused) == 1
    assert _lying(tmp_path, "refused") == ["2026-06-02/2026-06-02.csv", "2026-06-02/2026-06-02.csv.reason.txt"]


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error")])
def test_a_fault_of_the_machine_leaves_the_file_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: OSError
) -> None:
    _drop(tmp_path, "2026-06-01.csv")

    def fail(*_: object, **__: object) -> None:
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(landing, "import_file", fail)
        with pytest.raises(OSError, match=fault.strerror):
            _take(tmp_path, "2026-06-01")
    assert _names(tmp_path) == {"2026-06-01": ["2026-06-01.csv"]}
    assert _take(tmp_path, "2026-06-01").files == 1


def test_a_file_that_grows_while_it_is_read_is_not_refused_but_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _drop(tmp_path, "2026-06-01.csv")
    real = landing.import_file

    def grow(source: Path, **named: object) -> landing.LandedFile:
        with path.open("a") as stream:
            stream.write("1,2,vi")
        return real(source, **named)

    with monkeypatch.context() as patch:
        patch.setattr(landing, "import_file", grow)
        assert _take(tmp_path, "2026-06-01") == Taken(dataset="shop", date="2026-06-01")
    assert path.is_file()
    assert _lying(tmp_path, "refused") == []


def test_a_damaged_data_set_refuses_no_file(tmp_path: Path) -> None:
    _drop(tmp_path, "2026-06-01.csv")
    _take(tmp_path, "2026-06-01")
    next((tmp_path / "landing" / "shop").glob("*.json")).write_text("{")
    _drop(tmp_path, "2026-06-02.csv", offset=7)
    with pytest.raises(UserError, match="is damaged"):
        _take(tmp_path, "2026-06-02")
    assert _names(tmp_path) == {"2026-06-02": ["2026-06-02.csv"]}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_refused_and_does_not_stop_the_others(tmp_path: Path) -> None:
    _drop(tmp_path, "2026-06-01-a.csv").chmod(0)
    _drop(tmp_path, "2026-06-01-b.csv")
    taken = _take(tmp_path, "2026-06-01")
    assert taken.files == 1
    assert "may not be read" in taken.refused["2026-06-01-a.csv"]


def test_a_catalogue_beside_a_log_gives_titles_and_goes_with_it(tmp_path: Path) -> None:
    _drop(tmp_path, "2026-06-01[a].csv")
    (tmp_path / "inbox/shop/2026-06-01[a].catalogue.csv").write_text("item_id,title\n1,Tea\n")
    assert _take(tmp_path, "2026-06-01").files == 1
    assert landing.titles(tmp_path, "shop") == {1: "Tea"}
    assert len(_lying(tmp_path, "taken")) == 2


def test_what_lies_beside_the_folders_of_data_sets_is_told(tmp_path: Path) -> None:
    assert inbox.data_sets(tmp_path) == inbox.strays(tmp_path) == []
    _drop(tmp_path, "x.csv")
    _drop(tmp_path, "x.csv", ds="My Shop")
    shutil.copy(_drop(tmp_path, "y.csv"), tmp_path / "inbox" / "lost.csv")
    assert inbox.data_sets(tmp_path) == ["shop"]
    assert inbox.strays(tmp_path) == ["My Shop", "lost.csv"]


def test_a_landing_waits_for_an_import_and_a_long_one_refuses_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess
    import sys

    _drop(tmp_path, "2026-06-01.csv")
    monkeypatch.setattr(inbox, "LANDING_WAIT_S", 0.2)
    code = "import sys, pathlib; from gr_platform import storage\n"
    code += "with storage.exclusive(pathlib.Path(sys.argv[1]), 'landing'): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another program works on the landing"):
        _take(tmp_path, "2026-06-01")
    holder.communicate("")
    assert _take(tmp_path, "2026-06-01").files == 1


def test_missing_days_are_those_over_that_have_no_data_after_the_first_that_has(tmp_path: Path) -> None:
    assert days.gaps(tmp_path, "shop", days.days_between("2026-06-01", "2026-06-09")) == []
    for number in (2, 4):
        _drop(tmp_path, f"2026-06-0{number}.csv", offset=number)
        _take(tmp_path, f"2026-06-0{number}")
    month = days.days_between("2026-05-28", "2026-06-06")
    assert days.gaps(tmp_path, "shop", month) == ["shop has no data of 2026-06-03 and 2 more day(s)"]
    assert days.gaps(tmp_path, "shop", ["2026-06-04", TODAY]) == []


def test_days_that_follow_each_other_are_one_stretch() -> None:
    dates = ["2026-06-30", "2026-07-01", "2026-07-03", "2026-07-02", "2026-12-01", "2026-07-01"]
    assert days.stretches(dates) == [("2026-06-30", "2026-07-03"), ("2026-12-01", "2026-12-01")]
    assert days.stretches([]) == []


def test_the_state_of_the_ledger_changes_with_every_file_and_with_nothing_else(tmp_path: Path) -> None:
    states = [days.ledger_state(tmp_path, "shop")]
    for name in ("2026-06-01.csv", "2026-06-02.csv"):
        _drop(tmp_path, name, offset=int(name[8:10]))
        _take(tmp_path, name[:10])
        states.append(days.ledger_state(tmp_path, "shop"))
    assert len(set(states)) == 3
    storage.write_text(tmp_path / "inbox" / "shop" / "x", "x")
    _drop(tmp_path, "2026-06-02.csv", offset=2)
    assert _take(tmp_path, "2026-06-02").known == 1
    assert days.ledger_state(tmp_path, "shop") == states[-1]


def test_a_forgotten_user_is_in_no_original_that_was_landed(tmp_path: Path) -> None:
    from gr_platform.commands.forgetting import report

    _drop(tmp_path, "2026-06-01.csv")
    _take(tmp_path, "2026-06-01")
    assert any("1 landed file(s)" in line for line in report(tmp_path, "shop", "7", sure=True))
    assert _lying(tmp_path, "taken") == []
    assert days.landed(tmp_path, "shop") == {"2026-06-01": days.Landed(files=1, rows=24)}

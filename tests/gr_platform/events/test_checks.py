"""Partition checks: what each one calls an error, a warning, or not judged; how bounds are overridden."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events.bounds import Bounds, load_bounds
from gr_platform.events.checks import CHECKS, SHOWN_ROWS, read_log, report
from gr_platform.events.declaration import Declaration
from gr_platform.events.judgements import Log, psi
from gr_platform.events.partitions import partition_facts, partition_folders, publish, stored_facts

NOW = 1_800_000_000_000
DAY = 86_400_000
DECLARED = Declaration(name="made", actions=("view", "buy"), positives=("buy",))
TYPES = {
    "user_id": "int64",
    "item_id": "int64",
    "action": "string",
    "value": "double",
    "event_ts": "int64",
    "event_id": "string",
    "source_file": "int32",
    "source_row": "int64",
}


def facts(**changed: Any) -> dict[str, Any]:
    """Return the facts of an unremarkable day of 1,000 rows."""
    return {
        "rows_in": 1000,
        "rows_kept": 990,
        "duplicates": 10,
        "quarantined": {},
        "num_users": 100,
        "num_items": 50,
        "num_new_users": 10,
        "num_new_items": 5,
        "max_user_events": 40,
        "num_late": 3,
        "first_ts": NOW - 30 * DAY,
        "last_ts": NOW - DAY,
        "actions": {"view": 890, "buy": 100},
    } | changed


def stored(**changed: Any) -> dict[str, Any]:
    """Return what the footers of that day say."""
    filled = dict.fromkeys(TYPES, 0)
    return {"num_rows": 990, "num_quarantined": 0, "types": TYPES, "nulls": filled} | changed


def log_of(*days: dict[str, Any], bounds: Bounds | None = None, files: dict[str, Any] | None = None) -> Log:
    """Return a log of days from 2026-01-01 on; `files` are the footers of the last day."""
    start = datetime.date(2026, 1, 1)
    return Log(
        declaration=DECLARED,
        bounds=bounds or Bounds(),
        dates=[(start + datetime.timedelta(days=at)).isoformat() for at in range(len(days))],
        facts=days,
        stored=[stored()] * (len(days) - 1) + [files or stored()],
        now_ms=NOW,
    )


USUAL = [facts(num_new_users=100, num_new_items=50), *[facts()] * 4]


@pytest.mark.parametrize("name", CHECKS)
def test_usual_days_pass_and_a_first_day_has_nothing_to_be_compared_with(name: str) -> None:
    for log in (log_of(*USUAL), log_of(USUAL[0])):
        outcome = report(name, log)
        assert outcome.faults == []
        assert len(outcome.rows) == len(log.dates)
        assert all(len(row) == len(outcome.columns) for row in outcome.rows)
    alone = name in ("volume", "new_users", "new_items", "action_mix")
    assert ("nothing before to compare with" in report(name, log_of(USUAL[0])).summary) == alone


@pytest.mark.parametrize(
    ("name", "changed", "is_error", "says"),
    [
        ("schema", {"actions": {"return": 990}}, True, "action 'return' is not declared"),
        ("conservation", {"rows_kept": 980}, True, "1,000 rows came in, 990 are accounted for"),
        ("conservation", {"rows_kept": 980, "duplicates": 20}, True, "hold 990 rows, the manifest says 980"),
        ("time_range", {"last_ts": NOW + 2 * DAY}, True, "must lie from 1990-01-01 to before 2027-01-16"),
        ("time_range", {"first_ts": 0}, True, "events from 1970-01-01"),
        ("duplicates", {"duplicates": 501}, True, "50.1 % of 1,000 rows are duplicates, at most 50 %"),
        ("duplicates", {"duplicates": 51}, False, "5.1 % of 1,000 rows are duplicates, at most 5 %"),
        ("quarantine", {"quarantined": {"null_time": 9, "nan_value": 2}}, False, "1.1 % of 1,000 rows are quarantined"),
        ("volume", {"rows_in": 10_001}, True, "10,001 rows came in, usual are 1,000: 10 times as many"),
        ("volume", {"rows_in": 99}, True, "outside 1/10 to 10 (max_volume)"),
        ("volume", {"rows_in": 300}, False, "outside 1/3 to 3 (warn_volume)"),
        ("new_users", {"num_new_users": 36}, False, "36 % of the users are new, usual are 10 %"),
        ("new_items", {"num_new_items": 18}, False, "36 % of the items are new, usual are 10 %"),
        ("action_mix", {"actions": {"view": 500, "buy": 490}}, False, "most of all buy, from 10.1 % to 49.5 %"),
        ("longest_user", {"max_user_events": 20_001}, False, "one user has 20,001 events"),
    ],
)
def test_a_day_out_of_bounds_is_named_with_its_figure(
    name: str, changed: dict[str, Any], is_error: bool, says: str
) -> None:
    outcome = report(name, log_of(*USUAL, facts(**changed)))
    assert says in outcome.faults[0]
    assert outcome.faults[0].startswith("2026-01-06: ")
    assert outcome.is_error is is_error
    assert outcome.rows[0][0] == "2026-01-06"


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("schema", {"types": TYPES | {"item_id": "string"}}, "item_id is string, not int64"),
        ("schema", {"types": {k: v for k, v in TYPES.items() if k != "event_ts"}}, "event_ts is missing"),
        ("schema", {"types": TYPES | {"value": "double/missing"}}, "value is double/missing, not double"),
        ("nulls", {"nulls": dict.fromkeys(TYPES, 0) | {"item_id": 7, "value": 990}}, "item_id is NULL in 7 rows"),
        ("conservation", {"num_quarantined": 3}, "the quarantine files hold 3 rows, the manifest says 0"),
    ],
)
def test_files_that_break_the_contract_are_errors(name: str, changed: dict[str, Any], says: str) -> None:
    outcome = report(name, log_of(*USUAL, files=stored(**changed)))
    assert outcome.faults == [f"2026-01-05: {says}"] or says in outcome.faults[0]
    assert outcome.is_error


def test_what_older_manifests_do_not_say_is_not_judged() -> None:
    optional = ("num_new_users", "num_new_items", "max_user_events", "num_late", "first_ts", "last_ts", "actions")
    bare = {name: value for name, value in facts().items() if name not in optional}
    log = log_of(bare, bare, facts(), facts(), files=stored(nulls={}))
    for name in CHECKS:
        outcome = report(name, log)
        assert outcome.faults == [], name
    assert "2 not judged: not recorded" in report("longest_user", log).summary
    assert "1 not judged: not recorded" in report("nulls", log).summary
    assert "2 not judged: no events" in report("time_range", log).summary


def test_a_day_whose_rows_were_all_seen_before_is_judged_by_its_duplicates_alone() -> None:
    empty = facts(rows_kept=0, duplicates=1000, num_users=0, num_items=0, num_new_users=0, num_new_items=0)
    empty |= {"first_ts": None, "last_ts": None, "actions": {}, "max_user_events": 0}
    log = log_of(*USUAL, empty, facts(), files=stored())
    outcomes = {name: report(name, log).faults for name in CHECKS if name != "conservation"}
    assert {name for name, faults in outcomes.items() if faults} == {"duplicates"}


def test_every_partition_is_judged_and_errors_stand_before_warnings_the_newest_first() -> None:
    many = [facts(duplicates=60 if at else 600, rows_in=1000) for at in range(12)]
    outcome = report("duplicates", log_of(*many))
    assert outcome.is_error
    assert [fault[:10] for fault in outcome.faults[:4]] == ["2026-01-01", "2026-01-12", "2026-01-11", "2026-01-10"]
    assert outcome.faults[4] == "and 8 more partitions"
    assert len(outcome.faults) == 6
    assert len(outcome.rows) == SHOWN_ROWS


def test_an_accepted_date_breaks_no_bound_but_still_the_contract() -> None:
    bounds = Bounds(accepted=("2026-01-06",))
    log = log_of(*USUAL, facts(duplicates=700, rows_in=20_000), bounds=bounds)
    assert report("duplicates", log).faults == []
    assert "1 not judged: accepted in checks.toml" in report("volume", log).summary
    assert report("conservation", log).is_error


def test_few_rows_say_nothing_of_shares() -> None:
    small = facts(rows_kept=20, num_users=5, num_new_users=5, actions={"buy": 20})
    for name in ("new_users", "action_mix"):
        outcome = report(name, log_of(*USUAL, small))
        assert outcome.faults == []
        assert "1 not judged: too few rows" in outcome.summary


def test_psi_is_zero_for_one_mix_symmetric_and_finite_for_new_categories() -> None:
    assert psi({"a": 80, "b": 20}, {"a": 80, "b": 20}) == pytest.approx(0.0)
    there, back = psi({"a": 800, "b": 200}, {"a": 500, "b": 500}), psi({"a": 500, "b": 500}, {"a": 800, "b": 200})
    assert there == pytest.approx(back)
    # (0.5 - 0.8) ln(0.5 / 0.8) + (0.5 - 0.2) ln(0.5 / 0.2), but for the half counts
    assert there == pytest.approx(0.4159, abs=0.002)
    assert 0.25 < psi({"a": 1000}, {"a": 500, "new": 500}) < 10


def test_bounds_are_overridden_by_a_file_and_a_misspelt_one_is_refused(tmp_path: Path) -> None:
    assert load_bounds(tmp_path, "made") == Bounds()
    folder = tmp_path / "landing" / "made"
    folder.mkdir(parents=True)
    path = folder / "checks.toml"
    path.write_text('max_duplicates = 1\nearliest = 2020-01-01\naccepted = [2026-01-06, "2026-01-07"]\n')
    bounds = load_bounds(tmp_path, "made")
    assert (bounds.max_duplicates, bounds.earliest) == (1, datetime.date(2020, 1, 1))
    assert bounds.accepted == ("2026-01-06", "2026-01-07")
    for text, says in {
        "max_duplicate = 0.2": "unknown entries max_duplicate; known: earliest",
        "max_duplicates = 2": "max_duplicates is 2, must be from 0 to 1",
        "max_volume = 0.5": "max_volume is 0.5, must be at least 1",
        "max_psi = nan": "max_psi is nan, must be at least 0",
        "min_rows = 1.5": "min_rows is 1.5, must be a whole number",
        "max_psi = true": "max_psi is True, must be a number",
        'earliest = "2020-01-01"': "must be a date such as 2020-01-31 without quotes",
        "accepted = 2026-01-06": "must be a list of dates",
        'accepted = ["yesterday"]': "must be a list of dates",
        "max_psi = ": "is not valid TOML",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=r"checks\.toml of data set made") as raised:
            load_bounds(tmp_path, "made")
        assert says in str(raised.value)


def _partition(home: Path, date: str, table: pa.Table) -> Path:
    folder = home / "events" / "made" / f"ingest_date={date}" / "0f"
    folder.mkdir(parents=True)
    half = table.num_rows // 2
    pq.write_table(table.slice(0, half), folder / "events-000.parquet")
    pq.write_table(table.slice(half), folder / "events-001.parquet")
    pq.write_table(table.slice(0, 1), folder / "quarantine-0.parquet")
    storage.write_manifest(folder, kind="events", spec={}, facts=facts(rows_kept=table.num_rows))
    publish(home, "made", partition_folders(home, "made") | {date: folder})
    return folder


def test_footers_tell_rows_types_and_nulls_of_all_files_of_a_partition(tmp_path: Path) -> None:
    table = pa.table({"user_id": pa.array([1, 2, None, 4]), "action": pa.array(["view"] * 4)})
    folder = _partition(tmp_path, "2026-01-02", table)
    _partition(tmp_path, "2026-01-01", table)
    assert [date for date, _ in partition_facts(tmp_path, "made")] == ["2026-01-01", "2026-01-02"]
    date, found = stored_facts(tmp_path, "made")[1]
    assert date == "2026-01-02"
    assert (found["num_rows"], found["num_quarantined"]) == (4, 1)
    assert found["types"] == {"user_id": "int64", "action": "string"}
    assert found["nulls"] == {"user_id": 1, "action": 0}
    pq.write_table(pa.table({"user_id": ["a"]}), folder / "events-001.parquet")
    assert stored_facts(tmp_path, "made")[1][1]["types"] == {"user_id": "int64/string", "action": "missing/string"}
    (folder / "events-001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"events-001\.parquet of ingest_date=2026-01-02 is no readable Parquet"):
        stored_facts(tmp_path, "made")


def test_ingested_events_pass_every_check(
    home: Path, write_csv: Callable[..., Path], rows: list[dict[str, Any]]
) -> None:
    from gr_platform.events.ingest import ingest
    from gr_platform.events.landing import import_file, load_declaration

    ds = import_file(write_csv(rows), home=home).dataset
    later = [row | {"timestamp": row["timestamp"] + 100} for row in rows]
    import_file(write_csv(later, "later.csv"), home=home, dataset=ds, ingest_date="2099-01-01")
    ingest(home, ds)
    log = read_log(home, ds, load_declaration(home, ds), now_ms=NOW)
    assert len(log.dates) == 2
    assert {name: faults for name in CHECKS if (faults := report(name, log).faults)} == {}

"""A stream is its log cut in time; a fault changes its own day alone."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from gr_platform.errors import UserError
from gr_platform.events.ingest import clean_events, ingest
from gr_platform.events.landing import import_file, load_declaration
from gr_platform.replay.faults import COPIES, DAY_MS
from gr_platform.replay.stream import Stream, StreamOptions, of_dataset, simulated

NUM_EVENTS = 6_000


def table(stream: Stream) -> pa.Table:
    return pa.concat_tables([pq.read_table(stream.history), *(pq.read_table(day.true_path) for day in stream.days)])


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    faults = {2: "poisoned", 3: "empty", 4: "tenfold"}
    return simulated(tmp_path_factory.mktemp("s") / "f", StreamOptions(days=4, num_events=NUM_EVENTS, faults=faults))


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return simulated(tmp_path_factory.mktemp("s") / "c", StreamOptions(days=4, num_events=NUM_EVENTS))


def test_days_follow_each_other_and_hold_all_events_of_theirs(clean):
    times = table(clean)["event_ts"].to_numpy()
    assert (np.diff(times) >= 0).all()
    assert [day.number for day in clean.days] == [1, 2, 3, 4]
    for day in clean.days:
        own = pq.read_table(day.path)["event_ts"].to_numpy()
        assert day.end - day.begin == DAY_MS
        assert len(own) == day.num_events > 0
        assert day.begin <= own[0]
        assert own[-1] < day.end
    dates = [clean.history_date, *(day.date for day in clean.days)]
    assert dates == [f"2026-06-{number}" for number in range(19, 24)]
    # What the daily model is ahead by: items that nobody knew before.
    assert sum(day.new_item_share for day in clean.days) > 0.02


def test_a_fault_changes_its_own_day_alone(clean, faulty):
    assert table(clean).equals(table(faulty))
    for one, other in zip(clean.days, faulty.days, strict=True):
        same = one.path.read_bytes() == other.path.read_bytes() if other.path else False
        assert same == (other.fault is None)


def test_one_item_has_80_percent_of_a_poisoned_day(faulty):
    day = faulty.days[1]
    poisoned, true = pq.read_table(day.path), pq.read_table(day.true_path)
    assert poisoned.drop(["item_id"]).equals(true.drop(["item_id"]))
    top = pc.value_counts(poisoned["item_id"]).field("counts").to_numpy().max()
    assert top / len(poisoned) == day.top_share == pytest.approx(0.8, abs=0.01)
    # The item is one that was there before.
    assert day.new_item_share < 0.02


def test_an_empty_day_has_no_file_and_a_tenfold_one_ten_times_the_users(faulty):
    empty, tenfold = faulty.days[2:]
    assert (empty.path, empty.num_events, empty.top_share) == (None, 0, 0.0)
    many, true = pq.read_table(tenfold.path), pq.read_table(tenfold.true_path)
    assert len(many) == tenfold.num_events == COPIES * len(true)
    assert pc.count_distinct(many["user_id"]).as_py() == COPIES * pc.count_distinct(true["user_id"]).as_py()
    times = many["event_ts"].to_numpy()
    assert (np.diff(times) >= 0).all()
    assert times[-1] < tenfold.end


def test_files_are_imported_with_the_titles_and_actions_of_the_simulator(faulty, tmp_path):
    landed = import_file(faulty.history, home=tmp_path, dataset=faulty.dataset, ingest_date=faulty.history_date)
    assert landed.guesses["catalogue"] == "history.catalogue.parquet"
    poisoned = import_file(faulty.days[1].path, home=tmp_path, dataset=faulty.dataset, ingest_date=faulty.days[1].date)
    assert (poisoned.num_rows, poisoned.reused) == (faulty.days[1].num_events, False)
    assert load_declaration(tmp_path, faulty.dataset).actions == ("view", "like", "purchase")


@pytest.mark.parametrize("fields", [{"days": 0}, {"faults": {8: "empty"}}, {"faults": {1: "late"}}])
def test_options_that_mean_nothing_are_refused(fields):
    with pytest.raises(ValueError, match="StreamOptions"):
        StreamOptions(**fields)


USERS = [f"u{number}" for number in range(10)]


def ingested(home: Path, num_days: int, users: list[str] = USERS) -> None:
    """Ratings of three items a user a day, with more and more days between them."""
    rows = [
        f"{user},{item},{1 + item % 5},{(12_000 + day + day * day // 40) * 86_400 + 60 * item}"
        for day in range(num_days)
        for user in users
        for item in range(day % 7, day % 7 + 3)
    ]
    log = home / "log.csv"
    log.write_text("\n".join(["who,movie_id,rating,timestamp", *rows]) + "\n")
    import_file(log, home=home, dataset="films", user_column="who", exclude_seen="all")
    ingest(home, "films")


def test_sparse_days_of_a_real_log_become_days_of_equal_size_with_their_own_dates(tmp_path):
    ingested(tmp_path, 80)
    stream = of_dataset(tmp_path / "s", tmp_path, "films", StreamOptions(days=5))
    assert table(stream).num_rows == 80 * 30
    assert stream.num_history_events == pytest.approx(1_200, abs=30)
    assert [day.num_events for day in stream.days] == pytest.approx([240] * 5, abs=30)
    assert all((day.begin % DAY_MS, day.end % DAY_MS) == (0, 0) for day in stream.days)
    assert len({day.date for day in stream.days}) == 5
    with pytest.raises(UserError, match="too few for 50"):
        of_dataset(tmp_path / "t", tmp_path, "films", StreamOptions(days=50))


def test_a_real_log_means_the_same_in_the_home_it_is_replayed_in(tmp_path):
    home, other = tmp_path / "a", tmp_path / "b"
    home.mkdir()
    other.mkdir()
    ingested(home, 40)
    stream = of_dataset(tmp_path / "s", home, "films", StreamOptions(days=3))
    for date, path in [(stream.history_date, stream.history), *((day.date, day.path) for day in stream.days)]:
        import_file(path, home=other, declaration=str(stream.declaration), ingest_date=date)
    ingest(other, "films")
    columns = "SELECT user_id, item_id, action, event_ts FROM events ORDER BY ALL"
    assert clean_events(other, "films").query(columns).equals(clean_events(home, "films").query(columns))
    ours, theirs = (load_declaration(folder, "films") for folder in (home, other))
    assert (ours.tasks, ours.exclude_seen, ours.actions) == (theirs.tasks, theirs.exclude_seen, theirs.actions)


def test_a_sample_of_users_keeps_whole_users(tmp_path):
    ingested(tmp_path, 40, [f"u{number}" for number in range(20)])
    stream = of_dataset(tmp_path / "s", tmp_path, "films", StreamOptions(days=2, num_events=500))
    counts = pc.value_counts(table(stream)["user_id"])
    assert counts.field("counts").to_pylist() == [120] * 5

"""Slow series of users: the first entry of each run, merged by time, never one that came later."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_platform.errors import UserError
from gr_platform.events.feature_import import WantedFeatures, import_features
from gr_platform.events.features import feature_files
from gr_platform.events.forget import forget
from gr_platform.sequences.codes import Codes
from gr_platform.sequences.dataset import Jagged, SequenceDataset
from gr_platform.sequences.user_series import UserSeries

from .conftest import START_MS, crowd

Given = Callable[..., Any]


@pytest.fixture
def give(tmp_path: Path, home: Path) -> Given:
    """Return give(rows of (user, ms after START_MS, *series), names, name) -> the landed file of data set `log`."""

    def run(rows: list[Any], names: tuple[str, ...] = ("city",), name: str = "users") -> Any:
        columns = ("user_id", "event_ts", *names)
        table = dict(zip(columns, (list(each) for each in zip(*rows, strict=True)), strict=True))
        table["event_ts"] = [START_MS + at for at in table["event_ts"]]
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
        wanted = WantedFeatures(kind="user-features", dataset="log")
        return import_features(tmp_path / f"{name}.parquet", wanted, home=home)

    return run


def merged(home: Path, dataset: SequenceDataset, user: int, start: int = 0) -> list[tuple[Any, int]]:
    """Return a user's merged history: (text of an entry or item id, ms after START_MS)."""
    series = UserSeries.current(home, "log", dataset)
    row = np.array([dataset.find_user(user)])
    found = series.merged(row, dataset.gather(row, np.array([start]), dataset.lengths[row]))
    out: list[tuple[Any, int]] = []
    for kind, value, at in zip(found.kinds.tolist(), found.values.tolist(), found.times.tolist(), strict=True):
        name = series.codes[series.names[kind - 1]].values[value - 1] if kind else dataset.vocabulary.ids([value])[0]
        out.append((name, at - START_MS))
    return out


def test_of_each_constant_run_the_first_entry_is_merged_by_time(make, home, give):
    dataset = make([*crowd(), *((1, 500 + at, "view", at) for at in (10, 20, 30))])
    cities = [(1, 5, "Rome"), (1, 12, "Rome"), (1, 20, "Oslo"), (1, 25, None), (1, 26, "Oslo"), (1, 30, "Rome")]
    give([*cities, (1, 31, "later"), (999, 1, "nobody")])
    assert merged(home, dataset, 1) == [
        ("Rome", 5), (510, 10), ("Oslo", 20), (520, 20), ("Rome", 30), (530, 30),
    ]  # fmt: skip
    assert merged(home, dataset, 90) == [
        (item, at) for item, at in zip((506, 500, 501, 502), (0, 10, 20, 30), strict=True)
    ]


def test_an_entry_one_ms_after_the_last_exposure_is_never_seen(make, home, give):
    dataset = make(crowd())
    give([(90, 30, "known"), (90, 31, "planted"), (91, 31, "planted")])
    assert [name for name, _ in merged(home, dataset, 90)].count("known") == 1
    assert "planted" not in [name for user in (90, 91) for name, _ in merged(home, dataset, user)]


def test_series_of_several_files_go_on_and_of_equal_times_come_in_the_order_of_the_series(make, home, give):
    dataset = make(crowd())
    give([(90, 10, "b", "x")], ("city", "plan"))
    give([(90, 10, "b"), (90, 15, "a")], ("city",), name="more")
    assert merged(home, dataset, 90, start=1)[:4] == [("b", 10), ("x", 10), (500 + 91 % 7, 10), ("a", 15)]
    series = UserSeries.current(home, "log", dataset)
    assert series.names == ("city", "plan")
    assert series.codes["city"].values.tolist() == ["b", "a"]


def test_runs_of_many_users_equal_looking_at_every_row(make, home, give):
    rng = random.Random(7)
    rows = [
        (user, rng.randrange(8), rng.choice(["a", "b", None]), rng.choice(["x", "y", "z"]))
        for user in range(90, 100)
        for _ in range(rng.randrange(20))
    ]
    dataset = make(crowd())
    give(rows, ("city", "plan"))
    series = UserSeries.current(home, "log", dataset)
    for user in range(90, 100):
        expected = []
        for kind, place in ((1, 2), (2, 3)):
            before = None
            for row in sorted((row for row in rows if row[0] == user), key=lambda row: row[1]):
                if row[place] is not None and row[place] != before:
                    before = row[place]
                    expected.append((row[1], kind, before))
        expected.sort(key=lambda entry: entry[:2])
        span = slice(*series.offsets[dataset.find_user(user) :][:2].tolist())
        mine = zip(series.times[span].tolist(), series.kinds[span].tolist(), series.values[span].tolist(), strict=True)
        found = [
            (at - START_MS, kind, series.codes[series.names[kind - 1]].values[code - 1]) for at, kind, code in mine
        ]
        assert found == expected


spans = st.lists(st.lists(st.integers(0, 6), max_size=5).map(sorted), min_size=1, max_size=5)
entries = st.lists(
    st.lists(st.tuples(st.integers(0, 7), st.integers(1, 2)), max_size=5).map(sorted), min_size=5, max_size=5
)


@settings(max_examples=200, deadline=None)
@given(spans=spans, entries=entries, data=st.data())
def test_merging_equals_sorting_each_user_alone(spans, entries, data):
    rows = [data.draw(st.integers(0, 4)) for _ in spans]
    lengths, num = [len(span) for span in spans], [len(each) for each in entries]
    times = np.array([at for span in spans for at in span], np.int64)
    block = Jagged(np.concatenate([[0], np.cumsum(lengths)]), np.arange(len(times)) + 5, np.ones_like(times), times)
    flat = [entry for each in entries for entry in each]
    codes = Codes(pa.table({"value": ["a"], "count": [1]}))
    series = UserSeries(
        np.concatenate([[0], np.cumsum(num)]),
        np.array([kind for _, kind in flat], np.int64),
        np.arange(len(flat)) + 100,
        np.array([at for at, _ in flat], np.int64),
        {"x": codes, "y": codes},
    )
    found = series.merged(np.array(rows), block)
    assert len(found.offsets) == len(spans) + 1
    for place, (row, history) in enumerate(zip(rows, found.histories(), strict=True)):
        mine = list(range(*block.offsets[place : place + 2].tolist()))
        last = spans[place][-1] if mine else -1
        both = [(at, 0, kind, 100 + sum(num[:row]) + n) for n, (at, kind) in enumerate(entries[row]) if at <= last]
        both = sorted(both, key=lambda entry: (entry[0], entry[2])) if both else []
        both = sorted([*both, *((times[at], 1, 0, 5 + at) for at in mine)], key=lambda entry: entry[:2])
        assert list(zip(*(part.tolist() for part in history), strict=True)) == [(k, v, at) for at, _, k, v in both]
    assert (found.values[found.places >= 0] - 5).tolist() == sorted(found.places[found.places >= 0].tolist())


def test_a_counter_is_refused_and_what_was_there_stays(make, home, give):
    dataset = make(crowd())
    give([(user, 0, "Rome", 3) for user in range(90, 100)], ("city", "level"))
    before = merged(home, dataset, 90)
    rows = [(user, 1 + at, "Rome", 7 * at) for user in range(90, 100) for at in range(3)]
    with pytest.raises(UserError, match=r"column 'clicks' of more.parquet is a number that changes in 20 of 20 rows"):
        give(rows, ("city", "clicks"), name="more")
    assert merged(home, dataset, 90) == before
    assert len(feature_files(home, "log", "user-features")) == 1
    slow = [(user, 1 + at, "Rome", 3) for user in range(90, 100) for at in range(3)]
    give(slow, ("city", "level"), name="more")
    assert merged(home, dataset, 90) == before


def test_without_such_a_file_one_sentence_says_what_to_do(make, home):
    dataset = make(crowd())
    with pytest.raises(UserError, match="has no user-features; run gr import FILE --as user-features first"):
        UserSeries.current(home, "log", dataset)


def test_a_forgotten_user_has_no_series_any_more_and_the_others_keep_theirs(make, home, give):
    dataset = make(crowd())
    landed = give([(90, 1, "Rome"), (91, 2, "Oslo"), (90, 3, "Bern")])
    before = merged(home, dataset, 91)
    make(crowd())
    forget(home, "log", "90")
    assert pq.read_table(landed.path).column("user_id").to_pylist() == [None, 91, None]
    assert pq.read_table(landed.path).column("city").to_pylist() == [None, "Oslo", None]
    left = SequenceDataset.current(home, "log")
    assert merged(home, left, 91) == before
    assert len(UserSeries.current(home, "log", left).times) == 1
    assert len(list((home / "sequences" / "log").glob("user-features-*"))) == 1
    assert give([(90, 1, "Rome"), (91, 2, "Oslo"), (90, 3, "Bern")]).reused

"""Side information without times: it holds at every event, and what a row with a time says counts from then on."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gr_platform.commands.importing import Import, report
from gr_platform.errors import UserError
from gr_platform.events.feature_import import WantedFeatures, import_features
from gr_platform.events.features import ALWAYS_MS, FeatureFile, feature_files
from gr_platform.events.forget import forget
from gr_platform.events.times import EARLIEST_MS
from gr_platform.models.recipes import tiny
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.featured import with_features
from gr_platform.sequences.features import ItemFeatures, build_item_features
from gr_platform.sequences.sequentialize import sequentialize
from gr_platform.sequences.user_series import UserSeries, build_user_series
from kernels import pairwise_time_buckets

from .conftest import START_MS, crowd

Give = Callable[..., FeatureFile]


@pytest.fixture
def give(tmp_path: Path, home: Path) -> Give:
    """Return give(kind, name, columns, rows, **options) -> the landed file; ms after START_MS in a column event_ts."""

    def run(kind: str, name: str, columns: str, rows: list[Any], **options: Any) -> FeatureFile:
        names = (f"{kind}_id", *columns.split())
        table = dict(zip(names, (list(each) for each in zip(*rows, strict=True)), strict=True))
        if "event_ts" in table:
            table["event_ts"] = [START_MS + at for at in table["event_ts"]]
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
        wanted = WantedFeatures(kind=f"{kind}-features", dataset="log", **options)
        return import_features(tmp_path / f"{name}.parquet", wanted, home=home)

    return run


def texts(home: Path, dataset: SequenceDataset, item: int, times: list[int], name: str) -> list[Any]:
    """Return a property of an item (its id) at times (ms after START_MS)."""
    found = ItemFeatures.current(home, "log")
    indices = dataset.vocabulary.lookup([item] * len(times))
    return found.codes[name].texts(found.at(indices, START_MS + np.array(times))[name])


def merged(home: Path, dataset: SequenceDataset, user: int) -> list[Any]:
    """Return a user's merged history: an entry as (text, its time), an exposure as its time alone, ms after START_MS,
    and None for the time of what always held."""
    series = UserSeries.current(home, "log", dataset)
    row = np.array([dataset.find_user(user)])
    found = series.merged(row, dataset.gather(row, np.array([0]), dataset.lengths[row]))
    out = []
    for kind, value, time in zip(found.kinds.tolist(), found.values.tolist(), found.times.tolist(), strict=True):
        at = None if time == ALWAYS_MS else time - START_MS
        out.append((series.codes[series.names[kind - 1]].values[value - 1], at) if kind else at)
    return out


def test_a_property_without_a_time_is_found_at_every_time(make, home, give):
    dataset = make(crowd())
    landed = give("item", "items", "category price", [(500, "toys", 5), (501, None, 7)])
    assert (landed.entry.time_column, landed.entry.time_unit, landed.entry.num_rows) == (None, None, 2)
    assert texts(home, dataset, 500, [-START_MS - 10**13, -START_MS, 0, 10**12], "category") == ["toys"] * 4
    assert texts(home, dataset, 501, [0], "category") == [None]
    assert texts(home, dataset, 501, [0], "price") == ["7"]
    assert texts(home, dataset, 502, [0], "price") == [None]


def test_the_import_says_that_the_properties_hold_at_all_times_and_which_rows_do_not_count(make, home, tmp_path):
    dataset = make(crowd())
    path = tmp_path / "items.csv"
    path.write_text("item_id,category,price\n500,toys,1\n501,books,2\nx,,\n500,games,\n502,toys,4\n501,books,2\n")
    asked = Import(source=path, home=home, dry_run=False, named={"dataset": "log"}, kind="item-features")
    lines = list(report(asked))
    assert lines == [
        "items.csv imported: 6 rows of item-features in data set log",
        "  id           item_id",
        "  time         none: the properties hold at all times",
        "  properties   category, price",
        "  repeated     2 (rows with a later one of their id: the last one counts)",
        "  quarantined  invalid_item 1 (an item id that is not of the data set's type)",
    ]
    assert next(report(asked)).startswith("items.csv was imported before")
    assert texts(home, dataset, 500, [0], "category") == ["games"]
    assert texts(home, dataset, 500, [0], "price") == [None]  # a row is taken whole
    assert set(ItemFeatures.current(home, "log").codes["category"].values) == {"games", "books", "toys"}
    assert len(ItemFeatures.current(home, "log").items) == 3


def test_a_row_with_a_time_counts_from_then_on_and_ends_nothing_that_its_file_has_no_column_for(make, home, give):
    dataset = make(crowd())
    give("item", "always", "category price", [(500, "toys", 5), (501, "books", 7)])
    give("item", "prices", "event_ts price", [(500, 10, 6), (500, 20, None)])
    assert texts(home, dataset, 500, [0, 9, 10, 19, 20], "price") == ["5", "5", "6", "6", None]
    assert texts(home, dataset, 500, [0, 10, 20], "category") == ["toys"] * 3
    assert texts(home, dataset, 501, [0, 10], "price") == ["7", "7"]
    give("item", "brands", "brand", [(500, "Acme")])
    assert texts(home, dataset, 500, [0, 15], "brand") == ["Acme"] * 2
    assert texts(home, dataset, 500, [0, 15], "category") == ["toys"] * 2
    give("item", "corrected", "category", [(500, None), (501, "comics")])
    assert texts(home, dataset, 500, [0], "category") == [None]
    assert texts(home, dataset, 501, [0], "category") == ["comics"]


def test_files_with_and_without_times_equal_saying_everything_in_order(make, home, give):
    rng = random.Random(3)
    dataset = make(crowd())
    files = [("a b", False), ("b event_ts", True), ("a", False), ("a b event_ts", True), ("b", False)]
    said = []
    for sequence, (columns, timed) in enumerate(files):
        items = [item for item in range(500, 507) if rng.random() < 0.7] * (3 if timed else 1)
        draw = {
            "event_ts": lambda: rng.randrange(20),
            "a": lambda: rng.choice("pq"),
            "b": lambda: rng.choice(["x", None]),
        }
        rows = [(item, *(draw[name]() for name in columns.split())) for item in items]
        give("item", f"file-{sequence}", columns, rows)
        for place, (item, *cells) in enumerate(rows):
            row = dict(zip(columns.split(), cells, strict=True))
            said.append((row.pop("event_ts", -(10**14)), sequence, place, item, row))
    for item in range(500, 507):
        for at in range(-1, 20):
            known: dict[str, Any] = {}
            for when, _, _, other, row in sorted(said, key=lambda each: each[:3]):
                if other == item and when <= at:
                    known |= row
            for name in "ab":
                assert texts(home, dataset, item, [at], name) == [known.get(name)], (item, at, name)


def test_what_always_held_is_part_of_the_tables_as_of_any_moment_and_nothing_later_is(make, home, give):
    dataset = make(crowd())
    give("item", "always", "tags", [(500, "a|b"), (501, "b")])
    give("item", "later", "event_ts tags", [(500, 5, "planted")])
    config = replace(tiny("retrieval").model, item_features=("tags",))
    featured = with_features(home, "log", dataset, config)
    for as_of, times in (
        (-1, [ALWAYS_MS] * 2),
        (START_MS + 4, [ALWAYS_MS] * 2),
        (START_MS + 5, [ALWAYS_MS, START_MS + 5]),
    ):
        assert featured.feature_tables(config, as_of).item_times.tolist()[:2] == times


def test_events_of_any_year_are_as_long_after_what_always_held():
    years = torch.arange(EARLIEST_MS, EARLIEST_MS + 200 * 365 * 86_400_000, 30 * 86_400_000)
    assert len(pairwise_time_buckets(years, torch.tensor([ALWAYS_MS])).unique()) == 1


def test_side_information_leaves_the_sequences_as_they_are(make, home, give):
    before = make(crowd())
    give("item", "items", "category", [(500, "toys")])
    give("user", "users", "gender", [(90, "f")])
    build_item_features(home, "log")
    build_user_series(home, "log")
    result = sequentialize(home, "log")
    assert (result.reused, result.manifest.digest) == (True, before.digest)


def test_files_with_times_keep_their_meaning_and_what_they_are_made_of(make, home, give):
    dataset = make(crowd())
    landed = give("item", "items", "event_ts brand", [(500, 1, "a"), (500, 1, "b")])
    assert landed.entry.num_repeated == 0
    result = build_item_features(home, "log")
    assert result.manifest.spec["version"] == 1
    (spec,) = result.manifest.spec["files"]
    assert set(spec) == {
        "sha256", "landed_sha256", "sequence", "id_column", "time_column", "time_unit", "properties", "id_type",
        "time_zone",
    }  # fmt: skip
    entry = landed.path.with_suffix(".json")
    fields = json.loads(entry.read_text())
    del fields["num_repeated"]  # as a release before wrote it
    entry.write_text(json.dumps(fields))
    again = build_item_features(home, "log")
    assert (again.reused, again.manifest.digest) == (True, result.manifest.digest)
    give("item", "prices", "event_ts price", [(500, 5, 9)])
    assert texts(home, dataset, 500, [1, 5], "brand") == ["b", None]


def test_what_may_be_a_time_is_no_property_unless_the_user_says_so(make, home, give, tmp_path):
    dataset = make(crowd())
    said = (
        r"column 'Updated_At' of items.parquet may be the time .*--time-column Updated_At, or write --time-column none"
    )
    rows = [(500, 1_700_000_000, "a"), (501, 1_700_000_000, "b")]
    with pytest.raises(UserError, match=said):
        give("item", "items", "Updated_At brand", rows)
    with pytest.raises(UserError, match=r"column 'born' of items.parquet may be the time"):
        give("item", "items", "born brand", [(500, date(2020, 1, 1), "a")])
    with pytest.raises(UserError, match="has no column that is called like a time; it has item_id, brand: name one"):
        give("item", "items", "brand", [(500, "a")], time_unit="s")
    with pytest.raises(UserError, match="has no column 'when'"):
        give("item", "items", "brand", [(500, "a")], time_column="when")
    assert not (home / "landing" / "log" / "features").exists()
    landed = give("item", "items", "Updated_At brand", rows, time_column="none")
    assert sorted(landed.entry.properties) == ["brand", "updated_at"]
    assert texts(home, dataset, 501, [0], "brand") == ["b"]
    landed = give("item", "items", "Updated_At brand", rows, time_column="Updated_At")
    assert not landed.reused
    assert texts(home, dataset, 501, [-1, 0], "brand") == [None, "b"]
    assert len(feature_files(home, "log", "item-features")) == 1


def test_a_history_whose_time_nobody_named_is_refused(make, home, give):
    make(crowd())
    rows = [(500 + n % 2, n, f"price {n}") for n in range(10)]
    with pytest.raises(
        UserError, match=r"8 of 10 rows of items.parquet say something else than the last row of their it"
    ):
        give("item", "items", "step brand", rows)
    # The same said again and again is what a table made of a log looks like.
    assert give("item", "items", "brand", [(500 + n % 2, None) for n in range(10)]).entry.num_repeated == 8


def test_what_cannot_be_properties_of_all_times_is_refused(make, home, give, tmp_path):
    make(crowd())
    path = tmp_path / "items.csv"
    for text, said in (
        ("item_id,brand\n", "items.csv holds no rows"),
        ("item_id\n500\n", "has 0 columns beside id and time"),
        ("item_id,brand\nx,a\ny,b\n500,c\n", r"most rows of items.csv break a rule \(invalid_item 2"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            import_features(path, WantedFeatures(kind="item-features", dataset="log"), home=home)
    with pytest.raises(UserError, match=r"column 'item_id' of nested.parquet is a VARCHAR\[\], it cannot be an id"):
        give("item", "nested", "brand", [(["a"], "b")])


def test_what_always_held_of_users_comes_ahead_of_their_first_event(make, home, give):
    dataset = make(crowd())
    give("user", "users", "gender city", [(90, "f", "Rome"), (91, None, "Oslo"), (999, "m", "Bern")])
    give("user", "moves", "event_ts city", [(90, 10, "Rome"), (90, 20, "Bern"), (92, 0, "Kiel")])
    assert merged(home, dataset, 90) == [("Rome", None), ("f", None), 0, 10, ("Bern", 20), 20, 30]
    assert merged(home, dataset, 91) == [("Oslo", None), 0, 10, 20, 30]
    assert merged(home, dataset, 92) == [("Kiel", 0), 0, 10, 20, 30]


def test_of_several_files_without_times_the_last_that_says_something_of_a_user_counts(make, home, give):
    dataset = make(crowd())
    give("user", "first", "gender age", [(90, "f", 18), (91, "m", 25), (90, "f", 25)])
    give("user", "second", "age city", [(90, 35, "Rome"), (91, None, None)])
    # A number that every new table states anew is still no counter.
    for more in range(3):
        give("user", f"more-{more}", "age", [(user, user + more) for user in range(92, 100)])
    assert merged(home, dataset, 90)[:4] == [("35", None), ("f", None), ("Rome", None), 0]
    assert merged(home, dataset, 91)[:3] == [("25", None), ("m", None), 0]
    assert merged(home, dataset, 95)[:2] == [("97", None), 0]


def test_a_forgotten_user_has_nothing_that_always_held(make, home, give):
    dataset = make(crowd())
    landed = give("user", "users", "gender", [(90, "f"), (91, "m")])
    assert merged(home, dataset, 90)[0] == ("f", None)
    forget(home, "log", "90")
    assert pq.read_table(landed.path).to_pylist() == [{"user_id": None, "gender": None}, {"user_id": 91, "gender": "m"}]
    left = SequenceDataset.current(home, "log")
    assert merged(home, left, 91)[0] == ("m", None)
    assert len(UserSeries.current(home, "log", left).times) == 1

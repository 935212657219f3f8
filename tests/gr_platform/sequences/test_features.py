"""Side information of items: imported as it comes, joined as of the time of an event and never later."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from gr_platform import cli
from gr_platform.commands.importing import Import, report
from gr_platform.errors import UserError
from gr_platform.events.feature_import import WantedFeatures, import_features
from gr_platform.events.features import FeatureFile, feature_files
from gr_platform.sequences.codes import Codes
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.features import ItemFeatures, build_item_features

from .conftest import START_MS, crowd

Given = Callable[..., FeatureFile]


@pytest.fixture
def give(tmp_path: Path, home: Path) -> Given:
    """Return give(rows of (id, ms after START_MS, *properties), names, ...) -> the landed file of data set `log`."""

    def run(rows: list[Any], names: tuple[str, ...] = ("brand",), name: str = "items", **options: Any) -> FeatureFile:
        columns = ("item_id", "event_ts", *names)
        table = dict(zip(columns, (list(each) for each in zip(*rows, strict=True)), strict=True))
        table["event_ts"] = [None if at is None else START_MS + at for at in table["event_ts"]]
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table(table), path)
        wanted = WantedFeatures(kind="item-features", dataset="log", **options)
        return import_features(path, wanted, home=home)

    return run


def texts(home: Path, dataset: SequenceDataset, items: list[int], times: list[int], name: str = "brand") -> list[Any]:
    """Return the property of items (ids) at times (ms after START_MS)."""
    found = ItemFeatures.current(home, "log")
    indices = dataset.vocabulary.lookup(items)
    return found.codes[name].texts(found.at(indices, START_MS + np.array(times))[name])


def test_a_row_one_ms_after_the_event_is_never_seen(make, home, give):
    dataset = make(crowd())
    give([(500, 10, "old"), (500, 21, "planted"), (501, 20, "same ms")])
    assert texts(home, dataset, [500] * 4, [9, 10, 20, 21]) == [None, "old", "old", "planted"]
    assert texts(home, dataset, [501] * 2, [19, 20]) == [None, "same ms"]


def test_every_exposure_sees_the_newest_row_up_to_its_time(make, home, give):
    dataset = make([*crowd(), *((1, 500, "view", at) for at in range(0, 50, 10))])
    give([(500, at, f"price {at}") for at in range(5, 50, 10)])
    row = np.array([dataset.find_user(1)])
    block = dataset.gather(row, np.array([0]), dataset.lengths[row])
    found = ItemFeatures.current(home, "log")
    codes = found.at(block.items, block.times)["brand"]
    assert found.codes["brand"].texts(codes) == [None, "price 5", "price 15", "price 25", "price 35"]


moments = st.integers(0, 12)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 4), moments, st.integers(0, 3)), max_size=30),
    asked=st.lists(st.tuples(st.integers(0, 5), st.integers(-2, 14)), max_size=30),
)
def test_the_join_equals_looking_at_every_row(rows, asked):
    rows = sorted(rows, key=lambda row: row[:2])  # stable: at equal times in source order
    items, times, codes = (np.array([row[place] for row in rows], np.int64) for place in range(3))
    table = pa.table({"value": ["a", "b", "c"], "count": [1, 1, 1]})
    features = ItemFeatures(items, times, {"x": codes}, {"x": Codes(table)})
    expected = []
    for item, at in asked:
        seen = [code for other, when, code in rows if other == item and when <= at]
        expected.append(seen[-1] if seen else 0)
    wanted = np.array(asked, np.int64).reshape(-1, 2)
    found = features.at(wanted[:, 0], wanted[:, 1])["x"]
    assert found.tolist() == expected
    assert found.dtype == np.int64


def test_an_empty_cell_says_that_nothing_holds_any_more_and_the_last_of_equal_times_counts(make, home, give):
    dataset = make(crowd())
    give([(500, 1, "a", "x"), (500, 3, None, "y"), (500, 5, "b", None), (500, 5, "c", "z")], ("brand", "color"))
    assert texts(home, dataset, [500] * 3, [2, 4, 6]) == ["a", None, "c"]
    assert texts(home, dataset, [500] * 3, [2, 4, 6], "color") == ["x", "y", "z"]


def test_codes_go_on_file_by_file_as_if_all_had_come_at_once(make, home, give, tmp_path):
    dataset = make(crowd())
    give([(500, 9, "b"), (501, 2, "c"), (999, 1, "unsold")])
    first = ItemFeatures.current(home, "log").codes["brand"].values.tolist()
    assert first == ["unsold", "c", "b"]
    give([(500, 1, "a"), (500, 3, "b")], name="more")
    features = ItemFeatures.current(home, "log")
    assert features.codes["brand"].values.tolist() == [*first, "a"]
    assert features.codes["brand"].counts.tolist() == [1, 1, 2, 1]
    assert len(features.items) == 4  # of item 999 the data set has no event
    result = build_item_features(home, "log")
    assert result.reused
    assert texts(home, dataset, [500] * 3, [2, 5, 9]) == ["a", "b", "b"]
    for pointer in (home / "sequences" / "log").glob("item-features*"):
        pointer.unlink() if pointer.is_file() else pointer.rename(tmp_path / pointer.name)
    assert build_item_features(home, "log").manifest.digest == result.manifest.digest


def test_an_item_that_is_sold_later_has_its_earlier_side_information(make, home, give):
    make(crowd())
    give([(999, 1, "unsold"), (500, 1, "sold")])
    assert len(ItemFeatures.current(home, "log").items) == 1
    dataset = make([(90, 999, "view", 500)], "later")
    assert texts(home, dataset, [999, 500], [500, 500]) == ["unsold", "sold"]


def test_rows_that_break_a_rule_are_counted_by_name_and_never_joined(make, home, give):
    dataset = make(crowd())
    rows = [*((500 + n % 3, n, "ok") for n in range(6)), (None, 3, "a"), (501, None, "b"), (502, 10**12, "c")]
    landed = give([*rows, (501, -1_600_000_000_000, "d")])
    assert landed.entry.quarantined == {"null_item": 1, "null_time": 1, "time_before_1990": 1, "time_in_future": 1}
    assert landed.entry.num_rows == 10
    assert pq.read_metadata(landed.path).num_rows == 10
    assert set(texts(home, dataset, [500, 501, 502], [10**13] * 3)) == {"ok"}
    assert set(ItemFeatures.current(home, "log").codes["brand"].values) == {"ok"}


def test_a_text_file_lands_and_reads_as_a_parquet_file_does(make, home, tmp_path):
    dataset = make(crowd())
    path = tmp_path / "items.csv"
    path.write_text(
        f"asin,time,Brand,price\n500,{START_MS // 1000},Acme,9.90\n501,{START_MS // 1000 + 1},,1\nx,5,a,b\n"
    )
    named = {"dataset": "log", "item_column": "asin", "time_unit": "s", "user_column": None, "format": "auto"}
    lines = list(report(Import(source=path, home=home, dry_run=True, named=named, kind="item-features")))
    assert lines[0] == "items.csv would be imported: 3 rows of item-features in data set log"
    assert "invalid_item 1 (an item id that is not of the data set's type)" in lines[-1]
    assert feature_files(home, "log", "item-features") == []
    lines = list(report(Import(source=path, home=home, dry_run=False, named=named, kind="item-features")))
    assert lines[0] == "items.csv imported: 3 rows of item-features in data set log"
    assert lines[3].split() == ["properties", "brand,", "price"]
    assert texts(home, dataset, [500, 501, 501], [0, 999, 1000], "price") == ["9.90", None, "1"]
    assert texts(home, dataset, [501], [1000]) == [None]


def test_the_same_file_counts_once_and_another_meaning_replaces_it(make, home, give):
    make(crowd())
    rows = [(500, 1, "a"), (501, 2, "b")]
    assert not give(rows).reused
    assert give(rows, name="renamed").reused
    assert len(feature_files(home, "log", "item-features")) == 1
    with pytest.raises(UserError, match="unit ms would fit"):
        give(rows, time_unit="s")
    assert len(feature_files(home, "log", "item-features")) == 1


def test_what_cannot_be_side_information_is_refused_in_one_sentence(make, home, give, tmp_path):
    with pytest.raises(UserError, match="there is no data set 'log'"):
        give([(500, 1, "a")])
    make(crowd())
    with pytest.raises(UserError, match="has no item-features; run gr import FILE --as item-features first"):
        ItemFeatures.current(home, "log")
    with pytest.raises(UserError, match="has no column 'sku'; it has item_id, event_ts, brand: name one with --item-"):
        give([(500, 1, "a")], id_column="sku")
    with pytest.raises(UserError, match="has 0 columns beside id and time, must be 1 to 64"):
        give([(500, 1)], ())
    with pytest.raises(UserError, match=r"column 'the brand' of items.parquet cannot be the name of a property"):
        give([(500, 1, "a")], ("the brand",))
    with pytest.raises(UserError, match=r"column 'brand' of items.parquet is a VARCHAR\[\], not one value a row"):
        give([(500, 1, ["a"])])
    with pytest.raises(UserError, match=r"most rows of items.parquet break a rule \(invalid_item 2 "):
        give([("x", 1, "a"), ("y", 1, "a"), ("500", 1, "a")])
    with pytest.raises(UserError, match="--as is 'items', must be log, item-features or user-features"):
        list(report(Import(source=tmp_path, home=home, dry_run=False, named={"dataset": "log"}, kind="items")))
    named = {"dataset": "log", "value_column": "x"}
    with pytest.raises(UserError, match="--value-column is an option of logs; --as item-features does not take it"):
        list(report(Import(source=tmp_path, home=home, dry_run=False, named=named, kind="item-features")))
    assert not (home / "landing" / "log" / "features").exists()


def test_a_damaged_copy_or_entry_is_named(make, home, give):
    make(crowd())
    landed = give([(500, 1, "a")])
    landed.path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"the landed copy of items.parquet is missing or damaged; import the file"):
        ItemFeatures.current(home, "log")
    assert not give([(500, 1, "a")]).reused
    assert len(ItemFeatures.current(home, "log").items) == 1
    entry = landed.path.with_suffix(".json")
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"schema_version": 9}))
    with pytest.raises(UserError, match=r"features/item-features-\w+.json of data set log is damaged"):
        feature_files(home, "log", "item-features")


def test_a_page_that_cannot_be_read_is_refused_on_landing(make, home, tmp_path):
    make(crowd())
    path = tmp_path / "items.parquet"
    rows = {"item_id": list(range(9000)), "event_ts": [START_MS] * 9000, "brand": ["a"] * 9000}
    pq.write_table(pa.table(rows), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[4:600] = bytes(596)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"items.parquet cannot be read: .*; mend or fetch the file again"):
        import_features(path, WantedFeatures(kind="item-features", dataset="log"), home=home)
    assert not (home / "landing" / "log" / "features").exists()


def test_the_command_takes_side_information_and_logs(make, home, give, tmp_path, monkeypatch):
    make(crowd())
    give([(500, 1, "a")])
    monkeypatch.setenv("GR_HOME", str(home))
    command = ["import", str(tmp_path / "items.parquet"), "--as", "item-features", "--time-unit", "ms"]
    shown = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert shown.output.startswith("items.parquet was imported before: 1 rows of item-features in data set log")
    shown = CliRunner().invoke(cli.app, ["import", str(tmp_path / "log.parquet")], catch_exceptions=False)
    assert shown.output.startswith("log.parquet was imported before: 40 rows in data set log")

"""A data set opened for a model: the features that it names, what was known as of a moment, what is lacking."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr_platform.errors import UserError
from gr_platform.events.feature_import import WantedFeatures, import_features
from gr_platform.models.recipes import tiny
from gr_platform.sequences.featured import FeaturedDataset, with_features

from .conftest import START_MS, crowd


@pytest.fixture
def give(tmp_path, home):
    """Return give(kind, rows of (id, ms after START_MS, *values), *names): imported as side information of `log`."""

    def run(kind, rows, *names):
        path, columns = tmp_path / f"{kind}.parquet", (f"{kind.split('-')[0]}_id", "event_ts", *names)
        table = dict(zip(columns, (list(each) for each in zip(*rows, strict=True)), strict=True))
        table["event_ts"] = [START_MS + at for at in table["event_ts"]]
        pq.write_table(pa.table(table), path)
        import_features(path, WantedFeatures(kind=kind, dataset="log"), home=home)

    return run


def config(**names):
    return replace(tiny("retrieval").model, **names)


def test_a_data_set_is_itself_for_a_model_without_features(make, home):
    dataset = make(crowd())
    assert with_features(home, "log", dataset, config()) is dataset


def test_the_tables_hold_what_was_known_as_of_a_moment(make, home, give):
    dataset = make(crowd())
    rows = [(500, 1, "a|b", "x"), (500, 5, "a|b", "y"), (500, 9, "b", "y"), (501, 5, None, "z"), (501, 6, "late", "z")]
    give("item-features", rows, "tags", "brand")
    wanted = config(item_features=("tags",))
    found = with_features(home, "log", dataset, wanted)
    assert isinstance(found, FeaturedDataset)
    tables = found.feature_tables(wanted, START_MS + 5)
    of_500, of_501 = dataset.vocabulary.lookup([500, 501])
    assert tables.item_starts.tolist()[of_500 : of_500 + 2] == [0, 1]
    # The brand alone changed at 5, which no token that reads tags can tell.
    assert (tables.item_times - START_MS).tolist() == [1, 5]
    assert tables.item_codes.tolist() == [[1], [0]]
    assert len(tables.item_starts) == dataset.vocabulary.num_rows + 1
    assert tables.words["item_tags"].shape == (4, 2)  # append-only: values known later have their codes already
    assert of_501 > of_500
    whole = found.feature_tables(wanted, START_MS + 100)
    assert (whole.item_times - START_MS).tolist() == [1, 9, 5, 6]
    assert found.user_series is None
    assert found.digest == dataset.digest
    assert found.features_digest


def test_the_named_series_keep_their_entries_in_the_order_of_the_recipe(make, home, give):
    dataset = make(crowd())
    rows = [(90, 1, "Rome", "free", "f"), (90, 1, "Oslo", "free", "f"), (90, 7, "Oslo", "gold", "f")]
    give("user-features", [*rows, (95, 3, "Bern", "free", "m")], "city", "plan", "gender")
    wanted = config(user_features=("plan", "city"))
    series = with_features(home, "log", dataset, wanted).user_series
    assert series.names == ("plan", "city")
    said = []
    for user in (90, 91, 95):
        span = slice(*series.offsets[dataset.find_user(user) :][:2].tolist())
        each = zip(series.times[span].tolist(), series.kinds[span].tolist(), series.values[span].tolist(), strict=True)
        said.append([(at - START_MS, series.codes[series.names[kind - 1]].values[code - 1]) for at, kind, code in each])
    assert said == [[(1, "free"), (1, "Rome"), (1, "Oslo"), (7, "gold")], [], [(3, "free"), (3, "Bern")]]
    tables = with_features(home, "log", dataset, wanted).feature_tables(wanted, START_MS)
    assert set(tables.words) == {"user_plan", "user_city"}


def test_a_feature_that_is_lacking_is_named_with_those_that_are_there(make, home, give):
    dataset = make(crowd())
    with pytest.raises(UserError, match="data set log has no item-features; run gr import FILE --as item-features"):
        with_features(home, "log", dataset, config(item_features=("tags",)))
    with pytest.raises(UserError, match="data set log has no user-features; run gr import FILE --as user-features"):
        with_features(home, "log", dataset, config(user_features=("city",)))
    give("item-features", [(500, 1, "a", "b")], "tags", "brand")
    give("user-features", [(90, 1, "a")], "city")
    for names, said in (
        (
            {"item_features": ("tags", "colour")},
            "item feature 'colour', which data set log does not have; it has brand, t",
        ),
        ({"user_features": ("plan",)}, "user feature 'plan', which data set log does not have; it has city"),
        ({"context_features": ("device",)}, "context feature 'device', which data set log does not have; it has none"),
    ):
        with pytest.raises(UserError, match=f"the recipe names {said}"):
            with_features(home, "log", dataset, config(**names))


def test_an_item_that_the_vocabulary_got_later_has_no_row(make, home, give):
    dataset = make(crowd())
    give("item-features", [(500, 1, "a"), (999, 1, "b")], "tags")
    make([(90, 999, "view", 500)], "later")
    wanted = config(item_features=("tags",))
    tables = with_features(home, "log", dataset, wanted).feature_tables(wanted, START_MS + 1000)
    assert len(tables.item_times) == 1
    assert len(tables.item_starts) == dataset.vocabulary.num_rows + 1
    assert np.all(tables.item_codes.numpy() > 0)

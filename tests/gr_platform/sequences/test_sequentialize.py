import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file
from gr_platform.sequences import dataset as dataset_module
from gr_platform.sequences import exposures
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.sequentialize import sequentialize
from gr_platform.sequences.vocabulary import build_vocabulary

from .conftest import START_MS, crowd


def history(dataset, user):
    """Return a user's whole history as [(item id, action mask, ms after START_MS)]."""
    row = dataset.find_user(user)
    items, actions, times = dataset.history(row, int(dataset.lengths[row]))
    return list(zip(dataset.vocabulary.ids(items).tolist(), actions.tolist(), (times - START_MS).tolist(), strict=True))


def segment(home, at=0):
    """Return the folder of a segment of the current sequences."""
    made = storage.current(home / "sequences" / "log", "sequences")
    return made.parent / storage.read_manifest(made).facts["segments"][at]


def content(dataset):
    """Return everything a data set holds, comparable."""
    _, block = next(iter(dataset.blocks()))
    arrays = (dataset.user_ids, block.offsets, block.items, block.actions, block.times)
    context = {name: (codes.tolist(), dataset.codes[name].values.tolist()) for name, codes in block.context.items()}
    return [array.tolist() for array in arrays] + [dataset.vocabulary.item_ids.tolist(), context]


def test_rows_of_one_user_item_and_time_are_one_exposure(make):
    rows = [(1, 7, "view", 5), (1, 8, "view", 5), (1, 7, "buy", 5), (1, 7, "view", 6), (2, 7, "buy", 5)]
    dataset = make([*crowd(), *rows])
    assert dataset.declaration.actions == ("view", "buy")
    assert history(dataset, 1) == [(7, 3, 5), (8, 1, 5), (7, 1, 6)]
    assert history(dataset, 2) == [(7, 2, 5)]
    assert dataset.num_users == 12
    assert dataset.num_exposures == 44


def test_ties_keep_source_order_across_files(make):
    make([*crowd(), (1, 9, "view", 5), (1, 3, "view", 5), (1, 6, "view", 4)])
    dataset = make([*crowd(100), (1, 1, "view", 5), (1, 9, "buy", 5)], "later")
    assert history(dataset, 1) == [(6, 1, 4), (9, 3, 5), (3, 1, 5), (1, 1, 5)]


def test_what_is_read_is_a_copy_of_one_span_after_the_other(make):
    dataset = make(crowd())
    rows, starts, stops = np.array([3, 0, 3]), np.array([1, 0, 0]), np.array([3, 0, 4])
    found = dataset.gather(rows, starts, stops)
    whole = dataset.history(3, 4)
    for array, expected in zip((found.items, found.actions, found.times), whole, strict=True):
        assert array.dtype == np.int64
        assert array.flags.owndata
        assert array.tolist() == [*expected[1:3], *expected]
    assert found.offsets.tolist() == [0, 2, 2, 6]
    assert found.owner.tolist() == [0, 0, 2, 2, 2, 2]
    assert found.positions.tolist() == [0, 1, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="inside"):
        dataset.gather(rows, starts, stops + 1)


def test_blocks_are_all_users_once_and_no_larger_than_asked(make):
    dataset = make([*crowd(), *((1, item, "view", item) for item in range(9))])
    blocks = list(dataset.blocks(max_events=10))
    assert np.concatenate([rows for rows, _ in blocks]).tolist() == list(range(dataset.num_users))
    assert (
        np.concatenate([block.items for _, block in blocks]).tolist() == next(iter(dataset.blocks()))[1].items.tolist()
    )
    assert all(len(block.items) <= 10 for _, block in blocks)


@pytest.mark.parametrize("long_span", [0, 1 << 40])
def test_spans_across_record_batches_are_the_same_copied_either_way(make, monkeypatch, long_span):
    monkeypatch.setattr(exposures, "MAX_BATCH_USERS", 3)
    dataset = make([*crowd(), *((1, item, "view", item) for item in range(9))])
    monkeypatch.setattr(dataset_module, "LONG_SPAN", long_span)
    rows, starts, stops = np.array([9, 1, 0, 5, 1]), np.array([0, 2, 3, 1, 0]), np.array([4, 2, 9, 2, 4])
    found = dataset.gather(rows, starts, stops)
    expected = [dataset.history(row, stop)[0][start:] for row, start, stop in zip(rows, starts, stops, strict=True)]
    assert found.items.tolist() == np.concatenate(expected).tolist()
    assert np.diff(found.offsets).tolist() == (stops - starts).tolist()


def test_the_file_is_read_without_code_of_ours(make, home):
    make(crowd())
    made = storage.current(home / "sequences" / "log", "sequences")
    facts = storage.read_manifest(made, verify=True).facts
    folder = segment(home)
    table = pa.ipc.open_file(str(folder / "sequences.arrow")).read_all()
    assert table.column_names == ["user_id", "items", "actions", "times"]
    assert table.schema.field("items").type == pa.large_list(pa.int64())
    assert table["user_id"].to_pylist() == sorted(range(90, 100))
    assert (facts["num_users"], facts["num_exposures"], facts["max_length"]) == (10, 40, 4)
    expected = list(zip(table["user_id"].to_pylist(), table["items"].to_pylist(), strict=True))
    assert pl.read_ipc(folder / "sequences.arrow").select("user_id", "items").rows() == expected
    with duckdb.connect() as connection:
        connection.register("sequences", table)
        assert connection.sql("SELECT user_id, items FROM sequences").fetchall() == expected


def test_the_same_events_give_the_same_bytes_and_a_second_run_reuses_them(make, home, tmp_path):
    rows = [*crowd(), (1, 7, "view", 5), (1, 8, "buy", 5)]
    first = make(rows)
    assert sequentialize(home, "log").reused
    elsewhere = make(rows, home=tmp_path / "elsewhere")
    assert first.digest == elsewhere.digest
    more = make([*crowd(100)], "later")
    assert more.digest != first.digest


def test_batch_boundaries_depend_on_content_alone(make, home, monkeypatch):
    whole = make(crowd() + [(1, 700 + i % 50, "view", i) for i in range(500)] + [(200, 1, "view", 0)])
    monkeypatch.setattr(exposures, "MAX_BATCH_USERS", 3)
    monkeypatch.setattr(exposures, "MAX_BATCH_EVENTS", 9)
    folder = segment(home)
    files = set()
    for stream_rows in (1, 5, 100_000):
        monkeypatch.setattr(exposures, "STREAM_ROWS", stream_rows)
        (folder / "manifest.json").unlink()
        again = SequenceDataset.open(sequentialize(home, "log").folder)
        batches = pa.ipc.open_file(str(folder / "sequences.arrow"))
        sizes = [batches.get_batch(i).num_rows for i in range(batches.num_record_batches)]
        assert sizes == [1, 3, 3, 3, 2]
        files.add((folder / "sequences.arrow").read_bytes())
        assert content(whole) == content(again)
    assert len(files) == 1


def test_string_ids_and_unicode_come_through(make):
    rows = [(f"user {u}\u00e9", f"\u8336-{i % 3}", "view", i) for u in range(12) for i in range(4)]
    dataset = make(rows)
    assert history(dataset, "user 3\u00e9")[:2] == [("\u8336-0", 1, 0), ("\u8336-1", 1, 1)]
    assert dataset.user_ids[0] == "user 0\u00e9"
    with pytest.raises(UserError, match="has no user nobody"):
        dataset.find_user("nobody")


def test_find_user_takes_the_id_as_text_or_number(make):
    dataset = make(crowd())
    assert dataset.find_user(93) == dataset.find_user("93") == 3
    with pytest.raises(UserError, match="not an integer"):
        dataset.find_user("ann")
    for unknown in (5, 2**70):
        with pytest.raises(UserError, match="it has 10 users, such as 90, 91, 92"):
            dataset.find_user(unknown)


def test_history_beyond_the_end_is_refused(make):
    dataset = make(crowd())
    assert [len(part) for part in dataset.history(0, 2)] == [2, 2, 2]
    with pytest.raises(ValueError, match="4 exposures"):
        dataset.history(0, 5)


def test_unfinished_sequences_say_what_to_do(home, land):
    land(crowd())
    with pytest.raises(UserError, match="no vocabulary yet"):
        sequentialize(home, "log")
    build_vocabulary(home, "log")
    with pytest.raises(UserError, match="no sequences yet"):
        SequenceDataset.current(home, "log")
    sequentialize(home, "log")
    (segment(home) / "sequences.arrow").write_bytes(b"ARROW1")
    with pytest.raises(UserError, match="missing or damaged"):
        SequenceDataset.current(home, "log")
    assert not sequentialize(home, "log").reused
    assert SequenceDataset.current(home, "log").num_users == 10


def test_events_newer_than_the_vocabulary_are_not_dropped_silently(home, land):
    land(crowd())
    build_vocabulary(home, "log")
    land([*crowd(100), (1, 7, "view", 5)], "later")
    with pytest.raises(UserError, match="vocabulary is older than the events"):
        sequentialize(home, "log")


def test_a_worked_csv_example_runs_end_to_end(tmp_path, home):
    """The README's example: a shop's CSV with column names of its own."""
    lines = ["customer,product,event,time"]
    for customer in range(12):
        for step in range(5):
            lines.append(f"c{customer},p{(customer + step) % 8},view,2026-03-01T10:{step:02d}:00Z")
        lines.append(f"c{customer},p{customer % 8},purchase,2026-03-01T10:00:00Z")
    path = tmp_path / "shop.csv"
    path.write_text("\n".join(lines) + "\n")
    assert import_file(path, home=home).declaration.tasks == {"purchase": ("purchase",)}
    assert ingest(home, "shop").rows_kept == 72
    build_vocabulary(home, "shop")
    dataset = SequenceDataset.open(sequentialize(home, "shop").folder)
    assert (dataset.num_users, dataset.lengths.tolist()) == (12, [5] * 12)
    row = dataset.find_user("c3")
    assert dataset.history(row, 1)[1] == 3

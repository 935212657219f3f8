import hashlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_platform import storage
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file
from gr_platform.sequences.vocabulary import NUM_OOV, Vocabulary, build_vocabulary

from .conftest import crowd


def made(ids, active=None):
    count = pa.array(np.ones(len(ids), np.int64))
    mask = pa.array([True] * len(ids) if active is None else active, pa.bool_())
    kind = pa.int64() if all(isinstance(i, int) for i in ids) else pa.string()
    return Vocabulary(
        pa.table({"item_id": pa.array(ids, kind), "count": count, "first_ts": count, "last_ts": count, "active": mask})
    )


ids_int = st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, max_size=30)
ids_text = st.lists(st.text(st.characters(codec="utf-8"), max_size=6), unique=True, min_size=1, max_size=30)


@settings(deadline=None)
@given(st.one_of(ids_int, ids_text))
def test_lookup_and_ids_are_inverse(ids):
    vocabulary = made(ids)
    indices = vocabulary.lookup(ids)
    assert indices.tolist() == list(range(vocabulary.first_item, vocabulary.num_rows))
    assert vocabulary.ids(indices).tolist() == ids


@settings(deadline=None)
@given(ids_int, st.integers(-(2**63), 2**63 - 1))
def test_an_unknown_id_gets_a_stable_bucket(ids, unknown):
    vocabulary = made([i for i in ids if i != unknown])
    [index] = vocabulary.lookup([unknown])
    expected = 1 + int.from_bytes(hashlib.blake2b(str(unknown).encode(), digest_size=8).digest(), "little") % NUM_OOV
    assert index == expected
    assert 1 <= index <= NUM_OOV


def test_rows_before_the_items_are_never_active_and_have_no_id():
    vocabulary = made([7, 5, 9], active=[True, False, True])
    assert vocabulary.active.tolist() == [False] * 5 + [True, False, True]
    assert (vocabulary.num_items, vocabulary.num_rows, vocabulary.first_item) == (3, 8, 5)
    for bad in (0, NUM_OOV, 8, -1):
        with pytest.raises(ValueError, match="to have an item id"):
            vocabulary.ids([bad])
    assert vocabulary.lookup(np.zeros(0, np.int64)).tolist() == []


def test_ids_of_the_wrong_type_are_refused_and_bytes_are_text():
    with pytest.raises(ValueError, match="int64"):
        made([1]).lookup([1.0])
    with pytest.raises(ValueError, match="int64"):
        made([1]).lookup(["1"])
    text = made(["t\u00e9", "x"])
    assert text.lookup(np.array(["t\u00e9".encode(), b"x"], dtype=object)).tolist() == [5, 6]
    assert 1 <= text.lookup(np.array([b"\xff"], dtype=object))[0] <= NUM_OOV
    with pytest.raises(ValueError, match="strings"):
        text.lookup([5])


def test_the_digest_names_the_meaning_of_the_indices():
    assert made([1, 2]).digest == made([1, 2], active=[False, True]).digest
    different = [made(ids).digest for ids in ([1, 2], [2, 1], [1], ["1", "2"], ["12"], ["1", "", "2"])]
    assert len(set(different)) == len(different)


def test_items_are_ordered_by_first_appearance_then_id(home, land):
    land([*crowd(50), (1, 30, "view", 5), (1, 20, "view", 5), (2, 40, "view", 1), (2, 20, "view", 90)])
    result = build_vocabulary(home, "log")
    vocabulary = Vocabulary.load(result.folder)
    assert vocabulary.item_ids[:3].tolist() == [40, 20, 30]
    assert vocabulary.counts[:3].tolist() == [1, 2, 1]
    assert vocabulary.last_ts[1] - vocabulary.first_ts[1] == 85
    assert result.manifest.facts["vocabulary_digest"] == vocabulary.digest
    again = build_vocabulary(home, "log")
    assert again.reused
    assert again.folder == result.folder == storage.current(home / "sequences" / "log", "vocabulary")


def test_ids_that_change_their_type_start_a_new_vocabulary(home, land):
    land(crowd())
    assert not Vocabulary.load(build_vocabulary(home, "log").folder).is_string
    (home / "landing" / "log").rename(home / "landing" / "before")
    land([(user, f"item {item}", action, at) for user, item, action, at in crowd()], name="text")
    vocabulary = Vocabulary.load(build_vocabulary(home, "log").folder)
    assert vocabulary.is_string
    assert vocabulary.num_items == 7


days = st.lists(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 40), st.just("view"), st.integers(0, 50)), min_size=1, max_size=20
    ),
    min_size=2,
    max_size=3,
)


@settings(max_examples=3, deadline=None)
@given(days=days)
def test_building_file_by_file_equals_replaying_all(tmp_path_factory, days):
    folder = tmp_path_factory.mktemp("days")
    digests = []
    for incremental in (True, False):
        home = folder / f"incremental-{incremental}"
        known: list[int] = []
        for number, day in enumerate(days):
            rows = [*crowd(1000 * number), *day]
            columns = dict(zip(("user_id", "item_id", "action", "event_ts"), zip(*rows, strict=True), strict=True))
            columns["event_ts"] = [1_700_000_000_000 + t for t in columns["event_ts"]]
            path = folder / f"{number}.parquet"
            pq.write_table(pa.table(columns), path)
            # Dates run backwards: the order in which files came in decides, not the date they are filed under.
            import_file(path, home=home, dataset="log", ingest_date=f"2026-01-{20 - number % 2:02d}")
            if incremental:
                ingest(home, "log")
                ids = Vocabulary.load(build_vocabulary(home, "log").folder).item_ids.tolist()
                assert ids[: len(known)] == known
                known = ids
        ingest(home, "log")
        result = build_vocabulary(home, "log")
        digests.append((Vocabulary.load(result.folder).digest, result.manifest.files, result.folder.name))
    assert digests[0] == digests[1]


def test_an_item_that_vanishes_keeps_its_index_and_becomes_inactive(home, land):
    land([*crowd(), (1, 30, "view", -5)], "first", ingest_date="2026-01-01")
    land([*crowd(100), (1, 31, "view", 105)], "second", ingest_date="2026-01-02")
    before = Vocabulary.load(build_vocabulary(home, "log").folder)
    entry = min((home / "landing" / "log").glob("*.json"), key=lambda p: '"sequence": 0' not in p.read_text())
    entry.unlink()
    ingest(home, "log")
    after = Vocabulary.load(build_vocabulary(home, "log").folder)
    assert after.item_ids.tolist() == before.item_ids.tolist()
    [gone] = after.lookup([30])
    assert not after.active[gone]
    assert after.counts[gone - after.first_item] == 0
    assert after.first_ts[gone - after.first_item] == before.first_ts[gone - before.first_item]
    assert after.active.sum() == after.num_items - 1


def test_reading_a_vocabulary_needs_neither_duckdb_nor_polars_nor_torch():
    code = (
        "import sys, gr_platform.sequences.vocabulary, gr_platform.events.declaration; "
        "sys.exit(any(m in sys.modules for m in ('duckdb', 'polars', 'torch', 'pandas')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

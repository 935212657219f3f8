"""Declared context columns reach the sequences as codes that keep their meaning."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file
from gr_platform.sequences import codes as module
from gr_platform.sequences.codes import Codes, appended
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.sequentialize import sequentialize
from gr_platform.sequences.vocabulary import build_vocabulary

from .conftest import START_MS, crowd
from .test_sequentialize import content, segment

Make = Callable[..., SequenceDataset]


@pytest.fixture
def make(tmp_path: Path, home: Path) -> Make:
    """Return make(rows of (user, item, action, ms, device, shop), name, context) -> the sequences of data set `log`."""

    def run(rows: list[Any], name: str = "log", context: tuple[str, ...] = ("device",), **options: Any) -> Any:
        columns = ("user_id", "item_id", "action", "event_ts", "device", "shop")
        table = dict(zip(columns, (list(each) for each in zip(*rows, strict=True)), strict=True))
        table["event_ts"] = [START_MS + at for at in table["event_ts"]]
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
        declared = ['name = "log"', 'actions = ["view", "buy"]', 'positives = ["view", "buy"]', 'time_unit = "ms"']
        declared += [f"context = [{', '.join(map(repr, context))}]", "[columns]"]
        declared += [f"{each} = '{each}'" for each in columns[:4]]
        (tmp_path / "log.toml").write_text("\n".join(declared))
        import_file(tmp_path / f"{name}.parquet", home=home, declaration=str(tmp_path / "log.toml"), **options)
        ingest(home, "log")
        build_vocabulary(home, "log")
        return SequenceDataset.open(sequentialize(home, "log").folder)

    return run


def people(first_ms: int = 0, device: str | None = None) -> list[Any]:
    return [(*row, device, None) for row in crowd(first_ms)]


def context_of(dataset: SequenceDataset, user: int, name: str = "device") -> list[str | None]:
    row = np.array([dataset.find_user(user)])
    return dataset.codes[name].texts(dataset.gather(row, np.array([0]), dataset.lengths[row]).context[name])


def test_an_exposure_has_the_context_of_its_first_row(make):
    rows = [(1, 7, "view", 5, "web", None), (1, 7, "buy", 5, "app", None), (1, 8, "view", 5, None, None)]
    dataset = make([*people(), *rows, (1, 7, "view", 6, "app", None)])
    assert context_of(dataset, 1) == ["web", None, "app"]
    assert context_of(dataset, 90) == [None] * 4


def test_codes_are_given_in_the_order_of_landed_file_time_and_value(make):
    make(
        [*people(50, "late"), (1, 7, "view", 9, "b", None), (2, 7, "view", 9, "a", None), (1, 7, "view", 3, "z", None)]
    )
    dataset = make([*people(0, "early"), (1, 9, "buy", 9, "b", None)], "later")
    assert dataset.codes["device"].values.tolist() == ["z", "a", "b", "late", "early"]
    assert dataset.codes["device"].counts.tolist() == [1, 1, 2, 40, 40]


def test_a_value_that_vanishes_keeps_its_code(make, home):
    make([*people(), (1, 7, "view", 5, "web", None), (1, 7, "view", 6, "app", None)], "first")
    before = make([*people(100, "tv"), (1, 7, "view", 107, "app", None)], "second", ingest_date="2026-01-02")
    assert before.codes["device"].values.tolist() == ["web", "app", "tv"]
    next(path for path in (home / "landing" / "log").glob("*.json") if '"sequence": 0' in path.read_text()).unlink()
    ingest(home, "log")
    build_vocabulary(home, "log")
    after = SequenceDataset.open(sequentialize(home, "log").folder)
    assert after.codes["device"].values.tolist() == ["web", "app", "tv"]
    assert after.codes["device"].counts.tolist() == [0, 1, 40]
    assert context_of(after, 1) == ["app"]


def test_another_context_column_makes_the_segments_again_and_keeps_the_codes_there_were(make, home):
    rows = [*people(0, "web"), (1, 7, "view", 5, "app", "north"), (1, 8, "view", 6, None, "south")]
    first = make(rows)
    folder = segment(home)
    second = make([*people(100, "tv")], "later", context=("device", "shop"))
    assert segment(home) != folder
    assert second.codes["device"].values.tolist()[:2] == first.codes["device"].values.tolist()
    assert context_of(second, 1, "shop") == ["north", "south"]
    assert context_of(second, 1) == ["app", None]
    assert list(second.gather(np.array([0]), np.array([0]), np.array([1])).context) == ["device", "shop"]


def test_what_is_gathered_is_the_codes_of_the_spans_asked_for(make):
    rows = [(1, item, "view", item, f"d{item % 3}", None) for item in range(30)]
    dataset = make([*people(), *rows])
    later = make([*people(100), (1, 5, "view", 500, "d9", None), (90, 5, "view", 500, "d9", None)], "more")
    for each, length in ((dataset, 30), (later, 31)):
        row = np.array([each.find_user(1)])
        found = each.gather(np.repeat(row, 2), np.array([3, 20]), np.array([7, length])).context["device"]
        assert found.dtype == np.int64
        whole = context_of(each, 1)
        assert each.codes["device"].texts(found) == [*whole[3:7], *whole[20:length]]
    assert context_of(later, 90)[-1] == "d9"


def test_a_data_set_without_context_names_none_anywhere(make, home):
    dataset = make(people(), context=())
    folder = segment(home)
    assert pa.ipc.open_file(str(folder / "sequences.arrow")).schema.names == ["user_id", "items", "actions", "times"]
    vocabulary = storage.read_manifest(storage.current(folder.parent, "vocabulary"))
    for manifest in (storage.read_manifest(folder), vocabulary):
        assert "context" not in manifest.spec
        assert not any(name.startswith("context") for name in manifest.files)
    assert "num_values" not in vocabulary.facts
    assert content(dataset)[-1] == {}
    assert dataset.gather(np.array([0]), np.array([0]), np.array([2])).context == {}


def test_a_column_that_is_no_category_is_refused_in_one_sentence(make, monkeypatch):
    monkeypatch.setattr(module, "MAX_VALUES", 3)
    with pytest.raises(UserError, match="column 'device' holds 4 different values, at most 3 are kept apart"):
        make([*people(), *((1, 7, "view", at, f"session {at}", None) for at in range(4))])


def test_lookup_knows_every_value_and_nothing_else():
    table = pa.table({"value": ["b", "", "a"], "count": [1, 2, 3]})
    codes = Codes(appended(table, None, "x"))
    texts = pa.array(["a", None, "b", "?", "", "a"])
    assert codes.lookup(texts).tolist() == [3, 0, 1, 0, 2, 3]
    assert codes.lookup(texts.dictionary_encode()).tolist() == [3, 0, 1, 0, 2, 3]
    assert codes.lookup(pa.nulls(2, pa.string())).tolist() == [0, 0]
    assert codes.lookup(pa.array([], pa.string())).tolist() == []
    more = Codes(appended(pa.table({"value": ["c", "b"], "count": [5, 6]}), codes, "x"))
    assert (more.values.tolist(), more.counts.tolist()) == (["b", "", "a", "c"], [6, 0, 0, 5])
    assert more.digest_of_first(3) == codes.digest != more.digest


def test_codes_that_began_afresh_make_the_segments_again(make, home):
    make([*people(0, "web"), (1, 7, "view", 5, "web", None)], "first")
    make([*people(100, "tv"), (1, 7, "view", 105, "app", None)], "second", ingest_date="2026-01-02")
    next(path for path in (home / "landing" / "log").glob("*.json") if '"sequence": 0' in path.read_text()).unlink()
    ingest(home, "log")
    made = []
    for _ in range(2):
        build_vocabulary(home, "log")
        made.append(SequenceDataset.open(sequentialize(home, "log").folder))
        (home / "sequences" / "log" / "vocabulary.current").unlink()
    assert [each.codes["device"].values.tolist() for each in made] == [["web", "tv", "app"], ["tv", "app"]]
    assert made[0].vocabulary.digest == made[1].vocabulary.digest
    assert [context_of(each, 1) for each in made] == [["app"], ["app"]]
    assert [context_of(each, 90) for each in made] == [["tv"] * 4] * 2

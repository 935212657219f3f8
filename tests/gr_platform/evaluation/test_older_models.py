"""A model that is older than the data set is judged as it would be served: what came later it cannot know."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.evaluation import protocols
from gr_platform.evaluation.evaluate import evaluate_current, evaluate_run, trained_until
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.sequentialize import sequentialize
from gr_platform.sequences.time_split import DAY_MS, TimeSplit, newest_split
from gr_platform.sequences.vocabulary import Vocabulary, build_vocabulary
from gr_platform.training.loop import train_model

START = 1_700_006_400_000  # 2023-11-15T00:00Z
DS = "days"


def land(home: Path, folder: Path, days: range, num_items: int) -> None:
    """Land a log in which 30 users walk round a circle of items, three steps a day."""
    rows = ["user_id,item_id,action,timestamp"]
    for day in days:
        for user in range(30):
            for step in range(3):
                item = 100 + (user * 5 + day * 3 + step) % num_items
                rows.append(f"{user},{item},view,{START + day * DAY_MS + step * 3_600_000 + user}")
    file = folder / f"{days.start}.csv"
    file.write_text("\n".join(rows) + "\n")
    import_file(file, home=home, dataset=DS, ingest_date=f"2024-01-{days.start + 1:02d}")
    ingest(home, DS)
    build_vocabulary(home, DS)
    sequentialize(home, DS)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Return (home, folder of a model by time of the first ten days): two days and five items have come since."""
    home = tmp_path_factory.mktemp("grown")
    land(home, home, range(10), 15)
    split = newest_split(SequenceDataset.current(home, DS), days=1, min_users=10)
    result = train_model(home, DS, "retrieval", "tiny", split=split, progress=False)
    land(home, home, range(10, 12), 20)
    return home, result.folder


def test_the_newest_split_holds_out_whole_days_and_widens_until_enough_users_act(grown):
    home, _ = grown
    dataset = SequenceDataset.current(home, DS)
    split = newest_split(dataset, days=1, min_users=30)
    assert (split.end - START) / DAY_MS == 12
    assert (split.end - split.cut, split.cut - split.validation_cut) == (DAY_MS, DAY_MS)
    assert len(split.window(dataset).targets) == 30 * 3
    with pytest.raises(UserError, match="too short to hold out its end"):
        newest_split(dataset, days=1, min_users=31)


def test_a_model_by_time_learns_from_nothing_of_its_window_and_says_until_when(grown):
    home, folder = grown
    dataset = SequenceDataset.current(home, DS)
    spec = storage.read_manifest(folder).spec
    assert trained_until(dataset, folder) < spec["split"]["cut"]
    # Without a refit it learned from what is before the validation days alone.
    assert trained_until(dataset, folder) < spec["split"]["validation_cut"]


def test_an_older_model_is_asked_with_the_items_that_it_knows(grown):
    home, folder = grown
    dataset = SequenceDataset.current(home, DS)
    result = evaluate_run(home, DS, folder, newest_split(dataset, days=1, min_users=10))
    table = pq.read_table(result.folder / "retrieval.parquet")
    first_new = dataset.vocabulary.first_item + 15
    is_new = table["item"].to_numpy() >= first_new
    assert 0 < is_new.sum() < len(table)
    assert table["unreachable"].to_numpy()[is_new].all()
    assert not table["unreachable"].to_numpy()[~is_new].any()
    assert result.manifest.facts["catalogue"]["num_items"] <= 15
    assert result.manifest.facts["retrieval"]["hr_at_10"] > 0


def test_an_item_that_came_later_has_the_row_that_serving_gives_it(grown):
    home, _ = grown
    dataset = SequenceDataset.current(home, DS)
    folder = storage.current(home / "sequences" / DS, "vocabulary")
    older = Vocabulary(pq.read_table(folder / "vocabulary.parquet").slice(0, 15))
    rows = protocols.rows_known(dataset, older.num_rows)
    assert rows[older.first_item :].tolist() == older.lookup(dataset.vocabulary.item_ids).tolist()
    assert rows[: older.first_item].tolist() == list(range(older.first_item))
    assert protocols.rows_known(dataset, dataset.vocabulary.num_rows) is None


def test_a_window_that_a_model_has_seen_is_refused(grown):
    home, folder = grown
    dataset = SequenceDataset.current(home, DS)
    until = trained_until(dataset, folder)
    cut = until // DAY_MS * DAY_MS
    seen = TimeSplit(validation_cut=cut - DAY_MS, cut=cut, end=cut + DAY_MS)
    with pytest.raises(RuntimeError, match=r"max\(train event_ts\) must be before it"):
        evaluate_run(home, DS, folder, seen)


def test_its_own_split_is_what_a_model_by_time_is_judged_on(tmp_path):
    land(tmp_path, tmp_path, range(8), 12)
    dataset = SequenceDataset.current(tmp_path, DS)
    split = newest_split(dataset, days=2, min_users=10)
    made = train_model(tmp_path, DS, "retrieval", "tiny", split=split, progress=False)
    again = train_model(tmp_path, DS, "retrieval", "tiny", split=split, progress=False)
    assert again.reused
    facts = evaluate_current(tmp_path, DS).manifest.facts
    assert facts["retrieval"]["num_targets"] == 30 * 3 * 2
    assert facts["retrieval"]["num_users"] == 30
    other = train_model(tmp_path, DS, "retrieval", "tiny", progress=False)
    assert other.folder != made.folder
    assert evaluate_run(tmp_path, DS, other.folder).manifest.facts["retrieval"]["num_targets"] == 30


def test_a_refit_learns_from_the_validation_days_and_not_from_the_window(tmp_path):
    from gr_platform.models.recipes import tiny

    land(tmp_path, tmp_path, range(8), 12)
    dataset = SequenceDataset.current(tmp_path, DS)
    split = newest_split(dataset, days=1, min_users=10)
    recipe = tiny("retrieval").with_training(refit=True, max_epochs=1)
    made = train_model(tmp_path, DS, "retrieval", recipe, split=split, progress=False)
    assert split.validation_cut <= trained_until(dataset, made.folder) < split.cut
    ends = split.window(dataset).ends
    assert int(np.sum(ends)) == 30 * 3 * 7

"""The real thing: ML-1M against the published figures; needs GR_TEST_DATA."""

import numpy as np
import pytest

from gr_platform import settings
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file, titles
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.sequentialize import sequentialize
from gr_platform.sequences.splits import check_no_leak, describe_targets, target_positions, train_ends
from gr_platform.sequences.vocabulary import build_vocabulary

DATA = settings.test_data()
pytestmark = pytest.mark.skipif(DATA is None, reason="needs the real data sets: set GR_TEST_DATA")


@pytest.fixture(scope="module")
def ml_1m(tmp_path_factory):
    assert DATA is not None
    home = tmp_path_factory.mktemp("home")
    import_file(DATA / "ml-1m" / "ratings.parquet", home=home, format="movielens")
    result = ingest(home, "ml-1m")
    build_vocabulary(home, "ml-1m")
    return home, result, SequenceDataset.open(sequentialize(home, "ml-1m").folder)


def test_counts_are_the_published_ones(ml_1m):
    home, result, dataset = ml_1m
    assert result.quarantined == {"null_time": 279}
    assert (result.rows_in, result.rows_kept, result.duplicates) == (1_000_209, 999_930, 0)
    assert (dataset.num_users, dataset.num_exposures, dataset.vocabulary.num_items) == (6_040, 999_930, 3_706)
    assert titles(home, "ml-1m")[1] == "Toy Story (1995)"
    assert check_no_leak(dataset) == []
    assert describe_targets(dataset)["test"] == {"targets": 6_040, "ties": 2_544, "repeats": 0}


def test_popularity_has_its_known_hit_rate(ml_1m):
    """HR@10 .0364, leave-one-out, history filtered, whole catalogue."""
    _, _, dataset = ml_1m
    rows, positions = target_positions(dataset.lengths, "test")
    _, trained = next(dataset.blocks(ends=train_ends(dataset.lengths) + 1))
    counts = np.bincount(trained.items, minlength=dataset.vocabulary.num_rows)
    assert len(trained) == dataset.num_users
    hits = 0
    for row, position in zip(rows, positions, strict=True):
        scores = counts.copy()
        items, _, _ = dataset.history(row, position)
        scores[items] = -1
        hits += (scores > scores[dataset.at([row], [position]).items[0]]).sum() < 10
    assert hits / len(rows) == pytest.approx(0.0364, abs=0.0006)

"""Baselines on MovieLens-1M have the figures that are published of them, which shows that the protocol is theirs."""

from pathlib import Path

import numpy as np
import pytest

from gr_platform import settings
from gr_platform.evaluation.popularity import train_counts
from gr_platform.evaluation.protocols import rank_by_cooccurrence, rank_by_popularity, retrieval_facts
from gr_platform.evaluation.ranks import rank_targets
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.sequentialize import sequentialize
from gr_platform.sequences.splits import leave_one_out
from gr_platform.sequences.vocabulary import build_vocabulary

DATA = settings.test_data()
PUBLISHED = {"hr_at_10": 0.0364, "hr_at_50": 0.1396, "hr_at_200": 0.3414, "ndcg_at_10": 0.0179}

pytestmark = pytest.mark.skipif(DATA is None, reason="needs the real data sets: set GR_TEST_DATA")


@pytest.fixture(scope="module")
def ml_1m(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    assert DATA is not None
    home: Path = tmp_path_factory.mktemp("home")
    import_file(DATA / "ml-1m/ratings.parquet", home=home, declaration="ml-1m")
    ingest(home, "ml-1m")
    build_vocabulary(home, "ml-1m")
    return SequenceDataset.open(sequentialize(home, "ml-1m").folder)


def test_popularity_has_the_published_figures_once_ties_are_broken_as_there(ml_1m: SequenceDataset) -> None:
    """Counts of everything but the test item. Equally frequent items: the one that occurs first goes first, users in
    order of their ids."""
    held = leave_one_out(ml_1m, "test", refit=True)
    counts = train_counts(ml_1m, held.ends).astype(np.float64)
    items = np.concatenate([block.items for _, block in ml_1m.blocks()])
    first_seen = np.full(len(counts), len(items))
    np.minimum.at(first_seen, items, np.arange(len(items)))
    scores = counts - first_seen / (2 * len(items))
    published = rank_targets(
        ml_1m, held.targets, lambda begin, end: np.tile(scores, (end - begin, 1)), exclude_seen=True
    )
    facts = retrieval_facts(published)
    assert {name: round(facts[name], 4) for name in PUBLISHED} == PUBLISHED
    # Ours counts a tie against the baseline, which costs it at most what ties there are.
    ours = rank_by_popularity(ml_1m, held)
    assert (ours.ranks >= published.ranks).all()
    assert (ours.ranks == published.ranks)[~ours.tied].all()
    facts = retrieval_facts(ours)
    assert all(PUBLISHED[name] - 0.001 < facts[name] <= PUBLISHED[name] + 0.00005 for name in PUBLISHED)


def test_cooccurrence_is_far_above_popularity(ml_1m: SequenceDataset) -> None:
    facts = retrieval_facts(rank_by_cooccurrence(ml_1m, leave_one_out(ml_1m, "validation")))
    assert facts["hr_at_10"] > 0.27
    assert facts["ndcg_at_10"] > 0.15

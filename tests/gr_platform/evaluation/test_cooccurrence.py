import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_platform.evaluation import cooccurrence
from gr_platform.evaluation.cooccurrence import Cooccurrence, CooccurrenceConfig, similarities
from gr_platform.evaluation.popularity import train_counts
from gr_platform.evaluation.protocols import rank_by_cooccurrence, rank_by_popularity, retrieval_facts
from gr_platform.sequences.splits import Targets, leave_one_out, train_ends

FIRST = 5


def walk(*items):
    return [(item, 1, 1000 * step) for step, item in enumerate(items)]


def similar(dataset, ends, **settings):
    return similarities(dataset, ends, train_counts(dataset, ends), CooccurrenceConfig(**settings)).toarray()


def test_similarities_equal_a_table_computed_by_hand(make_dataset):
    # training parts [0, 1, 2] and [0, 1, 0]; within two exposures: 0>1, 1>2, 0>2 and 0>1, 1>0, 0>0
    dataset = make_dataset([walk(0, 1, 2, 3, 3), walk(0, 1, 0, 3, 3)], 4)
    found = similar(dataset, train_ends(dataset.lengths), window=2)[FIRST:, FIRST:]
    # items 0, 1, 2 occur 3, 2 and 1 times
    expected = np.zeros((4, 4))
    expected[0] = [1 / 3, 2 / np.sqrt(6), 1 / np.sqrt(3), 0]
    expected[1] = [1 / np.sqrt(6), 0, 1 / np.sqrt(2), 0]
    np.testing.assert_allclose(found, expected)


def test_scores_weigh_the_last_items_by_age(make_dataset):
    dataset = make_dataset([walk(0, 1, 2, 3, 3), walk(0, 1, 0, 3, 3)], 4)
    config = CooccurrenceConfig(window=2, num_recent=2, decay=0.5)
    baseline = Cooccurrence(dataset, train_ends(dataset.lengths), config)
    table = baseline.similar.toarray()
    one = np.zeros(2, np.int64)
    known = np.array([2, 0])
    found = baseline.scores(Targets(rows=one, positions=known, known=known))
    # the first asks with [0, 1], the second with nothing
    np.testing.assert_allclose(found[0], table[FIRST + 1] + 0.5 * table[FIRST], atol=1e-8)
    np.testing.assert_allclose(found[1], 0, atol=1e-8)
    assert found[1].argmax() == FIRST


def test_held_out_exposures_are_not_counted(make_dataset):
    dataset = make_dataset([walk(0, 1, 2, 3)], 4)
    held = leave_one_out(dataset, "test")
    assert similar(dataset, held.ends)[FIRST:, FIRST:].nonzero() == ([0], [1])
    refit = similar(dataset, leave_one_out(dataset, "test", refit=True).ends)[FIRST:, FIRST:]
    assert not refit[:, 3].any()
    assert refit[1, 2] > 0


users = st.lists(st.lists(st.integers(0, 5), max_size=12).map(lambda items: walk(*items)), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(users, st.integers(1, 4), st.integers(1, 3), st.integers(1, 30))
def test_memory_limits_change_nothing(make_dataset, users, window, neighbours, max_pairs):
    """Against pairs counted one by one, and against other ranges of items."""
    dataset = make_dataset(users, 6)
    expected = np.zeros((11, 11))
    counts = np.zeros(11)
    for user in users:
        items = [FIRST + item for item, _, _ in user]
        for at, item in enumerate(items):
            counts[item] += 1
            for then in items[at + 1 : at + 1 + window]:
                expected[item, then] += 1
    expected /= np.sqrt(np.maximum(np.outer(counts, counts), 1))
    found = similar(dataset, dataset.lengths, window=window, neighbours=50)
    np.testing.assert_allclose(found, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cooccurrence, "MAX_PAIRS", max_pairs)
        np.testing.assert_array_equal(similar(dataset, dataset.lengths, window=window, neighbours=50), found)
    few = similar(dataset, dataset.lengths, window=window, neighbours=neighbours)
    np.testing.assert_allclose(np.sort(few, axis=1)[:, -neighbours:], np.sort(found, axis=1)[:, -neighbours:])
    assert (np.count_nonzero(few, axis=1) <= neighbours).all()


def test_it_finds_what_follows_what_where_popularity_cannot(cycle_dataset):
    held = leave_one_out(cycle_dataset, "test")
    ours, popular = (retrieval_facts(rank(cycle_dataset, held)) for rank in (rank_by_cooccurrence, rank_by_popularity))
    assert ours["hr_at_1"] > 0.9 > 0.3 > popular["hr_at_1"]


@pytest.mark.parametrize(("name", "value"), [("window", 0), ("neighbours", 0), ("num_recent", 0), ("decay", 1.5)])
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"CooccurrenceConfig.{name} is"):
        CooccurrenceConfig(**{name: value})

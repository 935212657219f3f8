import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from gr_platform.errors import UserError
from gr_platform.evaluation.metrics import log_loss, normalised_entropy
from gr_platform.evaluation.significance import RANK_FIGURES, compare_tables, intervals, mean_and_error, resampled_sums

NUM_USERS = 2000


def ranked(ranks, users=None):
    users = np.arange(len(ranks)) if users is None else users
    return pa.table({"user_id": users, "item": np.arange(len(ranks)) % 7, "rank": ranks})


def judged(labels, logits, users=None):
    users = np.arange(len(labels)) if users is None else users
    return pa.table({"user_id": users, "item": users, "label_like": labels, "logit_like": logits})


@pytest.fixture
def ranks():
    # Far enough out that no figure is near 1, where a tenth of the users could not move it.
    return np.random.default_rng(3).geometric(0.005, NUM_USERS)


def test_a_planted_difference_is_found_with_an_interval_around_it(ranks):
    better = np.where(np.random.default_rng(4).random(NUM_USERS) < 0.1, 1, ranks)
    for found in compare_tables(ranked(ranks), ranked(better)):
        assert found.difference == pytest.approx(found.b - found.a)
        assert 0 < found.low < found.difference < found.high
        assert found.p_value < 0.001
    swapped = compare_tables(ranked(better), ranked(ranks))
    assert all(found.difference < found.high < 0 and found.p_value < 0.001 for found in swapped)


def test_equal_runs_and_a_mere_reordering_are_not_found(ranks):
    for found in compare_tables(ranked(ranks), ranked(ranks)):
        assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    other = np.random.default_rng(5).permutation(ranks)
    found = compare_tables(ranked(ranks), ranked(other))
    assert [each.figure for each in found] == list(RANK_FIGURES)
    assert all(each.low < 0 < each.high and each.p_value > 0.05 for each in found)


def test_the_interval_is_that_of_an_independent_bootstrap(ranks):
    rng = np.random.default_rng(6)
    other = np.maximum(1, ranks + rng.integers(-12, 12, NUM_USERS))
    found = {each.figure: each for each in compare_tables(ranked(ranks), ranked(other))}["mrr"]
    theirs = stats.bootstrap((1 / other - 1 / ranks,), np.mean, n_resamples=4000, method="percentile", rng=rng)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.06 * width)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.06 * width)


def test_the_interval_of_one_run_is_that_of_its_mean(ranks):
    """A mean over 2,000 users is so near to normal that both must say the same."""
    found = intervals(ranked(ranks))
    assert [each.figure for each in found] == list(RANK_FIGURES)
    for each, gains in zip(found, (ranks <= 10, ranks <= 50, ranks <= 200), strict=False):
        half = 1.96 * gains.std() / np.sqrt(NUM_USERS)
        assert each.value == gains.mean()
        assert each.low == pytest.approx(each.value - half, abs=0.1 * half)
        assert each.high == pytest.approx(each.value + half, abs=0.1 * half)


def test_the_interval_of_a_judged_run_holds_its_value_and_an_empty_one_has_none():
    rng = np.random.default_rng(8)
    labels, logits = rng.random(NUM_USERS) < 0.2, rng.normal(-1.5, 0.3, NUM_USERS)
    found = {each.figure: each for each in intervals(judged(labels, logits))}
    assert set(found) == {"like_log_loss", "like_ne"}
    assert found["like_ne"].value == pytest.approx(normalised_entropy(labels, logits))
    assert all(each.low < each.value < each.high for each in found.values())
    assert intervals(ranked(np.zeros(0, np.int64))) == []


@pytest.mark.parametrize("num_helped", [20, 40, 60])
def test_the_p_value_is_that_of_a_paired_t_test(ranks, num_helped):
    """Means over 2,000 users are so near to normal that both must say the same."""
    other = np.random.default_rng(10).permutation(ranks)
    other[:num_helped] = 1
    found = {each.figure: each for each in compare_tables(ranked(ranks), ranked(other))}
    for name, of in (("mrr", lambda values: 1 / values), ("hr_at_10", lambda values: 1.0 * (values <= 10))):
        expected = stats.ttest_rel(of(ranks), of(other)).pvalue
        assert found[name].p_value == pytest.approx(expected, rel=0.1, abs=0.004)


def test_the_interval_covers_a_true_difference_of_nothing_as_often_as_it_says():
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        a, b = (ranked(rng.integers(1, 21, 300)) for _ in range(2))
        found = compare_tables(a, b, num_resamples=400)[0]
        covered += found.low <= 0 <= found.high
    assert 180 <= covered <= 199


def test_the_same_seed_gives_the_same_answer(ranks):
    other = ranks[::-1].copy()
    assert compare_tables(ranked(ranks), ranked(other)) == compare_tables(ranked(ranks), ranked(other))
    assert compare_tables(ranked(ranks), ranked(other), seed=2) != compare_tables(ranked(ranks), ranked(other))


def test_ranking_figures_are_those_of_the_metrics_and_a_better_model_is_found():
    rng = np.random.default_rng(8)
    truth = rng.normal(size=NUM_USERS)
    labels = rng.random(NUM_USERS) < 1 / (1 + np.exp(-truth))
    worse = 0.2 * truth
    loss, ne = compare_tables(judged(labels, worse), judged(labels, truth))
    assert (loss.figure, ne.figure) == ("like_log_loss", "like_ne")
    assert (loss.a, loss.b) == pytest.approx((log_loss(labels, worse), log_loss(labels, truth)))
    assert (ne.a, ne.b) == pytest.approx((normalised_entropy(labels, worse), normalised_entropy(labels, truth)))
    assert all(each.high < 0 and each.p_value < 0.01 for each in (loss, ne))


def test_a_task_of_one_class_has_no_ne_to_compare():
    labels = np.ones(20, bool)
    found = compare_tables(judged(labels, np.zeros(20)), judged(labels, np.ones(20)))
    assert [each.figure for each in found] == ["like_log_loss"]


def test_users_are_drawn_whole_so_copies_of_their_targets_add_no_certainty():
    rng = np.random.default_rng(9)
    labels, a, b = rng.random(300) < 0.4, rng.normal(size=300), rng.normal(size=300)
    users, copied = np.arange(300), np.repeat(np.arange(300), 5)
    once = compare_tables(judged(labels, a, users), judged(labels, b, users))
    often = compare_tables(judged(labels[copied], a[copied], copied), judged(labels[copied], b[copied], copied))
    for left, right in zip(once, often, strict=True):
        assert (left.low, left.high, left.p_value) == pytest.approx((right.low, right.high, right.p_value))


def test_runs_of_other_users_targets_or_kinds_are_refused(ranks):
    table = ranked(ranks)
    others = ranked(ranks, users=np.arange(NUM_USERS) + 1)
    items = table.set_column(1, "item", pa.array(np.arange(NUM_USERS)))
    for other in (others, items, table[:-1]):
        with pytest.raises(UserError, match="judged on different users or targets"):
            compare_tables(table, other)
    with pytest.raises(UserError, match="runs of one kind"):
        compare_tables(table, judged(ranks > 3, ranks / 2))
    with pytest.raises(UserError, match="no target at all"):
        compare_tables(table[:0], table[:0])


def test_sums_are_of_as_many_users_drawn_with_replacement():
    values = np.stack([np.full(5, 2.0), 10.0 ** np.arange(5)], axis=1)
    sums = resampled_sums(values, num_resamples=500)
    assert (sums[:, 0] == 10).all()
    digits = [int(total) // 10 ** np.arange(5) % 10 for total in sums[:, 1]]
    assert all(each.sum() == 5 for each in digits)
    assert np.mean(digits) == 1
    assert len({tuple(each) for each in digits}) > 50


def test_mean_and_error_over_seeds_equal_scipys():
    mean, error = mean_and_error([0.30, 0.32, 0.31])
    assert mean == pytest.approx(0.31)
    assert error == pytest.approx(stats.sem([0.30, 0.32, 0.31]))
    assert mean_and_error([0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="values is empty"):
        mean_and_error([])

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve

from gr_platform.evaluation.metrics import (
    CUTS,
    auc,
    binary_metrics,
    calibration_bins,
    gauc,
    log_loss,
    normalised_entropy,
    rank_metrics,
)


def test_rank_metrics_equal_a_table_computed_by_hand():
    # ranks 1, 3, 11, 51, 101, 201: gains 1 -> 1, 3 -> 1/2, 11 -> 1/log2(12), 51 -> 1/log2(52), 101 -> 1/log2(102)
    found = rank_metrics(np.array([1, 3, 11, 51, 101, 201]))
    gained = [1.0, 0.5, 1 / np.log2(12), 1 / np.log2(52), 1 / np.log2(102)]
    for inside, cut in zip((1, 2, 3, 4, 5), CUTS, strict=True):
        assert found[f"hr_at_{cut}"] == pytest.approx(inside / 6)
        assert found[f"ndcg_at_{cut}"] == pytest.approx(sum(gained[:inside]) / 6)
    assert CUTS == (1, 10, 50, 100, 200)
    assert found["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 11 + 1 / 51 + 1 / 101 + 1 / 201) / 6)
    assert not any("@" in name for name in found)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20))
def test_ndcg_and_mrr_equal_scikit_learn(ranks):
    truth = np.eye(60)[np.array(ranks) - 1]
    scores = np.tile(-np.arange(60.0), (len(ranks), 1))
    found = rank_metrics(np.array(ranks))
    assert found["ndcg_at_10"] == pytest.approx(sklearn_metrics.ndcg_score(truth, scores, k=10))
    assert found["mrr"] == pytest.approx(sklearn_metrics.label_ranking_average_precision_score(truth, scores))
    assert found["hr_at_10"] == pytest.approx(
        sklearn_metrics.top_k_accuracy_score(np.array(ranks) - 1, scores, k=10, labels=np.arange(60))
    )


def test_ranks_below_one_are_refused_and_no_ranks_are_undefined():
    with pytest.raises(ValueError, match="must be 1 or more"):
        rank_metrics(np.array([0, 1]))
    empty = rank_metrics(np.zeros(0, np.int64))
    assert empty["hr_at_10"] is None
    assert empty["undefined"] == "no examples"


def test_log_loss_and_ne_equal_a_table_computed_by_hand():
    labels, logits = np.array([True, False, False, True]), np.log(np.array([3.0, 1.0, 1 / 3, 1.0]))
    # probabilities .75, .5, .25, .5: -(ln .75 + ln .5 + ln .75 + ln .5) / 4; base rate 1/2 has entropy ln 2
    expected = -(2 * np.log(0.75) + 2 * np.log(0.5)) / 4
    assert log_loss(labels, logits) == pytest.approx(expected)
    assert normalised_entropy(labels, logits) == pytest.approx(expected / np.log(2))


def test_predicting_the_base_rate_gives_a_normalised_entropy_of_one():
    labels = np.arange(10) < 3
    assert normalised_entropy(labels, np.full(10, np.log(0.3 / 0.7))) == pytest.approx(1.0)


binary = st.lists(st.tuples(st.booleans(), st.integers(-6, 6)), min_size=2, max_size=40).filter(
    lambda pairs: len({label for label, _ in pairs}) == 2
)


@given(binary)
def test_binary_figures_equal_scikit_learn_with_ties(pairs):
    labels, logits = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs], np.float64)
    found = binary_metrics(labels, logits)
    assert found["auc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, logits))
    assert found["log_loss"] == pytest.approx(sklearn_metrics.log_loss(labels, 1 / (1 + np.exp(-logits))))


def test_constant_scores_have_an_auc_of_one_half():
    assert auc(np.array([True, False, False]), np.zeros(3)) == 0.5


@pytest.mark.parametrize(
    ("labels", "reason"), [([True, True], "positive"), ([False] * 3, "negative"), ([], "no examples")]
)
def test_undefined_figures_are_none_with_a_reason_and_never_nan(labels, reason):
    found = binary_metrics(np.array(labels, bool), np.zeros(len(labels)))
    assert found["ne"] is None
    assert found["auc"] is None
    assert reason in found["undefined"]
    json.dumps(found, allow_nan=False)


def test_extreme_logits_stay_finite_and_nan_logits_raise():
    assert log_loss(np.array([True, False]), np.array([-1000.0, -1000.0], np.float32)) == pytest.approx(500.0)
    with pytest.raises(ValueError, match="1 of 2 logits"):
        binary_metrics(np.array([True, False]), np.array([np.nan, 0.0]))


def test_gauc_equals_a_table_computed_by_hand():
    users = np.array([7, 7, 7, 3, 3, 5, 5])
    labels = np.array([True, False, False, True, False, True, True])
    scores = np.array([0.5, 0.9, 0.1, 0.4, 0.4, 0.2, 0.8])
    # user 7: 1 of 2 pairs right, 3 targets; user 3: a tie, 2 targets; user 5 has no negative and does not count
    assert gauc(labels, scores, users) == pytest.approx((3 * 0.5 + 2 * 0.5) / 5)
    scores[1] = 0.3
    assert gauc(labels, scores, users) == pytest.approx((3 * 1.0 + 2 * 0.5) / 5)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(-4, 4)), max_size=40))
def test_gauc_is_the_weighted_mean_of_scikit_learns_auc_over_users(rows):
    users, labels, logits = (np.array([row[i] for row in rows]) for i in range(3))
    labels = labels.astype(bool)
    judged = [users == user for user in np.unique(users) if len(set(labels[users == user].tolist())) == 2]
    found = gauc(labels, logits.astype(float), users)
    if not judged:
        assert found is None
        return
    aucs = [sklearn_metrics.roc_auc_score(labels[mine], logits[mine]) for mine in judged]
    assert found == pytest.approx(np.average(aucs, weights=[mine.sum() for mine in judged]))


def test_gauc_without_users_of_several_targets_is_none_with_a_reason():
    found = binary_metrics(np.array([True, False, True]), np.arange(3.0))
    assert found["auc"] is not None
    assert found["gauc"] is None
    assert found["undefined"] == "gauc: no user has targets of both labels"


def test_calibration_equals_a_table_computed_by_hand():
    # predictions .5 four times and .75 four times; 1 and 3 of them happen
    logits = np.repeat(np.log([1.0, 3.0]), 4)
    labels = np.array([1, 0, 0, 0, 1, 1, 1, 0], bool)
    found = binary_metrics(labels, logits)
    assert found["calibration"] == pytest.approx((4 * 0.5 + 4 * 0.75) / 4)
    assert found["ece"] == pytest.approx((4 * 0.25 + 4 * 0.0) / 8)
    bins = calibration_bins(labels, logits)
    assert [(each["num_targets"], each["observed"]) for each in bins] == [(4, 0.25), (4, 0.75)]
    assert [each["predicted"] for each in bins] == pytest.approx([0.5, 0.75])


def test_calibration_bins_equal_scikit_learns_quantile_bins():
    rng = np.random.default_rng(5)
    logits = rng.normal(size=2000)
    labels = rng.random(2000) < 1 / (1 + np.exp(-2 * logits))
    observed, predicted = calibration_curve(labels, 1 / (1 + np.exp(-logits)), n_bins=10, strategy="quantile")
    found = calibration_bins(labels, logits)
    assert [each["observed"] for each in found] == pytest.approx(observed.tolist(), abs=0.006)
    assert [each["predicted"] for each in found] == pytest.approx(predicted.tolist(), abs=0.002)
    assert sum(each["num_targets"] for each in found) == 2000


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.floats(-1e4, 1e4, width=32)), max_size=20))
def test_no_figure_is_ever_nan(rows):
    users, labels, logits = (np.array([row[i] for row in rows]) for i in range(3))
    found = binary_metrics(labels.astype(bool), logits.astype(np.float32), users)
    json.dumps([found, calibration_bins(labels, logits.astype(np.float32))], allow_nan=False)
    assert all(value is not None for value in found.values()) or found["undefined"]

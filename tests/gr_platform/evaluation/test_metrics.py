import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from gr_platform.evaluation.metrics import auc, binary_metrics, log_loss, normalised_entropy, rank_metrics


def test_rank_metrics_equal_a_table_computed_by_hand():
    # ranks 1, 3, 11, 51, 201: gains at rank 1 -> 1, 3 -> 1/2, 11 -> 1/log2(12), 51 -> 1/log2(52), 201 -> beyond 200
    found = rank_metrics(np.array([1, 3, 11, 51, 201]))
    assert found["hr_at_1"] == pytest.approx(1 / 5)
    assert found["hr_at_10"] == pytest.approx(2 / 5)
    assert found["hr_at_50"] == pytest.approx(3 / 5)
    assert found["hr_at_200"] == pytest.approx(4 / 5)
    assert found["ndcg_at_10"] == pytest.approx((1 + 0.5) / 5)
    assert found["ndcg_at_200"] == pytest.approx((1 + 0.5 + 1 / np.log2(12) + 1 / np.log2(52)) / 5)
    assert found["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 11 + 1 / 51 + 1 / 201) / 5)
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

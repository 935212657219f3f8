"""Calibration finds the true map of logits, keeps their order, and leaves alone what it cannot tell."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_platform.evaluation.metrics import auc, log_loss
from gr_platform.training.calibration import fitted


def drawn(scale, shift, num_events=40_000, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, num_events)
    return rng.random(num_events) < 1 / (1 + np.exp(-(scale * logits + shift))), logits


def test_the_map_that_the_events_were_drawn_with_is_found():
    labels, logits = drawn(0.6, -1.2)
    assert fitted(labels, logits) == pytest.approx((0.6, -1.2), abs=0.05)
    assert fitted(*drawn(1.0, 0.0)) == pytest.approx((1.0, 0.0), abs=0.05)


def test_predicted_and_observed_rates_agree_after_calibration():
    labels, logits = drawn(0.5, -2.0)
    scale, shift = fitted(labels, logits)
    assert np.mean(1 / (1 + np.exp(-(scale * logits + shift)))) == pytest.approx(labels.mean(), rel=1e-6)
    assert abs(np.mean(1 / (1 + np.exp(-logits))) - labels.mean()) > 0.2


@settings(deadline=None, max_examples=40)
@given(st.floats(-2, 3), st.floats(-4, 4), st.integers(2, 400), st.integers(0, 99))
def test_log_loss_never_grows_and_the_order_stays(scale, shift, num_events, seed):
    labels, logits = drawn(scale, shift, num_events, seed)
    found_scale, found_shift = fitted(labels, logits)
    assert found_scale > 0
    assert log_loss(labels, found_scale * logits + found_shift) <= log_loss(labels, logits)
    assert auc(labels, found_scale * logits + found_shift) == auc(labels, logits)


@pytest.mark.parametrize("num_positives", [0, 49, 951, 1000])
def test_a_task_with_too_few_events_of_a_class_is_left_alone(num_positives):
    labels = np.arange(1000) < num_positives
    assert fitted(labels, np.linspace(-1, 1, 1000)) == (1.0, 0.0)

"""Probabilities that mean what they say: a ranking model's logits against the rates seen on held-out events.

Invariant: calibration never makes the log loss of the events that it is fitted on worse, keeps the order of scores, and
leaves a task alone that has too few events to tell.

Legend: n events, K tasks.
"""

import logging

import numpy as np
from scipy.special import expit

from gr_platform.evaluation.metrics import log_loss
from gr_platform.evaluation.protocols import judge_by_model
from gr_platform.models.ranking import RankingModel
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.splits import Holdout, Split

logger = logging.getLogger(__name__)

MIN_EVENTS_OF_A_CLASS = 50
NEWTON_STEPS = 50
TOLERANCE = 1e-9


def calibrate(model: RankingModel, dataset: SequenceDataset, split: Split | Holdout) -> None:
    """Fit each task's scale and shift to the targets of `split`, which no weight was trained on, and set them."""
    model.calibration.scale.fill_(1.0)
    model.calibration.shift.fill_(0.0)
    judged = judge_by_model(model, dataset, split)
    for index, task in enumerate(model.tasks):
        scale, shift = fitted(judged.labels[:, index], judged.logits[:, index])
        model.calibration.scale[index], model.calibration.shift[index] = scale, shift
        logger.info("calibrated task=%s events=%d scale=%.4f shift=%.4f", task, len(judged.labels), scale, shift)


def fitted(labels: np.ndarray, logits: np.ndarray) -> tuple[float, float]:
    """Return (scale, shift) that minimise the log loss of sigmoid(scale * logits + shift), bool and float [n].

    (1, 0) where a class has fewer than MIN_EVENTS_OF_A_CLASS events, or where the fit would turn the order round.
    Source: Platt scaling, by Newton's method.
    """
    labels, x = labels.astype(bool), logits.astype(np.float64)
    if min(np.count_nonzero(labels), np.count_nonzero(~labels)) < MIN_EVENTS_OF_A_CLASS:
        return 1.0, 0.0
    design = np.stack([x, np.ones_like(x)], axis=1)
    weights = np.array([1.0, 0.0])
    for _ in range(NEWTON_STEPS):
        rate = expit(design @ weights)
        gradient = design.T @ (rate - labels) / len(x)
        curvature = (design.T * (rate * (1.0 - rate))) @ design / len(x) + 1e-12 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        weights = weights - step
        if np.abs(step).max() < TOLERANCE:
            break
    scale, shift = float(weights[0]), float(weights[1])
    before, after = log_loss(labels, logits), log_loss(labels, scale * x + shift)
    better = np.isfinite([scale, shift]).all() and before is not None and after is not None and after <= before
    return (scale, shift) if better and scale > 0 else (1.0, 0.0)

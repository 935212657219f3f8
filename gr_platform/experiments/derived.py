"""What follows from the cells' figures together: a fitted law, a ratio of costs.

Invariant: computed from the rows of the report alone, so anyone can compute it again from the JSON file.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]


def power_law(x: Sequence[float], y: Sequence[float]) -> dict[str, float] | None:
    """Return factor, exponent and residual of y = factor * x ** exponent, None with fewer than three points.

    Least squares in log space; residual: the root mean square of log(y) that is left.
    """
    if len(x) < 3 or min(x) <= 0 or min(y) <= 0 or len(set(x)) < 3:
        return None
    logs = np.log(np.asarray(x, np.float64)), np.log(np.asarray(y, np.float64))
    exponent, intercept = np.polyfit(*logs, 1)
    left = logs[1] - (exponent * logs[0] + intercept)
    return {
        "factor": float(np.exp(intercept)),
        "exponent": float(exponent),
        "residual": float(np.sqrt(np.mean(left**2))),
    }


def scaling(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the power law of log loss in training compute, and NE's slope in its logarithm (the paper's form)."""
    found = [
        row["figures"] for row in rows if row["figures"].get("train_flops") and row["figures"].get("mean_log_loss")
    ]
    compute = [figures["train_flops"] for figures in found]
    fit = power_law(compute, [figures["mean_log_loss"] for figures in found])
    if fit is None:
        return {}
    slope, intercept = np.polyfit(np.log(compute), [figures["mean_ne"] for figures in found], 1)
    exponent, residual = fit["exponent"], fit["residual"]
    return {
        "fit": fit,
        "lines": [
            f"Fitted: log loss = {fit['factor']:.4g} * C^{exponent:.4f} with C in FLOPs; root mean square residual of "
            f"its logarithm {residual:.4f}.",
            f"In the paper's form NE = {intercept:.4f} {slope:+.5f} ln C.",
        ],
    }


def same_quality(rows: Sequence[Row]) -> dict[str, Any]:
    """Return what generative training costs until it is as good as impression-level training ends, and the ratio."""
    curves = {row["label"]: row["curve"] for row in rows if row.get("curve")}
    if not {"generative", "impression-level"} <= set(curves):
        return {}
    goal = max(curves["impression-level"], key=lambda entry: entry["ndcg_at_10"])
    reached = next((e for e in curves["generative"] if e["ndcg_at_10"] >= goal["ndcg_at_10"]), None)
    quality = f"NDCG@10 {goal['ndcg_at_10']:.4f} on validation"
    if reached is None:
        return {"lines": [f"Generative training did not reach {quality}, where impression-level training ended."]}
    costs = {"seconds": "s", "tokens": "tokens", "train_flops": "FLOPs"}
    both = {name: (goal[name], reached[name]) for name in costs if name in goal and name in reached}
    ratios = {name: theirs / ours for name, (theirs, ours) in both.items()}
    spent = ", ".join(
        f"{theirs:.3g} against {ours:.3g} {costs[name]} ({ratios[name]:.3g} x)" for name, (theirs, ours) in both.items()
    )
    return {"ratios": ratios, "lines": [f"To {quality}, impression-level against generative: {spent}."]}


def cheaper(rows: Sequence[Row]) -> dict[str, Any]:
    """Return how each alpha compares with alpha = 2: change of NDCG@10 in percent, tokens of an epoch left."""
    found = {row["figures"]["alpha"]: row for row in rows if row["figures"].get("alpha") is not None}
    whole = found.get(2.0)
    if whole is None:
        return {}
    lines = []
    for alpha in sorted(set(found) - {2.0}):
        ours, theirs = (row["figures"]["ndcg_at_10"] for row in (found[alpha], whole))
        change = 100.0 * (ours / theirs - 1) if theirs else float("nan")
        # The choice of the epoch trains on the same events in every row; how long a refit takes, it chose.
        tokens = [
            np.mean([entry["tokens"] for entry in row["curve"] if entry["phase"] == "validation"])
            for row in (found[alpha], whole)
        ]
        lines.append(f"alpha {alpha:g}: NDCG@10 {change:+.1f} %, tokens an epoch {100 * tokens[0] / tokens[1]:.0f} %.")
    return {"lines": lines}


DERIVED: dict[str, Callable[[Sequence[Row]], dict[str, Any]]] = {
    "": lambda _: {},
    "scaling": scaling,
    "same_quality": same_quality,
    "cheaper": cheaper,
}

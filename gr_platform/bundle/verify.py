"""Does a bundle say what its model said? The parity gate that stands before serving.

Invariant: the graphs are run as serving runs them, half of the history as prefill and the rest as delta.
"""

from dataclasses import dataclass

import numpy as np

from gr_platform.bundle import golden
from gr_platform.bundle.compute import Compute, concat_kv
from gr_platform.bundle.load import Bundle
from gr_platform.models.tokens import ranking_tokens, retrieval_tokens

TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Largest absolute error over all golden requests, beside the largest absolute reference."""

    max_abs_error: float
    max_abs_reference: float
    num_requests: int

    @property
    def ok(self) -> bool:
        """Whether the error is finite and at most TOLERANCE of the largest reference."""
        return bool(np.isfinite(self.max_abs_error)) and self.max_abs_error <= TOLERANCE * self.max_abs_reference


def incremental_scores(bundle: Bundle, compute: Compute, request: golden.GoldenRequest) -> np.ndarray:
    """Return the scores of a golden request, [C, tasks] (ranking) or [C] (retrieval), by prefill, delta and score."""
    build = ranking_tokens if bundle.kind == "ranking" else retrieval_tokens
    tokens = build(request.items, request.actions, request.times, request.request_time)
    half = len(tokens) // 2
    _, head = compute.encode(tokens.slice(0, half), compute.empty())
    rows, tail = compute.encode(tokens.slice(half, len(tokens)), head)
    if bundle.kind == "ranking":
        return compute.score(request.candidates, request.request_time, concat_kv([head, tail]))
    user = rows[-1] / np.maximum(np.linalg.norm(rows[-1]), 1e-6)
    return bundle.item_vectors[request.candidates] @ user / bundle.config.temperature


def parity(bundle: Bundle, compute: Compute | None = None) -> Parity:
    """Return how far the bundle's graphs (or `compute`) are from the expected scores it carries."""
    compute = compute or bundle.compute()
    errors, references = [0.0], [0.0]
    cases = golden.load(bundle.folder / "golden.safetensors")
    for request, expected in cases:
        scores = incremental_scores(bundle, compute, request)
        errors.append(float(np.max(np.abs(scores - expected))))
        references.append(float(np.max(np.abs(expected))))
    return Parity(
        # np.max, because Python's max() lets a NaN pass as the smaller one.
        max_abs_error=float(np.max(errors)),
        max_abs_reference=float(np.max(references)),
        num_requests=len(cases),
    )

"""Does a bundle say what its model said? The parity gate that stands before serving.

Invariant: the model is run as serving runs it, half of the history as prefill and the rest as delta.
"""

from dataclasses import dataclass

import numpy as np

from gr_platform.bundle import golden
from gr_platform.bundle.compute import Ask, Compute, Piece, most_tokens, pages_for
from gr_platform.bundle.load import Bundle
from gr_platform.models.tokens import ranking_tokens, retrieval_tokens

TOLERANCE = 1e-5
# Of K/V and products in 16 bits, whose rounding adds up over the layers.
SHORT_TOLERANCE = 3e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Largest absolute error over all golden requests, beside the largest absolute reference."""

    max_abs_error: float
    max_abs_reference: float
    num_requests: int
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is finite and at most `tolerance` of the largest reference."""
        return bool(np.isfinite(self.max_abs_error)) and self.max_abs_error <= self.tolerance * self.max_abs_reference


def incremental_scores(bundle: Bundle, compute: Compute, request: golden.GoldenRequest) -> np.ndarray:
    """Return the scores of a golden request, [C, tasks] (ranking) or [C] (retrieval), by prefill, delta and score."""
    build = ranking_tokens if bundle.kind == "ranking" else retrieval_tokens
    tokens = build(request.items, request.actions, request.times, request.request_time)
    half, keep = len(tokens) // 2, len(tokens) - (bundle.kind == "retrieval")
    pages = np.arange(pages_for(len(tokens)), dtype=np.int32)
    if half:
        compute.encode([Piece(tokens=tokens.slice(0, half), past=0, pages=pages, keep=half)])
    rest = tokens.slice(half, len(tokens))
    rows = compute.encode([Piece(tokens=rest, past=half, pages=pages, keep=keep - half)])
    if bundle.kind == "ranking":
        ask = Ask(candidates=request.candidates, request_time=request.request_time, past=keep, pages=pages)
        return compute.score([ask])[0]
    user = rows[0] / np.maximum(np.linalg.norm(rows[0]), 1e-6)
    return bundle.item_vectors[request.candidates] @ user / bundle.config.temperature


def parity(bundle: Bundle, compute: Compute | None = None, tolerance: float = TOLERANCE) -> Parity:
    """Return how far the bundle's graphs (or `compute`, whose first pages are written) are from what it expects."""
    compute = compute or bundle.compute(pages_for(most_tokens(bundle.config)))
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
        tolerance=tolerance,
    )

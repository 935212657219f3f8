"""Does a bundle say what its model said? The parity gate that stands before serving.

Invariant: the model is run as serving runs it, half of the history as prefill and the rest as delta.
"""

from dataclasses import dataclass

import numpy as np

from gr_platform.bundle import golden
from gr_platform.bundle.compute import Ask, Compute, Piece, most_tokens, pages_for
from gr_platform.bundle.load import Bundle
from gr_platform.models.tokens import Tokens, ranking_tokens, retrieval_tokens

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


def parity(bundle: Bundle, compute: Compute | None = None, tolerance: float = TOLERANCE) -> Parity:
    """Return how far the bundle's graphs (or `compute`, whose pages are written) are from what it expects.

    Lists of candidates are scored alone and, as far as the pages go, in one step together.
    """
    longest = pages_for(most_tokens(bundle.config))
    compute = compute or bundle.compute(longest)
    cases = golden.load(bundle.folder / "golden.safetensors")
    errors, references = [0.0], [0.0]
    asks: list[Ask] = []
    expected_together: list[np.ndarray] = []
    for request, expected in cases:
        # Beside the requests before it where there is room; the first pages are its own again where there is not.
        taken = sum(len(ask.pages) for ask in asks)
        if taken + longest > compute.num_pages:
            taken, asks, expected_together = 0, [], []
        tokens = _tokens(bundle, request)
        pages = taken + np.arange(pages_for(len(tokens)), dtype=np.int32)
        row = _encode_in_two(bundle, compute, tokens, pages)
        if bundle.kind == "ranking":
            asks.append(
                Ask(candidates=request.candidates, request_time=request.request_time, past=len(tokens), pages=pages)
            )
            expected_together.append(expected)
            scores = compute.score(asks[-1:])[0]
        else:
            user = row / np.maximum(np.linalg.norm(row), 1e-6)
            scores = bundle.item_vectors[request.candidates] @ user / bundle.config.temperature
        errors.append(_error(scores, expected))
        references.append(float(np.max(np.abs(expected))))
    if asks:
        errors += [_error(*each) for each in zip(compute.score(asks), expected_together, strict=True)]
    return Parity(
        # np.max, because Python's max() lets a NaN pass as the smaller one.
        max_abs_error=float(np.max(errors)),
        max_abs_reference=float(np.max(references)),
        num_requests=len(cases),
        tolerance=tolerance,
    )


def _tokens(bundle: Bundle, request: golden.GoldenRequest) -> Tokens:
    build = ranking_tokens if bundle.kind == "ranking" else retrieval_tokens
    return build(request.items, request.actions, request.times, request.request_time)


def _encode_in_two(bundle: Bundle, compute: Compute, tokens: Tokens, pages: np.ndarray) -> np.ndarray:
    """Encode tokens as prefill and delta; return the last one's row [d] of a retrieval model, else none."""
    half, keep = len(tokens) // 2, len(tokens) - (bundle.kind == "retrieval")
    if half:
        compute.encode([Piece(tokens=tokens.slice(0, half), past=0, pages=pages, keep=half)])
    rest = tokens.slice(half, len(tokens))
    rows = compute.encode([Piece(tokens=rest, past=half, pages=pages, keep=keep - half)])
    return rows[0] if len(rows) else rows


def _error(scores: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(scores - expected)))

"""One user's tokens through a `Compute` in pieces, over pages in a scrambled order."""

import numpy as np

from gr_platform.bundle.compute import Ask, Piece, pages_for

NUM_PAGES = 12


def scrambled(num_tokens, *, seed=0, num_pages=NUM_PAGES):
    """Page numbers int32 for this many tokens, in no order."""
    return np.random.default_rng(seed).permutation(num_pages)[: pages_for(num_tokens)].astype(np.int32)


def encode_in_pieces(compute, tokens, cuts, *, keeps_last, pages=None):
    """Encode tokens cut at `cuts`, the last one kept or not; return the rows [1, d] or [0, d] and the pages."""
    pages = scrambled(len(tokens)) if pages is None else pages
    end = len(tokens)
    rows = None
    for start, stop in zip([0, *cuts], [*cuts, end], strict=True):
        if stop > start:
            keep = stop - start - (stop == end and not keeps_last)
            rows = compute.encode([Piece(tokens=tokens.slice(start, stop), past=start, pages=pages, keep=keep)])
    return rows, pages


def score(compute, candidates, at, past, pages):
    """Probabilities [C, tasks] of candidates against `past` tokens in pages."""
    return compute.score([Ask(candidates=candidates, request_time=at, past=past, pages=pages)])[0]

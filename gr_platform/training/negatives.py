"""Negatives of the sampled softmax: uniform over the catalogue, shared by the targets of a step or drawn for each.

Invariant: the draw is a function of (seed, step) alone, and never names padding or an out-of-vocabulary bucket.
"""

import torch

from gr_platform.training.seeds import generator


def uniform_negatives(
    *, first_item: int, num_rows: int, num_negatives: int, seed: int, step: int, num_targets: int | None = None
) -> torch.Tensor:
    """Return int64 rows drawn with replacement from first_item..num_rows-1.

    Shape [num_negatives], shared by all targets, or [num_targets, num_negatives] where num_targets is given.
    Collisions with a target are the loss's business: it masks them. Raises ValueError if there is no item row.
    """
    if first_item >= num_rows:
        raise ValueError(f"no item rows: first_item is {first_item}, num_rows is {num_rows}")
    shape = (num_negatives,) if num_targets is None else (num_targets, num_negatives)
    return torch.from_numpy(generator(seed, "negatives", step).integers(first_item, num_rows, size=shape))

"""Negatives of the sampled softmax: uniform over the catalogue, shared by the tokens of a step.

Invariant: the draw is a function of (seed, step) alone, and never names padding or an out-of-vocabulary bucket.
"""

import torch

from gr_platform.training.seeds import generator


def uniform_negatives(*, first_item: int, num_rows: int, num_negatives: int, seed: int, step: int) -> torch.Tensor:
    """Return int64 [num_negatives] rows drawn with replacement from first_item..num_rows-1.

    Collisions with a target are the loss's business: it masks them. Raises ValueError if there is no item row.
    """
    if first_item >= num_rows:
        raise ValueError(f"no item rows: first_item is {first_item}, num_rows is {num_rows}")
    rows = generator(seed, "negatives", step).integers(first_item, num_rows, size=num_negatives)
    return torch.from_numpy(rows)

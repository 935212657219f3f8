"""Negatives of the sampled softmax: uniform over the catalogue, shared by the targets of a step or drawn for each.

Invariant: the draw is a function of (seed, step, number of the target in the step) alone, however a step is cut into
parts and processes, and never names padding or an out-of-vocabulary bucket.

Legend: T targets, M negatives of each.
"""

import numpy as np
import torch

from gr_platform.training.seeds import counted

# A block of the generator is 256 bits: eight draws.
DRAWS_A_BLOCK = 8


def uniform_negatives(
    *,
    first_item: int,
    num_rows: int,
    num_negatives: int,
    seed: int,
    step: int,
    num_targets: int | None = None,
    first_target: int = 0,
) -> torch.Tensor:
    """Return int64 rows drawn with replacement from first_item..num_rows-1.

    Shape [M], shared by all targets, or [T, M] where num_targets is given: those of targets first_target,
    first_target + 1, ... of the step. A row's probability is off by at most 2**-32. Collisions with a target are the
    loss's business: it masks them. Raises ValueError if there is no item row.
    """
    if first_item >= num_rows:
        raise ValueError(f"no item rows: first_item is {first_item}, num_rows is {num_rows}")
    targets = 1 if num_targets is None else num_targets
    blocks = -(-num_negatives // DRAWS_A_BLOCK)
    words = counted(seed, "negatives", step, first=first_target * blocks).random_raw(targets * blocks * 4)
    bits = words.view(np.uint32).reshape(targets, -1)[:, :num_negatives]
    # The high half of bits * items, which is below the number of items.
    rows = bits.astype(np.uint64)
    rows *= np.uint64(num_rows - first_item)
    rows >>= np.uint64(32)
    rows += np.uint64(first_item)
    drawn = torch.from_numpy(rows.view(np.int64))
    return drawn[0] if num_targets is None else drawn

"""Rowwise AdamW on the CPU: tiles of rows that stay in cache, updated where they lie or gathered and put back.

Legend: V rows of the table, R touched rows, d width.
"""

import math

import torch
from torch import Tensor

# Elements of a tile: enough to share among threads and to pay for the calls, few enough for the last cache.
TILE_ELEMENTS = 1 << 18


def rowwise_adamw_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor | None,
    grad: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update weight, exp_avg [V, d] and exp_avg_sq [V] in place where `rows` (None: everywhere) says."""
    state = (weight, exp_avg, exp_avg_sq)
    step_size, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    tile_rows = max(1, TILE_ELEMENTS // weight.shape[1])
    for start in range(0, len(grad), tile_rows):
        tile = slice(start, start + tile_rows)
        at = None if rows is None else rows[tile]
        w, moment, square = (x[tile] if at is None else x.index_select(0, at) for x in state)
        g = grad[tile].to(w.dtype)
        if weight_decay:
            w.mul_(1 - lr * weight_decay)
        moment.lerp_(g, 1 - beta1)
        square.mul_(beta2).add_(torch.linalg.vecdot(g, g), alpha=(1 - beta2) / g.shape[1])
        w.addcdiv_(moment, square.sqrt().div_(root).add_(eps)[:, None], value=-step_size)
        if at is not None:
            for x, updated in zip(state, (w, moment, square), strict=True):
                x.index_copy_(0, at, updated)

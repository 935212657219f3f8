"""Rowwise AdamW in plain PyTorch: the formula of AdamW with the row's mean square in place of each element's.

Legend: V rows of the table, R touched rows, d width.
Source: PAPER section 2 (embeddings use rowwise AdamW); Loshchilov and Hutter, Decoupled Weight Decay Regularization.
"""

from torch import Tensor


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
    at = slice(None) if rows is None else rows
    grad = grad.to(weight.dtype)
    moment = beta1 * exp_avg[at] + (1 - beta1) * grad
    square = beta2 * exp_avg_sq[at] + (1 - beta2) * grad.square().mean(dim=1)
    mean = moment / (1 - beta1**step)
    deviation = (square / (1 - beta2**step)).sqrt()
    decayed = weight[at] * (1 - lr * weight_decay)
    weight[at] = decayed - lr * mean / (deviation + eps)[:, None]
    exp_avg[at] = moment
    exp_avg_sq[at] = square

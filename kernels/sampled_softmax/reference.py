"""Sampled and full softmax losses in plain PyTorch: obviously right, differentiable, the truth of every faster path.

Invariant: the target's own logit counts once: drawn again as a negative, it is masked (an accidental hit).

Legend: T tokens that have a target, V rows of the item table, M negatives, d width.
Source: PAPER section 6 (sampled softmax with temperature, hits masked).
"""

import torch
from torch import Tensor


def sampled_softmax(users: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Return the losses [T] `lse(all logits) - positive logit` of users [T, d] against items [V, d].

    targets int64 [T]; negatives int64 [T, M], or [M] shared by all tokens. 16 bit inputs give fp32 losses.
    """
    wide = torch.promote_types(users.dtype, torch.float32)
    logits = users.to(wide) @ items.to(wide).T / temperature
    negatives = negatives.expand(len(users), negatives.shape[-1])
    positive = logits.gather(1, targets[:, None])
    negative = logits.gather(1, negatives).masked_fill(negatives == targets[:, None], float("-inf"))
    return torch.cat([positive, negative], dim=1).logsumexp(dim=1) - positive[:, 0]

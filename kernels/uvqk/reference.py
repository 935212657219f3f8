"""The uvqk projection in plain PyTorch: obviously right, differentiable, the truth every faster path is held to.

Legend: L tokens, d width of the layer, W width of u, v, q and k together.
Source: PAPER section 2, U, V, Q, K = split(SiLU(f1(X))).
"""

from torch import Tensor
from torch.nn import functional as F


def uvqk(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return SiLU(LayerNorm(x) @ weight) [L, W] of x [L, d] and weight [d, W]."""
    return F.silu(F.layer_norm(x, x.shape[-1:], eps=eps) @ weight)

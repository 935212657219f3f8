"""The gated norm in plain PyTorch: obviously right, differentiable, the truth every faster path is held to.

Legend: L tokens, W width of the attention output (heads * v_dim), d width of the layer.
Source: PAPER section 2, Y = f2(Norm(A V) * U), with dropout before f2.
"""

from torch import Tensor
from torch.nn import functional as F

from kernels.dropout import reference_dropout


def norm_gate(attention: Tensor, u: Tensor, dropout: float, seed: Tensor | None, eps: float) -> Tensor:
    """Return dropout(LayerNorm(attention) * u) [L, W] of attention and u [L, W]."""
    return reference_dropout(F.layer_norm(attention, attention.shape[-1:], eps=eps) * u, dropout, seed)


def norm_gate_linear(
    attention: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    dropout: float,
    seed: Tensor | None,
    eps: float,
) -> Tensor:
    """Return residual + norm_gate(attention, u) @ weight^T + bias [L, d]; weight [d, W], residual [L, d]."""
    return residual + F.linear(norm_gate(attention, u, dropout, seed, eps), weight, bias)

"""Transformer++: the Llama-like encoder that HSTU is measured against.

Invariant: positions enter through rotated q and k alone, by distance, so cached keys stay exact as a sequence grows.

Source: PAPER section 6 ("Transformer++": pre-RMSNorm, rotary positions, SwiGLU).
"""

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from gr_platform.models.config import ModelConfig
from gr_platform.models.softmax_encoder import CausalEncoder, Layer, Rotary, linear

NORM_EPS = 1e-6


def swiglu_dim(embedding_dim: int) -> int:
    """Return the width of a SwiGLU with the weights of a feed-forward of 4 d: 8/3 d, up to a multiple of 8."""
    return -(-8 * embedding_dim // 24) * 8


class SwiGLU(nn.Module):
    """f3(SiLU(f1(X)) * f2(X)), no biases."""

    def __init__(self, embedding_dim: int, width: int) -> None:
        super().__init__()
        self.gate_and_value = linear(embedding_dim, 2 * width, bias=False)
        self.output = linear(width, embedding_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [L, d] of x [L, d]."""
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.output(F.silu(gate) * value)


class Transformer(CausalEncoder):
    """RMSNorm, rotary softmax attention, SwiGLU of width `ffn_dim` (default 8/3 d); times are not read."""

    def __init__(self, config: ModelConfig) -> None:
        d, rotary = config.embedding_dim, Rotary(config.max_seq_len, config.qk_dim)
        width, norm = config.ffn_dim or swiglu_dim(d), partial(nn.RMSNorm, eps=NORM_EPS)
        layers = [Layer(config, norm, SwiGLU(d, width), bias=False, rotary=rotary) for _ in range(config.num_layers)]
        super().__init__(config, layers, norm(d))

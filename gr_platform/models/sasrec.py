"""SASRec: causal self-attention over items and their learned absolute positions (which the token embedding adds).

Invariant: it reads neither times nor distances; a recipe sets `absolute_position`.

Source: Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, with the pre-LayerNorm, the cosine
softmax loss and the sizes of the HSTU authors' baseline (PAPER section 6). Unlike theirs, the norm feeds q, k and v
alike and the residual is the layer's own input, as is common since.
"""

from functools import partial

from torch import nn

from gr_platform.models.config import ModelConfig
from gr_platform.models.softmax_encoder import CausalEncoder, Layer, linear

NORM_EPS = 1e-8


def feed_forward(config: ModelConfig, width: int, activation: nn.Module) -> nn.Module:
    """Return two linear layers with a hidden `width`."""
    d = config.embedding_dim
    dropout = nn.Dropout(config.dropout)
    return nn.Sequential(linear(d, width, bias=True), activation, dropout, linear(width, d, bias=True))


class SASRec(CausalEncoder):
    """LayerNorm, softmax attention, ReLU feed-forward of width `ffn_dim` (default d)."""

    def __init__(self, config: ModelConfig) -> None:
        d = config.embedding_dim
        norm = partial(nn.LayerNorm, eps=NORM_EPS)
        layers = [
            Layer(config, norm, feed_forward(config, config.ffn_dim or d, nn.ReLU()), bias=True)
            for _ in range(config.num_layers)
        ]
        super().__init__(config, layers, norm(d))

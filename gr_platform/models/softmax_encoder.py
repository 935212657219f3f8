"""The stack that Transformer++, SASRec and BERT4Rec share: pre-norm softmax attention, then a feed-forward.

Invariant: K/V of a token depend on tokens up to it alone (`CausalEncoder`), and rotated keys are what is kept, so a
cache of them never changes as a sequence grows. Dropout is on the input and on the two branches of a layer, not on
weights of attention: PyTorch's flash attention for the CPU has none.

Legend: as in softmax_attention.py; d embedding_dim.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr_platform.models.config import ModelConfig
from gr_platform.models.encoder import Encoder
from gr_platform.models.paged import PaddedPast
from gr_platform.models.softmax_attention import (
    Blocks,
    softmax_attend_candidates,
    softmax_attend_new,
    softmax_attention,
)
from kernels import JaggedTimes

ROTARY_BASE = 10_000.0


def linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    """Return a linear layer with Xavier weights and no bias at first."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Rotary(nn.Module):
    """Rotary positions: a product of rotated q and k depends on the distance of their positions alone.

    The table is made once in fp64, so every path and the exported graph rotate by the same values.
    """

    def __init__(self, max_seq_len: int, dim: int) -> None:
        super().__init__()
        self.half_dim = dim // 2
        frequencies = ROTARY_BASE ** -(torch.arange(self.half_dim, dtype=torch.float64) / max(1, self.half_dim))
        angles = torch.arange(max_seq_len, dtype=torch.float64)[:, None] * frequencies
        self.register_buffer("table", torch.stack([angles.cos(), angles.sin()]).float(), persistent=False)
        self.table: Tensor

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return x [L, H, D] rotated to positions int64 [L]; the last of an odd D stays as it is."""
        cos, sin = self.table[:, positions, None]
        first, second, rest = x.split([self.half_dim, self.half_dim, x.shape[-1] - 2 * self.half_dim], dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


class Layer(nn.Module):
    """X <- X + f(attention(Norm(X))), then X <- X + feed_forward(Norm(X))."""

    def __init__(
        self,
        config: ModelConfig,
        norm: Callable[[int], nn.Module],
        feed_forward: nn.Module,
        *,
        bias: bool,
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__()
        d, heads = config.embedding_dim, config.num_heads
        self.num_heads, self.qk_dim, self.v_dim, self.dropout = heads, config.qk_dim, config.v_dim, config.dropout
        self.attention_norm, self.feed_forward_norm = norm(d), norm(d)
        self.qkv = linear(d, heads * (2 * config.qk_dim + config.v_dim), bias=bias)
        self.output = linear(heads * config.v_dim, d, bias=bias)
        self.feed_forward, self.rotary = feed_forward, rotary

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k [L, H, qk_dim] (rotated) and v [L, H, v_dim] of x [L, d] at positions int64 [L]."""
        widths = [self.num_heads * dim for dim in (self.qk_dim, self.qk_dim, self.v_dim)]
        q, k, v = (
            part.unflatten(-1, (self.num_heads, part.shape[-1] // self.num_heads))
            for part in self.qkv(self.attention_norm(x)).split(widths, dim=-1)
        )
        if self.rotary is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        return q, k, v

    def combine(self, x: Tensor, attention: Tensor) -> Tensor:
        """Return the layer's output [L, d] from its input and the attention [L, H, v_dim]."""
        x = x + F.dropout(self.output(attention.flatten(1)), self.dropout, self.training)
        return x + F.dropout(self.feed_forward(self.feed_forward_norm(x)), self.dropout, self.training)


class SoftmaxEncoder(Encoder):
    """A stack of layers with dropout on its input and a norm on its output."""

    causal = False

    def __init__(self, config: ModelConfig, layers: list[Layer], final_norm: nn.Module) -> None:
        super().__init__()
        self.layers, self.final_norm, self.dropout = nn.ModuleList(layers), final_norm, config.dropout

    def _stack(self) -> list[Layer]:
        return cast("list[Layer]", list(self.layers))

    def forward(self, x: Tensor, jagged: JaggedTimes, rows: Tensor | None = None) -> Tensor:
        """Return rows [L, d] of jagged sequences of token vectors x [L, d], or [R, d] of the tokens `rows` alone."""
        blocks = Blocks.of(jagged.seq_offsets)
        asked = blocks.place if rows is None else blocks.place[rows]
        x = F.dropout(x, self.dropout, self.training).index_select(0, blocks.source)
        *below, last = self._stack()
        for layer in below:
            x = layer.combine(x, self._attend(layer, x, blocks))
        attention = self._attend(last, x, blocks)
        return self.final_norm(last.combine(x.index_select(0, asked), attention.index_select(0, asked)))

    def _attend(self, layer: Layer, x: Tensor, blocks: Blocks) -> Tensor:
        return softmax_attention(*layer.project(x, blocks.positions), blocks, causal=self.causal)


class CausalEncoder(SoftmaxEncoder):
    """The stack with causal attention, which cached K/V can serve."""

    causal = True

    def encode(
        self,
        x: Tensor,
        times: Tensor,
        query_times: Tensor,
        past_times: Tensor,
        past_k: Sequence[Tensor],
        past_v: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the last row, k, v of one user's new tokens, as `Encoder.encode` says; times do not count."""
        positions, stack = past_times.shape[0] + torch.arange(x.shape[0], device=x.device), self._stack()
        new_k, new_v = [], []
        for index, layer in enumerate(stack):
            q, k, v = layer.project(x, positions)
            if index == len(stack) - 1:
                x, q = x[-1:], q[-1:]
            attention = softmax_attend_new(q, torch.cat([past_k[index], k]), torch.cat([past_v[index], v]))
            x = layer.combine(x, attention)
            new_k.append(k)
            new_v.append(v)
        return self.final_norm(x), torch.stack(new_k), torch.stack(new_v)

    def score(self, x: Tensor, request_times: Tensor, past: PaddedPast) -> Tensor:
        """Return rows of candidates, all at the position after their history, as `Encoder.score` says."""
        flat, positions = x.flatten(0, 1), past.num_tokens[:, None].expand(x.shape[:2]).flatten()
        for index, layer in enumerate(self._stack()):
            q, k, v = (part.unflatten(0, x.shape[:2]) for part in layer.project(flat, positions))
            attention = softmax_attend_candidates(q, k, v, past.k[index], past.v[index], num_past=past.num_tokens)
            flat = layer.combine(flat, attention.flatten(0, 1))
        return self.final_norm(flat).view(x.shape)

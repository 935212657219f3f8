"""The ablation of pointwise attention: HSTU's layer, gate and norm with a softmax in place of SiLU(.) / N.

A V = softmax((Q K^T + rab) / sqrt(qk_dim)) V. The scale is that of the authors' research code (its
"softmax_rel_bias"), so figures compare; rab stands under it too: its tables learn their own scale. Unlike there, the
future is masked before the softmax, so it has no share in its sum.

Invariant: as in hstu.py, K/V of a token depend on tokens up to it alone.

Legend: as in softmax_attention.py. For sequences of a few hundred tokens: a block's [G, H, n, n] weights are held.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr_platform.models.config import ModelConfig
from gr_platform.models.encoder import Encoder
from gr_platform.models.hstu import HSTU, HSTULayer
from gr_platform.models.paged import PaddedPast
from gr_platform.models.softmax_attention import Blocks, softmax_attend_candidates, softmax_attend_new
from kernels import TIME_THRESHOLDS_MS, JaggedTimes, pairwise_time_buckets


def block_buckets(blocks: Blocks, jagged: JaggedTimes) -> list[Tensor]:
    """Return the time bucket int64 [G, n, n] of every query and key of each block."""
    thresholds = torch.tensor(TIME_THRESHOLDS_MS, device=jagged.times.device)
    looks = blocks.split(jagged.query_times[blocks.source])
    happened = blocks.split(jagged.times[blocks.source])
    return [
        torch.bucketize((at[:, :, None] - time[:, None, :]).abs(), thresholds, right=True)
        for at, time in zip(looks, happened, strict=True)
    ]


class SoftmaxHSTULayer(HSTULayer):
    """One layer: X + f2(Norm(A V) * U), with A V = softmax((Q K^T + rab) / sqrt(qk_dim)) V."""

    def in_blocks(self, x: Tensor, blocks: Blocks, buckets: list[Tensor], rows: Tensor | None) -> Tensor:
        """Return [T, d] of x [T, d], or [R, d] of the places `rows` alone; buckets as `block_buckets` says."""
        u, v, q, k = self._project(x, self.backend)
        parts = [blocks.split(part) for part in (q, k, v)]
        attention = torch.cat(
            [v.new_zeros((0, *v.shape[1:])), *(self._attend(*block) for block in zip(*parts, buckets, strict=True))]
        )
        if rows is not None:
            x, attention, u = (part.index_select(0, rows) for part in (x, attention, u))
        return self._combine(x, attention, u, self.backend)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bucket: Tensor) -> Tensor:
        """Return the attention [G * n, H, v_dim] of one block; q, k, v [G, n, H, dim], bucket [G, n, n]."""
        step = torch.arange(q.shape[1], device=q.device)
        distance = step[:, None] - step[None, :]
        position = self.pos_weight[distance.clamp(min=0)].masked_fill(distance < 0, -torch.inf)
        # Half the time of indexing, forward and backward, on the CPU.
        time = self.time_weight.index_select(0, bucket.flatten()).view_as(bucket)
        queries, keys, values = (part.transpose(1, 2) for part in (q, k, v))
        scores = (queries @ keys.transpose(-1, -2) + (position + time)[:, None]) * self.qk_dim**-0.5
        return (scores.softmax(-1) @ values).transpose(1, 2).flatten(0, 1)

    def encode(
        self, x: Tensor, query_times: Tensor, key_times: Tensor, past_k: Tensor, past_v: Tensor, *, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows, k and v of one user's new tokens, as `HSTULayer.encode` says."""
        asked = x[-1:] if last else x
        u, v, q, k = self._project(asked, "reference")
        if last:
            k, v = self._keys_values(x, "reference")
            query_times = query_times[-1:]
        num_keys = key_times.shape[0]
        row = torch.arange(asked.shape[0], device=x.device) + (num_keys - asked.shape[0])
        distance = (row[:, None] - torch.arange(num_keys, device=x.device)[None, :]).clamp(min=0)
        bias = self.pos_weight[distance] + self.time_weight[pairwise_time_buckets(query_times, key_times)]
        attention = softmax_attend_new(q, torch.cat([past_k, k]), torch.cat([past_v, v]), bias)
        return self._combine(asked, attention, u, "reference"), k, v

    def _attend_candidates(
        self, q: Tensor, k: Tensor, v: Tensor, request_times: Tensor, past: PaddedPast, layer: int
    ) -> Tensor:
        """Return the attention of candidates, as `HSTULayer._attend_candidates` says."""
        places = torch.arange(past.times.shape[1], device=q.device)
        distance = (past.num_tokens[:, None] - places).clamp(min=0)
        time = self.time_weight[pairwise_time_buckets(request_times[:, None], past.times)]
        bias, own_bias = self.pos_weight[distance][:, None] + time, self.pos_weight[0] + self.time_weight[0]
        return softmax_attend_candidates(q, k, v, past.k[layer], past.v[layer], bias, own_bias, past.num_tokens)


class HSTUSoftmax(HSTU):
    """A stack of softmax layers with dropout on its input. Served user by user: the cached kernels know SiLU alone."""

    encode_paged = Encoder.encode_paged
    score_paged = Encoder.score_paged

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(SoftmaxHSTULayer(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor, jagged: JaggedTimes, rows: Tensor | None = None) -> Tensor:
        """Return rows [L, d] of jagged sequences of token vectors x [L, d], or [R, d] of the tokens `rows` alone."""
        blocks = Blocks.of(jagged.seq_offsets)
        buckets = block_buckets(blocks, jagged)
        x = F.dropout(x, self.dropout, self.training).index_select(0, blocks.source)
        *below, last = cast("list[SoftmaxHSTULayer]", self._stack())
        for layer in below:
            x = layer.in_blocks(x, blocks, buckets, None)
        return last.in_blocks(x, blocks, buckets, blocks.place if rows is None else blocks.place[rows])

"""GRU4Rec: a recurrent encoder; what it knows of the past is one vector, so it keeps no K/V and is not served.

Invariant: tokens go through the recurrence without padding: step by step over all users that are still there.

Legend: L tokens, B users, d embedding_dim.
Source: Hidasi et al., "Session-based Recommendations with Recurrent Neural Networks", ICLR 2016.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from gr_platform.models.config import ModelConfig
from gr_platform.models.encoder import Encoder
from gr_platform.models.softmax_encoder import linear
from kernels import JaggedTimes


def step_order(seq_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens by step, longest user first in each, int64 [L], and the number of users at each step.

    seq_offsets int64 [B + 1]. The order is what a `PackedSequence` asks for.
    """
    lengths = seq_offsets.diff()
    rank = torch.empty_like(lengths)
    rank[lengths.argsort(descending=True, stable=True)] = torch.arange(len(lengths), device=lengths.device)
    num_tokens = int(seq_offsets[-1])
    step = torch.arange(num_tokens, device=lengths.device) - seq_offsets[:-1].repeat_interleave(lengths)
    order = (step * len(lengths) + rank.repeat_interleave(lengths)).argsort()
    return order, step.bincount().cpu()


class GRU4Rec(Encoder):
    """`num_layers` GRUs of width d with dropout before each, and a linear layer on the last."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, self.dropout = config.embedding_dim, config.dropout
        between = config.dropout if config.num_layers > 1 else 0.0
        self.gru = nn.GRU(d, d, num_layers=config.num_layers, dropout=between)
        self.output = linear(d, d, bias=True)

    def forward(self, x: Tensor, jagged: JaggedTimes, rows: Tensor | None = None) -> Tensor:
        """Return rows [L, d] of jagged sequences of token vectors x [L, d], or [R, d] of the tokens `rows` alone."""
        order, batch_sizes = step_order(jagged.seq_offsets)
        steps = F.dropout(x, self.dropout, self.training).index_select(0, order)
        hidden = self.gru(PackedSequence(steps, batch_sizes))[0].data
        place = order.argsort()
        return self.output(hidden.index_select(0, place if rows is None else place[rows])).to(x.dtype)

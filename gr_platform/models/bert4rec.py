"""BERT4Rec: a bidirectional Transformer that is trained to name hidden items from what stands on both sides of them.

Invariant: the item and action of a hidden event never reach the encoder; what is hidden is drawn from torch's global
generator of the CPU, which the trainer seeds.

Legend: L events of the batch, T tokens, B users, d embedding_dim.
Source: Sun et al., "BERT4Rec", CIKM 2019. Ours: pre-norm, the cosine softmax loss of the other retrieval models.
"""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from gr_platform.errors import UserError
from gr_platform.models.batch import EventBatch
from gr_platform.models.config import ModelConfig
from gr_platform.models.encoder import Encoder
from gr_platform.models.features import FeatureTables
from gr_platform.models.retrieval import RetrievalModel, unit
from gr_platform.models.sasrec import NORM_EPS, feed_forward
from gr_platform.models.softmax_encoder import Layer, SoftmaxEncoder
from gr_platform.models.tokens import EVENT

HIDDEN_SHARE = 0.2


class BidirectionalEncoder(SoftmaxEncoder):
    """LayerNorm, softmax attention over the whole sequence, GELU feed-forward of width `ffn_dim` (default 4 d)."""

    def __init__(self, config: ModelConfig) -> None:
        d = config.embedding_dim
        norm = partial(nn.LayerNorm, eps=NORM_EPS)
        layers = [
            Layer(config, norm, feed_forward(config, config.ffn_dim or 4 * d, nn.GELU()), bias=True)
            for _ in range(config.num_layers)
        ]
        super().__init__(config, layers, norm(d))


class BERT4Rec(RetrievalModel):
    """Hidden events are the targets; a user is asked for by a hidden event at the request's time behind the history."""

    def __init__(
        self,
        config: ModelConfig,
        encoder: Encoder,
        *,
        num_rows: int,
        first_item: int,
        num_actions: int,
        features: FeatureTables | None = None,
    ) -> None:
        super().__init__(
            config, encoder, num_rows=num_rows, first_item=first_item, num_actions=num_actions, features=features
        )
        d = config.embedding_dim
        self.hidden_item = nn.Parameter(torch.empty(d).normal_(std=0.02 * math.sqrt(d)))

    def loss(self, batch: EventBatch, *, negatives: Tensor | None, positive_mask: int) -> tuple[Tensor, int]:
        """Return the sum of the softmax losses of the hidden events and their number.

        Hidden are each user's last event, where serving asks, and a share of HIDDEN_SHARE of the others, as far as they
        have an action of `positive_mask`. negatives int64 [M]: item rows shared by all targets; None for every item.
        Raises UserError for negatives [targets, M], since the targets are drawn here.
        """
        if negatives is not None and negatives.dim() != 1:
            raise UserError(
                "bert4rec draws its own targets, so negatives cannot be drawn for each of them beforehand; "
                "set negatives to 'all' or 'shared' in its recipe"
            )
        hidden = torch.rand(len(batch.items)) < HIDDEN_SHARE
        hidden[batch.offsets[1:][batch.offsets.diff() > 0] - 1] = True
        hidden &= (batch.actions & positive_mask) != 0
        return self._summed(unit(self._hidden_rows(batch, hidden)), batch.items[hidden], negatives)

    def user_vectors(self, batch: EventBatch) -> Tensor:
        """Return normalised vectors [B, d] of the users, looking from their request times."""
        ends, at = batch.offsets[1:].numpy(), batch.request_times.numpy()
        items, actions = (np.insert(values.numpy(), ends, 0) for values in (batch.items, batch.actions))
        offsets = batch.offsets.numpy() + np.arange(len(batch) + 1)
        asked = EventBatch.of_arrays(offsets, (items, actions, np.insert(batch.times.numpy(), ends, at)), at)
        hidden = torch.zeros(len(items), dtype=torch.bool)
        hidden[asked.offsets[1:] - 1] = True
        return unit(self._hidden_rows(asked, hidden))

    def _hidden_rows(self, batch: EventBatch, hidden: Tensor) -> Tensor:
        """Return the rows of the hidden events, bool [L], in order."""
        tokens = batch.tokens("retrieval", self.embedding.device)
        hidden_tokens = torch.zeros_like(tokens.kinds, dtype=torch.bool)
        hidden_tokens[tokens.kinds == EVENT] = hidden.to(hidden_tokens.device)
        items, actions = (values.masked_fill(hidden_tokens, 0) for values in (tokens.items, tokens.actions))
        x = self.embedding(tokens.kinds, items, actions, tokens.positions, tokens.jagged.times)
        x = x + hidden_tokens[:, None].to(x.dtype) * self.hidden_item
        return self.encoder(x, tokens.jagged, hidden_tokens.nonzero()[:, 0])

"""Retrieval: which item comes next, from merged tokens that look from the time of the next event.

Invariant: a score is the dot product of a normalised user vector and a normalised item vector over the temperature, so
serving needs the item vectors and the last token's row alone.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr_platform.models.batch import EventBatch
from gr_platform.models.config import ModelConfig
from gr_platform.models.embeddings import TokenEmbedding
from gr_platform.models.hstu import HSTU

UNIT_EPS = 1e-6


def unit(x: Tensor) -> Tensor:
    """Return x with rows of length one (eps 1e-6)."""
    return x / torch.clamp(torch.linalg.vector_norm(x, dim=-1, keepdim=True), min=UNIT_EPS)


class RetrievalModel(nn.Module):
    """HSTU over start, event_0, event_1, ...; token i predicts event i, the start token the first."""

    def __init__(self, config: ModelConfig, *, num_rows: int, first_item: int, num_actions: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config, num_rows=num_rows, first_item=first_item, num_actions=num_actions)
        self.encoder = HSTU(config)

    def _rows(self, batch: EventBatch) -> tuple[Tensor, Tensor]:
        tokens = batch.tokens("retrieval")
        x = self.embedding(tokens.kinds, tokens.items, tokens.actions, tokens.positions)
        return self.encoder(x, tokens.jagged), tokens.jagged.seq_offsets

    def loss(self, batch: EventBatch, *, negatives: Tensor, positive_mask: int) -> tuple[Tensor, int]:
        """Return the mean sampled-softmax loss and the number of targets.

        negatives int64 [M]: item rows shared by all targets; where one equals the target it is masked. Events without
        an action of `positive_mask` are not targets.
        """
        rows, seq_offsets = self._rows(batch)
        # Every token but a user's last one has the following event as its target, and those are the events in order.
        predicts = torch.ones(len(rows), dtype=torch.bool)
        predicts[seq_offsets[1:] - 1] = False
        is_target = (batch.actions & positive_mask) != 0
        users, targets = unit(rows[predicts][is_target]), batch.items[is_target]
        candidates = unit(self.embedding.items.lookup(negatives))
        positive = (users * unit(self.embedding.items.lookup(targets))).sum(-1, keepdim=True)
        negative = (users @ candidates.T).masked_fill(targets[:, None] == negatives[None, :], float("-inf"))
        logits = torch.cat([positive, negative], dim=1) / self.config.temperature
        if not len(logits):
            return rows.sum() * 0.0, 0
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64)), len(logits)

    def user_vectors(self, batch: EventBatch) -> Tensor:
        """Return normalised vectors [B, d] of the users, looking from their request times."""
        rows, seq_offsets = self._rows(batch)
        return unit(rows[seq_offsets[1:] - 1])

    def item_vectors(self) -> Tensor:
        """Return the normalised item vectors [num_rows, d]; padding is zero."""
        return unit(self.embedding.items.all_rows())

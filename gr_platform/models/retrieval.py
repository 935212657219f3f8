"""Retrieval: which item comes next, from merged tokens that look from the time of the next event.

Invariant: a score is the dot product of a normalised user vector and a normalised item vector over the temperature, so
serving needs the item vectors and the last token's row alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gr_platform.models.batch import EventBatch, TokenBatch
from gr_platform.models.config import ModelConfig
from gr_platform.models.embeddings import TokenEmbedding
from gr_platform.models.encoder import Encoder
from gr_platform.models.features import FeatureTables
from kernels import full_softmax, sampled_softmax

UNIT_EPS = 1e-6


def unit(x: Tensor) -> Tensor:
    """Return x with rows of length one (eps 1e-6), in fp32 or wider: of what autocast made short, too."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / torch.clamp(torch.linalg.vector_norm(x, dim=-1, keepdim=True), min=UNIT_EPS)


def target_events(batch: EventBatch, positive_mask: int) -> Tensor:
    """Return which answers [L] of the batch are targets: those with an action of `positive_mask`."""
    return (batch.target_actions & positive_mask) != 0


class RetrievalModel(nn.Module):
    """An encoder over start, event_0, event_1, ...; token i predicts event i, the start token the first."""

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
        super().__init__()
        self.config, self.num_rows, self.first_item = config, num_rows, first_item
        self.embedding = TokenEmbedding(
            config, num_rows=num_rows, first_item=first_item, num_actions=num_actions, features=features
        )
        self.encoder = encoder

    def _rows(self, batch: EventBatch, choose: Callable[[TokenBatch], Tensor]) -> Tensor:
        """Return the rows of the tokens that `choose` names."""
        tokens = batch.tokens("retrieval", self.embedding.device)
        x = self.embedding(
            tokens.kinds, tokens.items, tokens.actions, tokens.positions, tokens.jagged.times, tokens.codes
        )
        return self.encoder(x, tokens.jagged, choose(tokens).to(x.device))

    def loss(self, batch: EventBatch, *, negatives: Tensor | None, positive_mask: int) -> tuple[Tensor, int]:
        """Return the sum of the targets' softmax losses and the number of targets.

        negatives int64: item rows, [M] shared by all targets or [targets, M], masked where one equals its target; None
        for every item. Events without an action of `positive_mask` are not targets.
        """
        is_target = target_events(batch, positive_mask)
        users = unit(self._rows(batch, lambda tokens: tokens.answers[is_target]))
        return self._summed(users, batch.target_items[is_target], negatives)

    def _summed(self, users: Tensor, targets: Tensor, negatives: Tensor | None) -> tuple[Tensor, int]:
        """Return the sum of the losses of users [T, d] and T; targets int64 [T] and negatives are in main memory."""
        if not len(targets):
            return users.sum() * 0.0, 0
        targets = targets.to(users.device)
        if negatives is None:
            return self._full_losses(users, targets).sum(), len(targets)
        items, targets, negatives = self._drawn(targets, negatives.to(users.device))
        return self._losses(users, items, targets, negatives).sum(), len(targets)

    def _full_losses(self, users: Tensor, targets: Tensor) -> Tensor:
        items, backend = self.item_vectors(), self.encoder.backend
        return full_softmax(users, items, targets, self.config.temperature, first_item=self.first_item, backend=backend)

    def _losses(self, users: Tensor, items: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
        backend = self.encoder.backend
        return sampled_softmax(users, items, targets, negatives, self.config.temperature, backend=backend)

    def _drawn(self, targets: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised item vectors [V, d] and the rows of targets and negatives in them.

        The vectors are the whole table, or the drawn rows alone where that is less to normalise.
        """
        if self.num_rows <= len(targets) + negatives.numel():
            return self.item_vectors(), targets, negatives
        rows, places = torch.unique(torch.cat([targets, negatives.flatten()]), return_inverse=True)
        targets, negatives = places[: len(targets)], places[len(targets) :].view(negatives.shape)
        return unit(self.embedding.items.lookup(rows)), targets, negatives

    def user_vectors(self, batch: EventBatch) -> Tensor:
        """Return normalised vectors [B, d] of the users, looking from their request times."""
        return unit(self._rows(batch, lambda tokens: tokens.last))

    def item_vectors(self) -> Tensor:
        """Return the normalised item vectors [num_rows, d]; padding is zero."""
        return unit(self.embedding.items.all_rows())

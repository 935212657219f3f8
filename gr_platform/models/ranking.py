"""Ranking: what a user does with an item, from interleaved item and action tokens in their own time.

Invariant: the prediction for an event is made at its item token, before its action token, so it never sees the answer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr_platform.models.batch import EventBatch, History
from gr_platform.models.config import ModelConfig
from gr_platform.models.embeddings import TokenEmbedding
from gr_platform.models.encoder import Encoder
from gr_platform.models.tokens import ITEM


class RankingModel(nn.Module):
    """An encoder over start, item_0, action_0, item_1, action_1, ... with one head per task."""

    def __init__(
        self,
        config: ModelConfig,
        encoder: Encoder,
        *,
        num_rows: int,
        first_item: int,
        num_actions: int,
        tasks: list[str],
    ) -> None:
        super().__init__()
        self.config, self.tasks = config, list(tasks)
        self.embedding = TokenEmbedding(config, num_rows=num_rows, first_item=first_item, num_actions=num_actions)
        self.encoder = encoder
        d = config.embedding_dim
        self.heads = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, len(tasks)))

    def logits(self, batch: EventBatch) -> Tensor:
        """Return logits [L, tasks] of every event, in order; row i knows the events before i and item i."""
        tokens = batch.tokens("ranking")
        x = self.embedding(tokens.kinds, tokens.items, tokens.actions, tokens.positions)
        return self.heads(self.encoder(x, tokens.jagged, (tokens.kinds == ITEM).nonzero()[:, 0]))

    def loss(self, batch: EventBatch, *, task_masks: list[int]) -> tuple[Tensor, int]:
        """Return the sum over events of the mean binary cross entropy over tasks, and the number of events.

        task_masks: for each task the bitmask of the actions that count; an event without one of them is a negative.
        """
        masks = torch.tensor(task_masks, dtype=torch.int64)
        labels = (batch.actions[:, None] & masks[None, :]) != 0
        logits = self.logits(batch)
        losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
        return losses / len(self.tasks), len(logits)

    @torch.no_grad()
    def score(self, batch: EventBatch, candidates: Tensor) -> Tensor:
        """Return probabilities [B, C, tasks] of candidates int64 [B, C], a full forward each: slow, obviously right."""
        each = zip(batch.histories, batch.request_times.split(1), candidates, strict=True)
        return torch.stack([self._score_user(*user) for user in each])

    def _score_user(self, history: History, at: Tensor, candidates: Tensor) -> Tensor:
        items, actions, times = (torch.from_numpy(part) for part in history)
        nothing = torch.zeros(1, dtype=torch.int64)
        extended = [
            (
                torch.cat([items, candidate[None]]).numpy(),
                torch.cat([actions, nothing]).numpy(),
                torch.cat([times, at]).numpy(),
            )
            for candidate in candidates
        ]
        if not extended:
            return torch.zeros(0, len(self.tasks))
        full = EventBatch.of(extended, at.expand(len(extended)).numpy())
        return torch.sigmoid(self.logits(full)[full.offsets[1:] - 1])

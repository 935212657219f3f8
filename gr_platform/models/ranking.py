"""Ranking: what a user does with an item, from interleaved item and action tokens in their own time.

Invariant: the prediction for an event is made at its item token, before its action token, so it never sees the answer.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gr_platform.models.batch import EventBatch
from gr_platform.models.config import ModelConfig
from gr_platform.models.embeddings import TokenEmbedding
from gr_platform.models.encoder import Encoder
from gr_platform.models.features import FeatureTables


class Calibration(nn.Module):
    """What makes a task's logits speak of its true rate: scale * logit + shift, fitted after training.

    scale, shift: float [tasks], 1 and 0 while weights are found (training/calibration.py fits them).
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(num_tasks))
        self.register_buffer("shift", torch.zeros(num_tasks))
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, logits: Tensor) -> Tensor:
        """Return the calibrated logits [..., tasks]."""
        return logits * self.scale + self.shift


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
        features: FeatureTables | None = None,
    ) -> None:
        super().__init__()
        self.config, self.num_rows, self.tasks = config, num_rows, list(tasks)
        self.embedding = TokenEmbedding(
            config, num_rows=num_rows, first_item=first_item, num_actions=num_actions, features=features
        )
        self.encoder = encoder
        d = config.embedding_dim
        self.heads = nn.Sequential(
            nn.LayerNorm(d), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, len(tasks)), Calibration(len(tasks))
        )

    @property
    def calibration(self) -> Calibration:
        """The last part of the heads."""
        return cast(Calibration, self.heads[-1])

    def logits(self, batch: EventBatch) -> Tensor:
        """Return logits [L, tasks] of every event, in order; row i knows the events before i and item i."""
        tokens = batch.tokens("ranking", self.embedding.device)
        x = self.embedding(
            tokens.kinds, tokens.items, tokens.actions, tokens.positions, tokens.jagged.times, tokens.codes
        )
        return self.heads(self.encoder(x, tokens.jagged, tokens.answers.to(x.device)))

    def loss(self, batch: EventBatch, *, task_masks: list[int]) -> tuple[Tensor, int]:
        """Return the sum over events of the mean binary cross entropy over tasks, and the number of events.

        task_masks: for each task the bitmask of the actions that count; an event without one of them is a negative.
        """
        masks = torch.tensor(task_masks, dtype=torch.int64)
        labels = (batch.actions[:, None] & masks[None, :]) != 0
        logits = self.logits(batch)
        losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="sum")
        return losses / len(self.tasks), len(logits)

    @torch.no_grad()
    def score(self, batch: EventBatch, candidates: Tensor) -> Tensor:
        """Return probabilities [B, C, tasks] of candidates int64 [B, C], a full forward each: slow, obviously right."""
        return torch.stack([self._score_user(batch, user, asked) for user, asked in enumerate(candidates)])

    def _score_user(self, batch: EventBatch, user: int, candidates: Tensor) -> Tensor:
        if not len(candidates):
            return torch.zeros(0, len(self.tasks), device=self.embedding.device)
        asked = batch.asked(user, candidates)
        return torch.sigmoid(self.logits(asked)[asked.offsets[1:].to(self.embedding.device) - 1])

"""Tokens become vectors.

Invariant: models and losses reach item vectors through `EmbeddingTable.lookup` and `.all_rows`, never through a weight,
so that a table sharded by rows can take its place.
"""

import math

import torch
from torch import Tensor, nn

from gr_platform.models.config import ModelConfig
from gr_platform.models.tokens import ACTION, EVENT, ITEM, START

NUM_KINDS = len((START, ITEM, ACTION, EVENT))


class EmbeddingTable(nn.Module):
    """Item vectors, float [num_rows, d]; row 0 is padding and stays zero, out-of-vocabulary rows start at zero."""

    def __init__(self, num_rows: int, embedding_dim: int, first_item: int) -> None:
        super().__init__()
        weight = torch.empty(num_rows, embedding_dim).normal_(std=0.02)
        weight[:first_item] = 0.0
        self.weight = nn.Parameter(weight)

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the vectors [..., d] of row numbers int64 [...]."""
        return nn.functional.embedding(ids, self.weight, padding_idx=0)

    def all_rows(self) -> Tensor:
        """Return the whole table [num_rows, d]."""
        return self.weight


class TokenEmbedding(nn.Module):
    """Sum of item vector * sqrt(d), the vectors of the actions in the mask, the token's kind, and its position."""

    def __init__(self, config: ModelConfig, *, num_rows: int, first_item: int, num_actions: int) -> None:
        super().__init__()
        embedding_dim = config.embedding_dim
        self.items = EmbeddingTable(num_rows, embedding_dim, first_item)
        self.use_actions = config.use_actions
        self.actions = nn.Parameter(
            torch.empty(num_actions, embedding_dim).normal_(std=0.02 * math.sqrt(embedding_dim)),
            requires_grad=config.use_actions,
        )
        self.kinds = nn.Parameter(torch.empty(NUM_KINDS, embedding_dim).normal_(std=0.02))
        self.positions = (
            nn.Parameter(torch.empty(config.max_seq_len, embedding_dim).normal_(std=0.02))
            if config.absolute_position
            else None
        )
        self.scale = math.sqrt(embedding_dim)
        self.register_buffer("action_bits", 2 ** torch.arange(num_actions, dtype=torch.int64), persistent=False)
        self.action_bits: Tensor

    def forward(self, kinds: Tensor, items: Tensor, actions: Tensor, positions: Tensor) -> Tensor:
        """Return token vectors [L, d]; all arguments int64 [L], positions counted from the start of the sequence."""
        # Division, not a shift: ONNX shifts unsigned integers only.
        vectors = self.items.lookup(items) * self.scale + self.kinds[kinds]
        if self.use_actions:
            has_action = (actions[:, None] // self.action_bits) % 2
            vectors = vectors + has_action.to(self.kinds.dtype) @ self.actions
        return vectors if self.positions is None else vectors + self.positions[positions]

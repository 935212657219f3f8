"""Tokens become vectors.

Invariant: models and losses reach item vectors through `EmbeddingTable.lookup` and `.all_rows`, never through a weight,
so that a table sharded by rows can take its place.

Legend: L tokens, R rows of side information of items, F item features, d embedding_dim.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from gr_platform.models.config import ModelConfig
from gr_platform.models.features import FeatureTables, keys_of
from gr_platform.models.tokens import ACTION, EVENT, ITEM, START

# Without the kind of slow series, which only models that read them have a row for.
NUM_KINDS = len((START, ITEM, ACTION, EVENT))


class EmbeddingTable(nn.Module):
    """Item vectors, float [num_rows, d]; row 0 is padding and stays zero, out-of-vocabulary rows start at zero."""

    def __init__(self, num_rows: int, embedding_dim: int, first_item: int) -> None:
        super().__init__()
        weight = torch.empty(num_rows, embedding_dim).normal_(std=0.02)
        weight[:first_item] = 0.0
        self.weight = nn.Parameter(weight)

    def lookup(self, ids: Tensor, times: Tensor | None = None) -> Tensor:
        """Return the vectors [..., d] of row numbers int64 [...], as the items were at times int64 [...] ms, or as they
        were last known."""
        return nn.functional.embedding(ids, self.weight, padding_idx=0)

    def all_rows(self) -> Tensor:
        """Return the whole table [num_rows, d], the items as they were last known."""
        return self.weight


class FeatureVectors(nn.Module):
    """Vectors of one feature's codes: the sum over the parts of a value. words: see `words_of`; one is for tests."""

    def __init__(self, words: Tensor, embedding_dim: int, std: float) -> None:
        super().__init__()
        weight = torch.empty(int(words.max()) + 1, embedding_dim).normal_(std=std)
        weight[0] = 0.0
        self.weight = nn.Parameter(weight)
        self.register_buffer("words", words)
        self.words: Tensor

    def forward(self, codes: Tensor) -> Tensor:
        """Return vectors [..., d] of codes int64 [...]; zero for 0 and for codes that came up after training."""
        met = torch.where(codes < len(self.words), codes, 0)
        if self.words.shape[1] == 1:
            return nn.functional.embedding(self.words[met, 0], self.weight, padding_idx=0)
        # Of all values at once: there are fewer of them than tokens in a batch.
        vectors = nn.functional.embedding(self.words, self.weight, padding_idx=0).sum(1)
        return nn.functional.embedding(met, vectors)


class FeaturedTable(EmbeddingTable):
    """Item vectors that are an item's own plus those of what is known of it: rows as in `FeatureTables`."""

    def __init__(
        self, num_rows: int, embedding_dim: int, first_item: int, tables: FeatureTables, keys: tuple[str, ...]
    ) -> None:
        super().__init__(num_rows, embedding_dim, first_item)
        self.features = nn.ModuleDict({key: FeatureVectors(tables.words[key], embedding_dim, 0.02) for key in keys})
        self.register_buffer("starts", tables.item_starts)
        self.register_buffer("times", tables.item_times)
        self.register_buffer("codes", tables.item_codes)
        self.starts: Tensor
        self.times: Tensor
        self.codes: Tensor
        # Halvings that find a place among the rows of any item.
        self.num_halvings = int(tables.item_starts.diff().max()).bit_length()

    def lookup(self, ids: Tensor, times: Tensor | None = None) -> Tensor:
        """Return vectors as `EmbeddingTable.lookup` does."""
        low, stop = self.starts[ids], self.starts[ids + 1]
        behind = stop if times is None else self._first_later(low, stop, times)
        vectors, known = super().lookup(ids), behind > low
        if not len(self.times):
            return vectors
        codes = torch.where(known[..., None], self.codes[(behind - 1).clamp(min=0)], 0)
        for column, feature in enumerate(self.features.values()):
            vectors = vectors + feature(codes[..., column])
        return vectors

    def all_rows(self) -> Tensor:
        """Return the whole table [num_rows, d], the items as they were last known."""
        return self.lookup(torch.arange(len(self.weight), device=self.weight.device))

    def _first_later(self, low: Tensor, high: Tensor, times: Tensor) -> Tensor:
        """Return the first of rows low..high - 1 that is later than `times`, or high. A binary search: it exports."""
        for _ in range(self.num_halvings):
            middle = (low + high) // 2
            later = (middle >= high) | (self.times[middle.clamp(max=len(self.times) - 1)] > times)
            low, high = torch.where(later, low, middle + 1), torch.where(later, middle, high)
        return low


class TokenEmbedding(nn.Module):
    """Sum of item vector * sqrt(d), the vectors of the actions in the mask, the token's kind, its position, and its
    features."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_rows: int,
        first_item: int,
        num_actions: int,
        features: FeatureTables | None = None,
    ) -> None:
        super().__init__()
        embedding_dim = config.embedding_dim
        items, besides = keys_of(config)
        if (items or besides) and features is None:
            raise ValueError(f"features is None, must hold what the model reads: {', '.join((*items, *besides))}")
        self.items = (
            FeaturedTable(num_rows, embedding_dim, first_item, features, items)
            if items and features
            else EmbeddingTable(num_rows, embedding_dim, first_item)
        )
        self.use_actions = config.use_actions
        self.actions = nn.Parameter(
            torch.empty(num_actions, embedding_dim).normal_(std=0.02 * math.sqrt(embedding_dim)),
            requires_grad=config.use_actions,
        )
        num_kinds = NUM_KINDS + bool(config.user_features)
        self.kinds = nn.Parameter(torch.empty(num_kinds, embedding_dim).normal_(std=0.02))
        self.positions = (
            nn.Parameter(torch.empty(config.max_seq_len, embedding_dim).normal_(std=0.02))
            if config.absolute_position
            else None
        )
        self.scale = math.sqrt(embedding_dim)
        self.register_buffer("action_bits", 2 ** torch.arange(num_actions, dtype=torch.int64), persistent=False)
        self.action_bits: Tensor
        words = features.words if features else {}
        self.features = nn.ModuleDict(
            {key: FeatureVectors(words[key], embedding_dim, 0.02 * self.scale) for key in besides}
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are, and a model's other ones too."""
        return self.kinds.device

    def forward(
        self,
        kinds: Tensor,
        items: Tensor,
        actions: Tensor,
        positions: Tensor,
        times: Tensor | None = None,
        codes: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return token vectors [L, d]; all arguments int64 [L], positions counted from the start of the sequence.

        times: of the tokens, ms, for a model with item features; codes: of contexts and users (`keys_of`).
        Raises ValueError for features that the model reads and is not given.
        """
        if times is None and isinstance(self.items, FeaturedTable):
            raise ValueError("times is None, must be the tokens' times: item features are those known at a token")
        if missing := [key for key in self.features if key not in (codes or {})]:
            raise ValueError(f"codes lacks {', '.join(missing)}, which the model reads: batches must carry them")
        # Division, not a shift: ONNX shifts unsigned integers only.
        vectors = self.items.lookup(items, times) * self.scale + self.kinds[kinds]
        if self.use_actions:
            has_action = (actions[:, None] // self.action_bits) % 2
            vectors = vectors + has_action.to(self.kinds.dtype) @ self.actions
        for key, feature in self.features.items():
            vectors = vectors + feature(cast("Mapping[str, Tensor]", codes)[key])
        return vectors if self.positions is None else vectors + self.positions[positions]

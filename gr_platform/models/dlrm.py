"""DLRM: the impression-level ranking model that generative rankers replace: made features, crosses, MLPs.

Invariant: row i is made of the events before i and of item i; neither its own action nor anything later enters it. No
loop over events: what came before is a difference of running sums, in int64 or fp64, so it is exact whoever else is in
the batch.

A user is what the log tells: the mean of the last events, the mean of all items with each action, how often each action
was done so far, and with this very item, and how long ago the last event was. A user id has no vector: most users are
new to a model. Categorical vectors and that of the bottom MLP are crossed by dot products; the top MLP gives one output
a task.

Legend: L events of the batch, A actions, F vectors to cross, d embedding_dim.
Source: Naumov et al., "Deep Learning Recommendation Model", 2019.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from gr_platform.models.batch import EventBatch
from gr_platform.models.config import ModelConfig
from gr_platform.models.embeddings import TokenEmbedding
from gr_platform.models.features import FeatureTables, context_key
from gr_platform.models.ranking import Calibration, RankingModel
from gr_platform.models.softmax_encoder import linear
from gr_platform.models.tokens import EVENT, ITEM

# How many of the last events make up the user's present interest.
LAST_EVENTS = 20


def sums_before(x: Tensor, begin: Tensor) -> Tensor:
    """Return for each row i the sum of rows begin[i]..i-1 of x [L, ...], same dtype; begin int64 [L]."""
    total = torch.cat([x.new_zeros((1, *x.shape[1:])), x.cumsum(0)])
    return total[:-1] - total.index_select(0, begin)


def user_begins(offsets: Tensor) -> Tensor:
    """Return where the user of each row begins, int64 [L]; offsets int64 [B + 1]."""
    return offsets[:-1].repeat_interleave(offsets.diff())


def same_item_counts(items: Tensor, bits: Tensor, user_begin: Tensor) -> Tensor:
    """Return how often each row's user did each action with its item before, int64 [L, A]; bits int64 [L, A]."""
    row = torch.arange(len(items), device=items.device)
    by_user_and_item = items.argsort(stable=True)
    by_user_and_item = by_user_and_item[user_begin[by_user_and_item].argsort(stable=True)]
    user, item = user_begin[by_user_and_item], items[by_user_and_item]
    first = torch.ones_like(item, dtype=torch.bool)
    first[1:] = (item[1:] != item[:-1]) | (user[1:] != user[:-1])
    begin = torch.where(first, row, 0).cummax(0).values
    counts = torch.empty_like(bits)
    counts[by_user_and_item] = sums_before(bits[by_user_and_item], begin)
    return counts


def mlp(widths: list[int], dropout: float) -> nn.Sequential:
    """Return linear layers of these widths with ReLU and dropout between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.ReLU(), nn.Dropout(dropout), linear(inputs, outputs, bias=True)]
    return nn.Sequential(*layers[2:])


class DLRM(RankingModel):
    """Loss and score are those of `RankingModel`; `ffn_dim` is the width of the MLPs (default 4 d)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_rows: int,
        first_item: int,
        num_actions: int,
        tasks: list[str],
        features: FeatureTables | None = None,
    ) -> None:
        # Of RankingModel's parts it has all but the encoder, and heads of its own.
        nn.Module.__init__(self)
        self.config, self.num_rows, self.tasks = config, num_rows, list(tasks)
        self.embedding = TokenEmbedding(
            config, num_rows=num_rows, first_item=first_item, num_actions=num_actions, features=features
        )
        d, width = config.embedding_dim, config.ffn_dim or 4 * config.embedding_dim
        num_vectors, num_numbers = 3 + num_actions, 2 + 2 * num_actions
        self.bottom = mlp([num_numbers, width, d], config.dropout)
        top = mlp([d + num_vectors * (num_vectors - 1) // 2, width, width // 2, len(tasks)], config.dropout)
        self.heads = nn.Sequential(*top, Calibration(len(tasks)))
        self.register_buffer("crosses", torch.triu_indices(num_vectors, num_vectors, 1), persistent=False)
        self.crosses: Tensor

    def logits(self, batch: EventBatch) -> Tensor:
        """Return logits [L, tasks] of every event, in order; row i knows the events before i and item i."""
        batch = batch.moved(self.embedding.device)
        begin = user_begins(batch.offsets)
        bits = (batch.actions[:, None] // self.embedding.action_bits) % 2
        items = self._vectors(batch, begin, ITEM, torch.zeros_like(batch.actions))
        dense = self.bottom(self._numbers(batch, begin, bits).to(items.dtype))
        events = self._vectors(batch, begin, EVENT, batch.actions)
        vectors = torch.cat([items[:, None], dense[:, None], _interests(items, events, begin, bits)], dim=1)
        products = vectors @ vectors.transpose(1, 2)
        return self.heads(torch.cat([dense, products[:, self.crosses[0], self.crosses[1]]], dim=1))

    def _vectors(self, batch: EventBatch, begin: Tensor, kind: int, actions: Tensor) -> Tensor:
        """Return the embedding [L, d] of each event as a token of this kind with these actions."""
        position = torch.arange(len(begin), device=begin.device) - begin
        codes = {context_key(name): values for name, values in batch.context.items()}
        return self.embedding(torch.full_like(begin, kind), batch.items, actions, position, batch.times, codes)

    @staticmethod
    def _numbers(batch: EventBatch, begin: Tensor, bits: Tensor) -> Tensor:
        """Return the numeric features, logarithms of 1 + counts and seconds, float32 [L, 2 + 2 A]."""
        row = torch.arange(len(begin), device=begin.device)
        since_last = batch.times - batch.times[(row - 1).clamp(min=0)]
        seconds = torch.where(row > begin, since_last, 0).clamp(min=0)[:, None] / 1000.0
        counts = [(row - begin)[:, None], sums_before(bits, begin), same_item_counts(batch.items, bits, begin)]
        return torch.log1p(torch.cat([seconds, *counts], dim=1))


def _interests(items: Tensor, events: Tensor, begin: Tensor, bits: Tensor) -> Tensor:
    """Return means [L, 1 + A, d] of earlier vectors [L, d]: of the last events, and of the items with each action."""
    row = torch.arange(len(begin), device=begin.device)
    recent = torch.maximum(begin, row - LAST_EVENTS)
    sums, counts = [sums_before(events.double(), recent)], [row - recent]
    for did in bits.T:
        sums.append(sums_before(items.double() * did[:, None], begin))
        counts.append(sums_before(did, begin))
    means = torch.stack(sums, 1) / torch.stack(counts, 1).clamp(min=1)[..., None]
    return means.to(items.dtype)

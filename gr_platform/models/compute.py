"""`Compute` over a torch model: the reference that the exported graphs are compared with, in any float type."""

import numpy as np
import torch
from torch import Tensor

from gr_platform.bundle.compute import KV
from gr_platform.models.build import Model
from gr_platform.models.ranking import RankingModel
from gr_platform.models.tokens import ITEM, Tokens


def encode_tokens(
    model: Model,
    kinds: Tensor,
    items: Tensor,
    actions: Tensor,
    times: Tensor,
    query_times: Tensor,
    past: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, k, v of new tokens after `past` = (times, k, v): the graph that is exported as encode.onnx."""
    past_times, past_k, past_v = past
    positions = past_times.shape[0] + torch.arange(kinds.shape[0])
    x = model.embedding(kinds, items, actions, positions, times)
    return model.encoder.encode(x, times, query_times, past_times, past_k, past_v)


def score_candidates(
    model: RankingModel, candidates: Tensor, request_time: Tensor, past: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Return probabilities [C, tasks] against `past`, request_time int64 [1]: the graph exported as score.onnx."""
    past_times, past_k, past_v = past
    kinds, no_action = torch.full_like(candidates, ITEM), torch.zeros_like(candidates)
    positions, times = no_action + past_times.shape[0], no_action + request_time
    x = model.embedding(kinds, candidates, no_action, positions, times)
    return torch.sigmoid(model.heads(model.encoder.score(x, request_time, past_times, past_k, past_v)))


class TorchCompute:
    """A torch model behind the `Compute` protocol."""

    def __init__(self, model: Model) -> None:
        self.model = model.eval()

    def empty(self) -> KV:
        """Return the K/V of no tokens."""
        config, dtype = self.model.config, next(self.model.parameters()).dtype
        shape = (config.num_layers, 0, config.num_heads)
        return KV(
            times=np.zeros(0, np.int64),
            k=torch.zeros(*shape, config.qk_dim, dtype=dtype).numpy(),
            v=torch.zeros(*shape, config.v_dim, dtype=dtype).numpy(),
        )

    @torch.no_grad()
    def encode(self, tokens: Tokens, past: KV) -> tuple[np.ndarray, KV]:
        """Return rows [L, d] and the K/V of the new tokens."""
        kinds, items, actions, times, query_times = (
            torch.from_numpy(np.ascontiguousarray(field))
            for field in (tokens.kinds, tokens.items, tokens.actions, tokens.times, tokens.query_times)
        )
        rows, k, v = encode_tokens(self.model, kinds, items, actions, times, query_times, _torch(past))
        return rows.numpy(), KV(times=tokens.times, k=k.numpy(), v=v.numpy())

    @torch.no_grad()
    def score(self, candidates: np.ndarray, request_time: int, past: KV) -> np.ndarray:
        """Return probabilities [C, tasks]."""
        assert isinstance(self.model, RankingModel)
        at = torch.tensor([request_time], dtype=torch.int64)
        return score_candidates(self.model, torch.from_numpy(candidates), at, _torch(past)).numpy()


def _torch(past: KV) -> tuple[Tensor, Tensor, Tensor]:
    times, k, v = (torch.from_numpy(np.ascontiguousarray(x)) for x in (past.times, past.k, past.v))
    return times, k, v

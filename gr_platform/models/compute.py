"""`Compute` over a torch model: several users a step, through the kernels of the device it is on; in any float type.

Invariant: the functions that are exported as graphs stand here too, over the same weights.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from gr_platform.bundle.compute import Ask, Piece
from gr_platform.models.build import Model
from gr_platform.models.paged import KVPages, PaddedPast, Step, step_of, step_of_asks
from gr_platform.models.ranking import RankingModel
from gr_platform.models.tokens import ITEM


def encode_tokens(
    model: Model,
    kinds: Tensor,
    items: Tensor,
    actions: Tensor,
    times: Tensor,
    query_times: Tensor,
    past: tuple[Tensor, Sequence[Tensor], Sequence[Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the last row [1, d], k and v of one user's new tokens after `past` = (times, k, v): encode.onnx."""
    past_times, past_k, past_v = past
    positions = past_times.shape[0] + torch.arange(kinds.shape[0])
    x = model.embedding(kinds, items, actions, positions, times)
    return model.encoder.encode(x, times, query_times, past_times, past_k, past_v)


def score_candidates(model: RankingModel, candidates: Tensor, request_times: Tensor, past: PaddedPast) -> Tensor:
    """Return probabilities [B, C, tasks] of candidates int64 [B, C], request_times int64 [B] ms: score.onnx."""
    items, no_action = candidates.flatten(), torch.zeros_like(candidates)
    positions, times = ((no_action + one[:, None]).flatten() for one in (past.num_tokens, request_times))
    x = model.embedding(torch.full_like(items, ITEM), items, no_action.flatten(), positions, times)
    logits = model.heads(model.encoder.score(x.view(*candidates.shape, -1), request_times, past))
    # ONNX Runtime's Sigmoid is off by 1e-7, which is much of a small probability; its Exp is relatively exact.
    return 1 / (1 + torch.exp(-logits))


class TorchCompute:
    """A torch model behind the `Compute` protocol, on the device of its weights.

    cache_dtype: what K/V are kept in, and products made in; None: as the weights. A 16 bit type is for a GPU.
    """

    def __init__(self, model: Model, num_pages: int, *, cache_dtype: torch.dtype | None = None) -> None:
        self.model, self.num_pages = model.eval(), num_pages
        weights = next(model.parameters())
        self.device, self.cache_dtype = weights.device, cache_dtype or weights.dtype
        self.is_short = self.cache_dtype != weights.dtype
        self.pages = KVPages.of(model.config, num_pages, self.cache_dtype, self.device)

    @torch.inference_mode()
    def encode(self, pieces: Sequence[Piece]) -> np.ndarray:
        """Write the kept tokens' K/V and return the rows [R, d] of the pieces that want one."""
        with self._precision():
            step = step_of(pieces, self.device)
            self.pages.write_times(step)
            ends = np.cumsum([len(piece.tokens) for piece in pieces])
            last = [end - 1 for end, piece in zip(ends, pieces, strict=True) if piece.wants_row]
            rows = torch.tensor(last, dtype=torch.int64, device=self.device)
            x = self._embed_tokens(pieces, step)
            answered: Tensor = self.model.encoder.encode_paged(x, step, self.pages, rows)
            return answered.to(torch.promote_types(answered.dtype, torch.float32)).cpu().numpy()

    @torch.inference_mode()
    def score(self, asks: Sequence[Ask]) -> list[np.ndarray]:
        """Return probabilities [C, tasks] of each ask's candidates."""
        model, counts = self.model, [len(ask.candidates) for ask in asks]
        assert isinstance(model, RankingModel)
        if not sum(counts):
            return [np.zeros((0, len(model.tasks)), np.float32) for _ in asks]
        with self._precision():
            step = step_of_asks(asks, self.device)
            candidates = torch.from_numpy(np.concatenate([ask.candidates for ask in asks])).to(self.device)
            places = np.repeat(np.array([ask.past for ask in asks], np.int64), counts)
            no_action = torch.zeros_like(candidates)
            x = model.embedding(
                torch.full_like(candidates, ITEM),
                candidates,
                no_action,
                torch.from_numpy(places).to(self.device),
                step.times,
            )
            logits = model.heads(model.encoder.score_paged(x, step, self.pages))
            scores = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))).cpu().numpy()
        return np.split(scores, np.cumsum(counts)[:-1])

    def _embed_tokens(self, pieces: Sequence[Piece], step: Step) -> Tensor:
        fields = (
            np.concatenate([getattr(piece.tokens, name) for piece in pieces]) for name in ("kinds", "items", "actions")
        )
        places = np.concatenate([piece.past + np.arange(len(piece.tokens)) for piece in pieces])
        kinds, items, actions, positions = (torch.from_numpy(x).to(self.device) for x in (*fields, places))
        return self.model.embedding(kinds, items, actions, positions, step.times)

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=self.cache_dtype) if self.is_short else nullcontext()

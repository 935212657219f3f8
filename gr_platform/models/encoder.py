"""The one interface between a model and its encoder: token vectors in, rows out, at once or over cached K/V.

Invariant: `forward` of a whole sequence gives the rows that `encode` gives piece by piece, wherever it is cut, and
`score` those of a candidate appended alone; so M-FALCON and its cache serve any encoder that has all three.

Legend: L tokens in the batch (or new ones of one user), R rows asked for, P past tokens, C candidates, H heads, d
embedding_dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from gr_platform.errors import UserError
from gr_platform.models.paged import KVPages, PaddedPast, Step
from kernels import Backend, JaggedTimes


class Encoder(nn.Module, ABC):
    """A causal sequence encoder. `backend` forces an implementation of the kernels; None takes the device's."""

    backend: Backend | None = None

    @abstractmethod
    def forward(self, x: Tensor, jagged: JaggedTimes, rows: Tensor | None = None) -> Tensor:
        """Return rows [L, d] of jagged sequences of token vectors x [L, d], or [R, d] of the tokens int64 [R] alone.

        Rows have the dtype of x, under autocast too; all tensors are on the device of the weights.
        """

    def encode(
        self,
        x: Tensor,
        times: Tensor,
        query_times: Tensor,
        past_times: Tensor,
        past_k: Sequence[Tensor],
        past_v: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the last row [1, d], k [layers, L, H, qk_dim] and v [layers, L, H, v_dim] of a user's L new tokens.

        x [L, d]; times, query_times int64 [L]; past_times int64 [P]; past_k, past_v [P, H, dim] of each layer. The last
        layer computes no other row: nothing comes of them. Raises UserError for an encoder without K/V.
        """
        raise self._no_kv()

    def score(self, x: Tensor, request_times: Tensor, past: PaddedPast) -> Tensor:
        """Return rows [B, C, d] of candidate token vectors x [B, C, d] against the cached history of each user.

        request_times int64 [B] ms. Raises UserError for an encoder without K/V.
        """
        raise self._no_kv()

    def encode_paged(self, x: Tensor, step: Step, pages: KVPages, rows: Tensor) -> Tensor:
        """Return rows [R, d] of a step's tokens `rows` int64 [R] (each its user's last and not kept), and write the K/V
        of its kept tokens to their pages.

        x [L, d]. Here user by user through `encode`; an encoder with jagged kernels overrides it.
        """
        k, v = (pool.new_empty(len(pool), len(x), *pool.shape[3:]) for pool in (pages.k, pages.v))
        bounds, wanted, found = step.seq_offsets.tolist(), set(rows.tolist()), [x.new_empty(0, x.shape[1])]
        for user, (start, stop) in enumerate(pairwise(bounds)):
            own = slice(start, stop)
            row, k[:, own], v[:, own] = self.encode(
                x[own], step.times[own], step.query_times[own], *pages.of_user(step, user)
            )
            if stop - 1 in wanted:
                found.append(row)
        for layer in range(len(k)):
            pages.write(layer, step, k[layer], v[layer])
        return torch.cat(found)

    def score_paged(self, x: Tensor, step: Step, pages: KVPages) -> Tensor:
        """Return rows [L, d] of a step of candidates x [L, d]; user by user, as `encode_paged`."""
        found = [x.new_empty(0, x.shape[1])]
        for user, (start, stop) in enumerate(pairwise(step.seq_offsets.tolist())):
            if stop > start:
                past = PaddedPast.of_one(*pages.of_user(step, user))
                found.append(self.score(x[None, start:stop], step.query_times[start : start + 1], past)[0])
        return torch.cat(found)

    def _no_kv(self) -> UserError:
        return UserError(
            f"{type(self).__name__} keeps no K/V of past tokens, so it cannot be served; serve hstu instead"
        )

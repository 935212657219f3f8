"""The one interface between a model and its encoder: token vectors in, rows out, at once or over cached K/V.

Invariant: `forward` of a whole sequence gives the rows that `encode` gives piece by piece, wherever it is cut, and
`score` those of a candidate appended alone; so M-FALCON and its cache serve any encoder that has all three.

Legend: L tokens in the batch (or new ones of one user), R rows asked for, P past tokens, C candidates, H heads, d
embedding_dim.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from gr_platform.errors import UserError
from kernels import Backend, JaggedTimes


class Encoder(nn.Module, ABC):
    """A causal sequence encoder. `backend` forces an implementation of the kernels; None takes the device's."""

    backend: Backend | None = None
    _NO_KV = "{} keeps no keys and values of past tokens, so it cannot go on from a cache; serve hstu instead"

    @abstractmethod
    def forward(self, x: Tensor, jagged: JaggedTimes, rows: Tensor | None = None) -> Tensor:
        """Return rows [L, d] of jagged sequences of token vectors x [L, d], or [R, d] of the tokens int64 [R] alone.

        Rows have the dtype of x, under autocast too; all tensors are on the device of the weights.
        """

    def encode(
        self, x: Tensor, times: Tensor, query_times: Tensor, past_times: Tensor, past_k: Tensor, past_v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows [L, d], k [layers, L, H, qk_dim], v [layers, L, H, v_dim] of one user's L new tokens.

        x [L, d]; times, query_times int64 [L]; past_times int64 [P]; past_k, past_v [layers, P, H, dim].
        Raises UserError for an encoder without K/V.
        """
        raise UserError(
            f"{type(self).__name__} keeps no K/V of past tokens, so it cannot be served; serve hstu instead"
        )

    def score(self, x: Tensor, request_time: Tensor, past_times: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
        """Return rows [C, d] of candidate token vectors x [C, d] against one user's cached history.

        request_time int64 [1]; the past as for `encode`. Raises UserError for an encoder without K/V.
        """
        raise UserError(
            f"{type(self).__name__} keeps no K/V of past tokens, so it cannot be served; serve hstu instead"
        )

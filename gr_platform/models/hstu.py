"""The HSTU encoder: jagged for training, incremental over cached K/V for serving, one set of weights.

Invariant: K/V of a token depend on tokens up to it alone, so encoding a sequence at once or in any pieces gives the
same rows. `N` is a constant of the model. Under autocast u, v, q, k and the products of a layer are short; its input,
norms' statistics, rab and sums of attention stay in fp32.

Legend: L tokens in the batch (or new ones of one user), P past tokens, C candidates, H heads, d embedding_dim.
Source: PAPER section 2.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from gr_platform.models.config import ModelConfig
from gr_platform.models.encoder import Encoder
from gr_platform.models.paged import KVPages, PaddedPast, Step
from kernels import (
    NUM_TIME_BUCKETS,
    Backend,
    JaggedTimes,
    attend_candidates,
    attend_new,
    hash_dropout,
    hstu_attention,
    hstu_attention_cached,
    norm_gate_linear,
    uvqk,
)

# What a token's query and its own key give before SiLU, at a matching start, by their expected size.
MATCH = 5.0


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return what products of x are made in: autocast's dtype inside it, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _new_seed(x: Tensor) -> Tensor:
    """Return a seed int64 [1] on the device of x, drawn from torch's own generator of the CPU on every device."""
    return torch.randint(1 << 62, (1,), dtype=torch.int64).to(x.device)


class HSTULayer(nn.Module):
    """One layer: X + f2(Norm(A V) * U), with A V = SiLU(Q K^T + rab) V / N.

    `backend` forces an implementation of the kernels; None takes the one of the tensors' device.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.qk_dim, self.v_dim = config.num_heads, config.qk_dim, config.v_dim
        self.max_seq_len, self.dropout = config.max_seq_len, config.dropout
        self.backend: Backend | None = None
        width = 2 * config.num_heads * (config.qk_dim + config.v_dim)
        self.uvqk = nn.Parameter(torch.empty(config.embedding_dim, width).normal_(std=0.02))
        self.output = nn.Linear(config.num_heads * config.v_dim, config.embedding_dim)
        nn.init.xavier_uniform_(self.output.weight)
        self.pos_weight = self._bias(config.max_seq_len, learned=config.position_bias)
        self.time_weight = self._bias(NUM_TIME_BUCKETS, learned=config.time_bias)

    @staticmethod
    def _bias(size: int, *, learned: bool) -> nn.Parameter:
        """Return a table of rab; one that is not learned stays zero, which is no bias at all."""
        drawn = torch.empty(size).normal_(std=0.02)
        return nn.Parameter(drawn) if learned else nn.Parameter(torch.zeros(size), requires_grad=False)

    @torch.no_grad()
    def start_matching(self) -> None:
        """Start keys as the queries and values as the gates, wide enough to tell a token's equals from the others.

        The products of query and key and of gate and value then say "met before" at random weights already; from
        independent ones that is learned late or never. Training tells the four apart again.
        """
        v_width, qk_width = self.num_heads * self.v_dim, self.num_heads * self.qk_dim
        self.uvqk.normal_(std=math.sqrt(MATCH / (self.uvqk.shape[0] * self.qk_dim)))
        u, v, q, k = self.uvqk.split([v_width, v_width, qk_width, qk_width], dim=-1)
        k.copy_(q)
        v.copy_(u)

    def _project(self, x: Tensor, backend: Backend | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return u [L, H * v_dim], v [L, H, v_dim], q and k [L, H, qk_dim] of x [L, d], views of one tensor."""
        v_width, qk_width = self.num_heads * self.v_dim, self.num_heads * self.qk_dim
        dtype = _product_dtype(x)
        projected = uvqk(x.to(dtype), self.uvqk.to(dtype), backend=backend)
        u, v, q, k = projected.split([v_width, v_width, qk_width, qk_width], dim=-1)
        by_qk_head, by_v_head = (self.num_heads, self.qk_dim), (self.num_heads, self.v_dim)
        return u, v.unflatten(-1, by_v_head), q.unflatten(-1, by_qk_head), k.unflatten(-1, by_qk_head)

    def _combine(self, x: Tensor, attention: Tensor, u: Tensor, backend: Backend | None) -> Tensor:
        """Return the layer's output [L, d] from its input, the attention output [L, H, v_dim] and the gate u."""
        dropout = self.dropout if self.training else 0.0
        seed = _new_seed(x) if dropout else None
        weight, bias = (part.to(u.dtype) for part in (self.output.weight, self.output.bias))
        # Under autocast the sum over layers stays as wide as x, so a short branch is added to nothing first.
        wide = u.dtype == x.dtype
        onto = x if wide else u.new_zeros(1, x.shape[1]).expand(x.shape)
        branch = norm_gate_linear(
            attention.flatten(1), u, weight, bias, onto, dropout=dropout, seed=seed, backend=backend
        )
        return branch if wide else x + branch

    def forward(self, x: Tensor, jagged: JaggedTimes, rows: Tensor | None = None) -> Tensor:
        """Return [L, d] for whole jagged sequences, or [R, d] of the tokens `rows` alone."""
        u, v, q, k = self._project(x, self.backend)
        attention = hstu_attention(
            q, k, v, jagged, self.pos_weight, self.time_weight, self.max_seq_len, backend=self.backend
        )
        if rows is not None:
            x, attention, u = x[rows], attention[rows], u[rows]
        return self._combine(x, attention, u, self.backend)

    def _keys_values(self, x: Tensor, backend: Backend | None) -> tuple[Tensor, Tensor]:
        """Return k [L, H, qk_dim] and v [L, H, v_dim] of x [L, d] alone: what the last layer keeps of a history."""
        v_width, qk_width = self.num_heads * self.v_dim, self.num_heads * self.qk_dim
        _, for_v, _, for_k = self.uvqk.split([v_width, v_width, qk_width, qk_width], dim=-1)
        dtype = _product_dtype(x)
        weight = torch.cat([for_v, for_k], dim=-1).to(dtype)
        v, k = uvqk(x.to(dtype), weight, backend=backend).split([v_width, qk_width], dim=-1)
        return k.unflatten(-1, (self.num_heads, self.qk_dim)), v.unflatten(-1, (self.num_heads, self.v_dim))

    def encode(
        self, x: Tensor, query_times: Tensor, key_times: Tensor, past_k: Tensor, past_v: Tensor, *, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows [L, d] of one user's new tokens, or the last [1, d] alone, and the new tokens' k and v.

        past_k, past_v [P, H, dim]. Plain operations: this is what the bundle exports.
        """
        asked = x[-1:] if last else x
        u, v, q, k = self._project(asked, "reference")
        if last:
            k, v = self._keys_values(x, "reference")
            query_times = query_times[-1:]
        attention = attend_new(
            q,
            torch.cat([past_k, k]),
            torch.cat([past_v, v]),
            query_times,
            key_times,
            self.pos_weight,
            self.time_weight,
            self.max_seq_len,
        )
        return self._combine(asked, attention, u, "reference"), k, v

    def attend_paged(self, x: Tensor, step: Step, pages: KVPages, layer: int) -> Tensor:
        """Return the rows [L, d] of a step's tokens over the pages of this layer, the `layer`-th, and keep its K/V."""
        u, v, q, k = self._project(x, self.backend)
        attention = hstu_attention_cached(
            q,
            k,
            v,
            step.seq_offsets,
            step.times,
            step.query_times,
            pages.past(layer, step),
            self.pos_weight,
            self.time_weight,
            self.max_seq_len,
            num_targets=step.num_targets,
            tiles=step.tiles,
            backend=self.backend,
        )
        pages.write(layer, step, k, v)
        return self._combine(x, attention, u, self.backend)

    def keep_paged(self, x: Tensor, step: Step, pages: KVPages, layer: int) -> None:
        """Write the K/V of a step's kept tokens, whose rows nobody asks for."""
        pages.write(layer, step, *self._keys_values(x, self.backend))

    def score(self, x: Tensor, request_times: Tensor, past: PaddedPast, layer: int) -> Tensor:
        """Return the rows [B, C, d] of candidates x [B, C, d] that see their user's history and themselves.

        request_times int64 [B]; the past of this layer is the `layer`-th. Plain operations: the bundle exports them.
        """
        flat = x.flatten(0, 1)
        u, v, q, k = self._project(flat, "reference")
        v, q, k = (part.unflatten(0, x.shape[:2]) for part in (v, q, k))
        attention = self._attend_candidates(q, k, v, request_times, past, layer)
        return self._combine(flat, attention.flatten(0, 1), u, "reference").view(x.shape)

    def _attend_candidates(
        self, q: Tensor, k: Tensor, v: Tensor, request_times: Tensor, past: PaddedPast, layer: int
    ) -> Tensor:
        """Return the attention [B, C, H, v_dim] of candidates; q, k, v [B, C, H, dim]."""
        return attend_candidates(
            q,
            k,
            v,
            past.k[layer],
            past.v[layer],
            request_times[:, None],
            past.times,
            self.pos_weight,
            self.time_weight,
            self.max_seq_len,
            num_past=past.num_tokens,
        )


class HSTU(Encoder):
    """A stack of layers with dropout on its input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HSTULayer(config) for _ in range(config.num_layers))
        self.dropout = config.dropout

    def start_matching(self) -> None:
        """Let every layer start as `HSTULayer.start_matching` says."""
        for layer in self._stack():
            layer.start_matching()

    def _stack(self) -> list[HSTULayer]:
        return cast("list[HSTULayer]", list(self.layers))

    @property
    def backend(self) -> Backend | None:
        """The implementation of the kernels that is forced on every layer, or None."""
        return self._stack()[0].backend

    @backend.setter
    def backend(self, backend: Backend | None) -> None:
        for layer in self._stack():
            layer.backend = backend

    def forward(self, x: Tensor, jagged: JaggedTimes, rows: Tensor | None = None) -> Tensor:
        """Return rows [L, d] of jagged sequences of token vectors x [L, d], or [R, d] of the tokens `rows` alone."""
        if self.training and self.dropout:
            x = hash_dropout(x, self.dropout, _new_seed(x), backend=self.backend)
        # Where most tokens are asked for, picking them from every operand costs more than the last layer saves.
        few = rows is not None and 2 * len(rows) <= len(x)
        *below, last = self._stack()
        for layer in below:
            x = layer(x, jagged)
        x = last(x, jagged, rows if few else None)
        return x if rows is None or few else x.index_select(0, rows)

    def encode(
        self,
        x: Tensor,
        times: Tensor,
        query_times: Tensor,
        past_times: Tensor,
        past_k: Sequence[Tensor],
        past_v: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the last row, k, v of one user's new tokens, as `Encoder.encode` says."""
        key_times, stack = torch.cat([past_times, times]), self._stack()
        new_k, new_v = [], []
        for index, layer in enumerate(stack):
            last = index == len(stack) - 1
            x, k, v = layer.encode(x, query_times, key_times, past_k[index], past_v[index], last=last)
            new_k.append(k)
            new_v.append(v)
        return x, torch.stack(new_k), torch.stack(new_v)

    def score(self, x: Tensor, request_times: Tensor, past: PaddedPast) -> Tensor:
        """Return rows of candidates, as `Encoder.score` says."""
        for index, layer in enumerate(self._stack()):
            x = layer.score(x, request_times, past, index)
        return x

    def encode_paged(self, x: Tensor, step: Step, pages: KVPages, rows: Tensor) -> Tensor:
        """Return rows [R, d] and keep the step's K/V, as `Encoder.encode_paged` says: all users at once."""
        *below, last = self._stack()
        shared = step.share(pages) if below else step
        for index, layer in enumerate(below):
            x = layer.attend_paged(x, shared, pages, index)
        last.keep_paged(x, step, pages, len(below))
        if not len(rows):
            return x[:0]
        # All but the rows asked for are kept by now, so these look at their users' pages alone.
        return last.attend_paged(x.index_select(0, rows), step.of_last(rows), pages, len(below))

    def score_paged(self, x: Tensor, step: Step, pages: KVPages) -> Tensor:
        """Return rows [L, d] of a step of candidates, all users at once."""
        shared = step.share(pages)
        for index, layer in enumerate(self._stack()):
            x = layer.attend_paged(x, shared, pages, index)
        return x

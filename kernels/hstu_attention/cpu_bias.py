"""Position and time bias of the CPU path's tiles, and the gradients of both.

Invariant: masking is part of the bias, so it costs no pass of its own; buckets are read in the order that
`tiles.tile_buckets` wrote them.

Legend: G users of a group, H heads, r queries and c keys of a tile, m targets and h history of one user.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.hstu_attention.tiles import ROWS
from kernels.hstu_attention.time_buckets import NUM_TIME_BUCKETS

# SiLU of a score that carries this is -0 and so is its slope, in fp32 as in fp64.
MASKED = -1e30


class TileBias:
    """Biases of one walk over the tiles of a batch; `collect_*` gathers their gradients on the way."""

    def __init__(
        self,
        pos_weight: Tensor,
        time_weight: Tensor,
        plan: Tensor,
        formed: Iterator[Tensor] | None,
        longest: int,
        max_attn_len: int,
    ) -> None:
        self.pos_weight, self.time_weight, self.plan, self.formed = pos_weight, time_weight, plan, formed
        self.max_attn_len, self.cursor = max_attn_len, 0
        # Counted from the right, a column of row i is the same distance in every block of queries: one layout for all.
        self.width = longest
        self.distance = torch.arange(ROWS)[:, None] + (longest - ROWS - torch.arange(longest))[None, :]
        self.pos_tile = self._of_distance(self.distance)
        self.d_pos_tile = torch.zeros_like(self.pos_tile)
        self.d_pos = torch.zeros_like(pos_weight, dtype=torch.float64)
        self.d_time = torch.zeros(NUM_TIME_BUCKETS, dtype=torch.float64)

    def _of_distance(self, distance: Tensor) -> Tensor:
        hidden = distance < 0
        if self.max_attn_len:
            hidden |= distance > self.max_attn_len
        return self.pos_weight[distance.clamp(0, len(self.pos_weight) - 1)].masked_fill_(hidden, MASKED)

    def next_buckets(self, *shape: int) -> Tensor:
        """Return the buckets of the walk's next tile: of the plan, or formed now."""
        if self.formed is not None:
            return next(self.formed).view(shape)
        begin, self.cursor = self.cursor, self.cursor + math.prod(shape)
        return self.plan[begin : self.cursor].view(shape)

    def _of_time(self, buckets: Tensor) -> Tensor:
        return self.time_weight.index_select(0, buckets.reshape(-1).long()).view(buckets.shape)

    def of_block(self, buckets: Tensor) -> Tensor:
        """Return the bias [G, r, c] of a block of queries whose last one is the last of the c keys."""
        rows, keys = buckets.shape[1:]
        return self._of_time(buckets).add_(self.pos_tile[ROWS - rows :, self.width - keys :])

    def of_targets(self, buckets: Tensor) -> Tensor:
        """Return the bias [m, h] of targets, which all stand right after their history."""
        history = buckets.shape[1]
        return self._of_time(buckets).add_(self._of_distance(history - torch.arange(history)))

    def of_themselves(self, buckets: Tensor) -> Tensor:
        """Return the bias [m] between targets and themselves."""
        return self._of_time(buckets).add_(self.pos_weight[0])

    def _collect_time(self, d_bias: Tensor, buckets: Tensor) -> None:
        # One histogram a row, so that rows run in parallel and no sum of thousands is taken in fp32.
        d_rows = d_bias.new_zeros(math.prod(d_bias.shape[:-1]), NUM_TIME_BUCKETS)
        d_rows.scatter_add_(1, buckets.reshape(len(d_rows), -1).long(), d_bias.reshape(len(d_rows), -1))
        self.d_time += d_rows.sum(0, dtype=torch.float64)

    def collect_block(self, d_bias: Tensor, buckets: Tensor) -> None:
        """Add the gradient [G, r, c] of `of_block`."""
        rows, keys = d_bias.shape[1:]
        self.d_pos_tile[ROWS - rows :, self.width - keys :] += d_bias.sum(0)
        self._collect_time(d_bias, buckets)

    def collect_targets(self, d_bias: Tensor, buckets: Tensor) -> None:
        """Add the gradient [m, h] of `of_targets`."""
        self.d_pos[1 : d_bias.shape[1] + 1] += d_bias.sum(0, dtype=torch.float64).flip(0)
        self._collect_time(d_bias, buckets)

    def collect_themselves(self, d_bias: Tensor, buckets: Tensor) -> None:
        """Add the gradient [m] of `of_themselves`."""
        self.d_pos[0] += d_bias.sum(dtype=torch.float64)
        self._collect_time(d_bias[:, None], buckets[:, None])

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Return the collected gradients of pos_weight and time_weight."""
        seen = self.distance.clamp(0, len(self.d_pos) - 1).view(-1)
        # Hidden pairs have gradient 0, so the distances that were clamped add nothing.
        d_pos = self.d_pos + torch.bincount(seen, self.d_pos_tile.view(-1).double(), minlength=len(self.d_pos))
        return d_pos.to(self.pos_weight.dtype), self.d_time.to(self.time_weight.dtype)

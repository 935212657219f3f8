"""The gated norm on the CPU: tiles of rows that stay in cache, gated rows formed again in the backward.

Invariant: a tile is read and written once, whatever the number of steps between. 16 bit types are computed in fp32.

Legend: L tokens, W width of the attention output, d width of the layer.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.dropout import TileMask

# Enough elements to pay for a tile's calls, few enough for the cache.
TILE_ELEMENTS = 1 << 18
MIN_TILE_ROWS = 64


def _tile_rows(width: int) -> int:
    return max(MIN_TILE_ROWS, TILE_ELEMENTS // max(width, 1))


def _tiles(num_rows: int, width: int) -> Iterator[slice]:
    step = _tile_rows(width)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


class _Gate:
    """Forms the rows of a tile. 1 / (1 - p) rides on the norm's weight, at no pass of its own."""

    def __init__(self, attention: Tensor, u: Tensor, dropout: float, seed: Tensor | None, eps: float) -> None:
        self.attention, self.u, self.eps = attention, u, eps
        num_rows, width = attention.shape
        self.dtype = torch.promote_types(attention.dtype, torch.float32)
        self.weight, self.mask = None, None
        if dropout > 0.0 and seed is not None:
            self.weight = torch.full((width,), 1.0 / (1.0 - dropout), dtype=self.dtype)
            self.mask = TileMask.of(seed, num_rows, width, dropout, _tile_rows(width))

    def tiles(self) -> Iterator[slice]:
        return _tiles(*self.attention.shape)

    def _norm(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return attention rows, their norm over 1 - p, means and inverse deviations."""
        x = self.attention[rows].to(self.dtype)
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[1:], self.weight, None, self.eps)
        return x, normed, mean, rstd

    def _drop(self, rows: slice, *tiles: Tensor) -> list[Tensor]:
        return list(tiles) if self.mask is None else self.mask.drop(rows.start, *tiles)

    def gated(self, rows: slice) -> Tensor:
        return self._drop(rows, self._norm(rows)[1].mul_(self.u[rows]))[0]

    def backward(self, rows: slice, grad: Tensor, *, with_gated: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return gradients of the attention and u rows, and a list of the gated rows if asked for; grad [rows, W]."""
        x, normed, mean, rstd = self._norm(rows)
        u = self.u[rows].to(self.dtype)
        grad, *gated = self._drop(rows, grad, normed * u) if with_gated else self._drop(rows, grad)
        grad_x = torch.ops.aten.native_layer_norm_backward(
            grad * u, x, x.shape[1:], mean, rstd, self.weight, None, [True, False, False]
        )[0]
        return grad_x, normed.mul_(grad), gated


def norm_gate(attention: Tensor, u: Tensor, dropout: float, seed: Tensor | None, eps: float) -> Tensor:
    """Return dropout(LayerNorm(attention) * u) [L, W]."""
    gate = _Gate(attention, u, dropout, seed, eps)
    out = torch.empty(attention.shape, dtype=attention.dtype)
    for rows in gate.tiles():
        out[rows].copy_(gate.gated(rows))
    return out


def norm_gate_backward(
    grad: Tensor, attention: Tensor, u: Tensor, dropout: float, seed: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of attention and u [L, W]."""
    gate = _Gate(attention, u, dropout, seed, eps)
    grad_attention = torch.empty(attention.shape, dtype=attention.dtype)
    grad_u = torch.empty_like(grad_attention)
    for rows in gate.tiles():
        grad_x_tile, grad_u_tile, _ = gate.backward(rows, grad[rows].to(gate.dtype), with_gated=False)
        grad_attention[rows].copy_(grad_x_tile)
        grad_u[rows].copy_(grad_u_tile)
    return grad_attention, grad_u


def norm_gate_linear(
    attention: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    dropout: float,
    seed: Tensor | None,
    eps: float,
) -> Tensor:
    """Return residual + norm_gate(attention, u) @ weight^T + bias [L, d]."""
    gate = _Gate(attention, u, dropout, seed, eps)
    transposed, shift = weight.to(gate.dtype).t(), bias.to(gate.dtype)
    out = torch.empty(residual.shape, dtype=residual.dtype)
    for rows in gate.tiles():
        out[rows].copy_(torch.addmm(shift, gate.gated(rows), transposed).add_(residual[rows]))
    return out


def norm_gate_linear_backward(
    grad: Tensor, attention: Tensor, u: Tensor, weight: Tensor, dropout: float, seed: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of attention, u [L, W] and weight [d, W] from that of the output [L, d]."""
    gate = _Gate(attention, u, dropout, seed, eps)
    wide = weight.to(gate.dtype)
    grad_attention = torch.empty(attention.shape, dtype=attention.dtype)
    grad_u = torch.empty_like(grad_attention)
    grad_weight = torch.zeros_like(wide)
    for rows in gate.tiles():
        tile = grad[rows].to(gate.dtype)
        grad_x_tile, grad_u_tile, gated = gate.backward(rows, tile @ wide, with_gated=True)
        grad_attention[rows].copy_(grad_x_tile)
        grad_u[rows].copy_(grad_u_tile)
        grad_weight.addmm_(tile.t(), *gated)
    return grad_attention, grad_u, grad_weight.to(weight.dtype)


def hash_dropout(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """Return x [L, W] with a share of its elements zeroed and the rest divided by 1 - dropout: its own backward."""
    mask = TileMask.of(seed, len(x), x.shape[1], dropout, _tile_rows(x.shape[1]))
    out = torch.empty(x.shape, dtype=x.dtype)
    dtype = torch.promote_types(x.dtype, torch.float32)
    for rows in _tiles(*x.shape):
        scaled = x[rows].to(dtype) * (1.0 / (1.0 - dropout))
        out[rows].copy_(scaled if mask is None else mask.drop(rows.start, scaled)[0])
    return out

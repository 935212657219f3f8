"""The uvqk projection on the CPU: tiles of rows that stay in cache between the norm, the products and the SiLU.

Invariant: the backward forms norm and pre-activation again, a tile at a time; nothing of size [L, W] but the incoming
gradient is read. 16 bit types are computed in fp32.

Legend: L tokens, d width of the layer, W width of the output.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Enough elements to pay for a tile's calls and to keep the products efficient, few enough for the cache.
TILE_ELEMENTS = 1 << 18
MIN_TILE_ROWS = 512


def _tiles(num_rows: int, width: int) -> Iterator[slice]:
    step = max(MIN_TILE_ROWS, TILE_ELEMENTS // max(width, 1))
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def uvqk(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return SiLU(LayerNorm(x) @ weight) [L, W]."""
    num_rows, width = len(x), weight.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = weight.to(dtype)
    out = torch.empty((num_rows, width), dtype=x.dtype)
    for rows in _tiles(num_rows, width):
        normed = torch.native_layer_norm(x[rows].to(dtype), x.shape[1:], None, None, eps)[0]
        if out.dtype == dtype:
            torch.ops.aten.silu_(torch.mm(normed, wide, out=out[rows]))
        else:
            out[rows].copy_(torch.ops.aten.silu_(normed @ wide))
    return out


def uvqk_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [L, d] and weight [d, W]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = weight.to(dtype)
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    grad_weight = torch.zeros_like(wide, memory_format=torch.contiguous_format)
    for rows in _tiles(*grad.shape):
        tile = x[rows].to(dtype)
        normed, mean, rstd = torch.native_layer_norm(tile, x.shape[1:], None, None, eps)
        grad_pre = torch.ops.aten.silu_backward(grad[rows].to(dtype), normed @ wide)
        grad_weight.addmm_(normed.t(), grad_pre)
        grad_x_tile = torch.ops.aten.native_layer_norm_backward(
            grad_pre @ wide.t(), tile, x.shape[1:], mean, rstd, None, None, [True, False, False]
        )[0]
        grad_x[rows].copy_(grad_x_tile)
    return grad_x, grad_weight.to(weight.dtype)

"""The input half of an HSTU layer, SiLU(LayerNorm(x) @ weight), which saves its inputs alone for the backward."""

from kernels.uvqk.op import uvqk

__all__ = ["uvqk"]

"""The gate of an HSTU layer, dropout(LayerNorm(attention) * u), with its output projection, and dropout by hashing."""

from kernels.norm_gate.op import hash_dropout, norm_gate, norm_gate_linear

__all__ = ["hash_dropout", "norm_gate", "norm_gate_linear"]

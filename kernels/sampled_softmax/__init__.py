"""Sampled and full softmax losses over an item table that the caller normalised once."""

from kernels.sampled_softmax.op import full_softmax, sampled_softmax

__all__ = ["full_softmax", "sampled_softmax"]

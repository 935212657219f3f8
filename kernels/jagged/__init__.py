"""Joining, splitting and indexing jagged batches: values [L, ...] and offsets int64 [B + 1]."""

from kernels.jagged.op import jagged_concat, jagged_gather, jagged_split

__all__ = ["jagged_concat", "jagged_gather", "jagged_split"]

"""HSTU attention of new tokens or candidates over cached keys and values, paged or contiguous, several users a call."""

from kernels.hstu_attention_cached.op import PastKV, hstu_attention_cached, shared_tiles
from kernels.hstu_attention_cached.reference import attend_candidates, attend_new

__all__ = ["PastKV", "attend_candidates", "attend_new", "hstu_attention_cached", "shared_tiles"]

"""HSTU attention: pointwise SiLU attention with a relative position and log-time bias, jagged and cached."""

from kernels.hstu_attention.op import JaggedTimes, hstu_attention
from kernels.hstu_attention.reference import hstu_attention_cached, hstu_attention_candidates
from kernels.hstu_attention.time_buckets import NUM_TIME_BUCKETS, TIME_THRESHOLDS_MS, pairwise_time_buckets

__all__ = [
    "NUM_TIME_BUCKETS",
    "TIME_THRESHOLDS_MS",
    "JaggedTimes",
    "hstu_attention",
    "hstu_attention_cached",
    "hstu_attention_candidates",
    "pairwise_time_buckets",
]

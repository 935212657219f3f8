"""HSTU attention: pointwise SiLU attention with a relative position and log-time bias over jagged sequences."""

from kernels.hstu_attention.batch import JaggedTimes
from kernels.hstu_attention.op import hstu_attention
from kernels.hstu_attention.time_buckets import NUM_TIME_BUCKETS, TIME_THRESHOLDS_MS, pairwise_time_buckets

__all__ = ["NUM_TIME_BUCKETS", "TIME_THRESHOLDS_MS", "JaggedTimes", "hstu_attention", "pairwise_time_buckets"]

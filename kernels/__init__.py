"""The operations whose speed decides what the platform costs: one folder an op, torch and triton only.

Invariant: importing this package registers every `gr::` op and imports no Triton kernel; those come with the first
launch on a GPU.
"""

from kernels.dispatch import Backend
from kernels.hstu_attention import (
    NUM_TIME_BUCKETS,
    TIME_THRESHOLDS_MS,
    JaggedTimes,
    hstu_attention,
    pairwise_time_buckets,
)
from kernels.hstu_attention_cached import PastKV, attend_candidates, attend_new, hstu_attention_cached, shared_tiles
from kernels.jagged import jagged_concat, jagged_gather, jagged_split
from kernels.norm_gate import hash_dropout, norm_gate, norm_gate_linear
from kernels.rowwise_adamw import RowwiseAdamW, rowwise_adamw_
from kernels.sampled_softmax import full_softmax, sampled_softmax
from kernels.uvqk import uvqk

__all__ = [
    "NUM_TIME_BUCKETS",
    "TIME_THRESHOLDS_MS",
    "Backend",
    "JaggedTimes",
    "PastKV",
    "RowwiseAdamW",
    "attend_candidates",
    "attend_new",
    "full_softmax",
    "hash_dropout",
    "hstu_attention",
    "hstu_attention_cached",
    "jagged_concat",
    "jagged_gather",
    "jagged_split",
    "norm_gate",
    "norm_gate_linear",
    "pairwise_time_buckets",
    "rowwise_adamw_",
    "sampled_softmax",
    "shared_tiles",
    "uvqk",
]

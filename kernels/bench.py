"""The benchmarks of the kernels as `gr bench` calls them: each returns rows {name, value, unit, against, target}.

Invariant: what can be measured on this machine is measured in one run; what needs a GPU is predicted and says so.
"""

from typing import Any

import torch

from kernels import roofline


def attention(num_threads: int) -> list[dict[str, Any]]:
    """Return ratios of attention and of the sampled softmax on this CPU, then the milliseconds behind them."""
    from kernels.hstu_attention import bench as attention_bench
    from kernels.sampled_softmax import bench as softmax_bench

    torch.set_num_threads(num_threads)
    found = attention_bench.rows() + softmax_bench.gather_over_ours(num_threads)
    # What has a target first; sorting keeps the order within both.
    return sorted(found, key=lambda row: row["target"] is None)


def memory(num_threads: int) -> list[dict[str, Any]]:
    """Return what a layer keeps for its backward, HSTU against a softmax Transformer; counted, not timed."""
    from kernels.norm_gate import bench as layer_bench

    torch.set_num_threads(num_threads)
    return layer_bench.activation_bytes() + layer_bench.run(num_threads)


def kernels(num_threads: int) -> list[dict[str, Any]]:
    """Return predicted milliseconds of every kernel on three GPUs and, where a GPU is here, attention's own on it."""
    found = roofline.rows()
    if torch.cuda.is_available():
        from kernels import gpu_bench

        found += gpu_bench.rows()
    return found

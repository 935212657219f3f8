"""The benchmarks of the kernels as `gr bench` calls them: each returns rows {name, value, unit, against, target}.

Invariant: what can be measured on this machine is measured in one run; what needs a GPU is predicted and says so.
"""

from typing import Any

import torch

from kernels import roofline


def attention(num_threads: int) -> list[dict[str, Any]]:
    """Return times and ratios of attention and of the sampled softmax on this CPU."""
    from kernels.hstu_attention import bench as attention_bench
    from kernels.sampled_softmax import bench as softmax_bench

    torch.set_num_threads(num_threads)
    return attention_bench.rows() + softmax_bench.gather_over_ours(num_threads)


def kernels(num_threads: int) -> list[dict[str, Any]]:
    """Return predicted milliseconds of every kernel on three GPUs and, where a GPU is here, attention's own on it."""
    found = roofline.rows()
    if torch.cuda.is_available():
        from kernels import gpu_bench

        found += gpu_bench.rows()
    return found

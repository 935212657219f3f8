"""Time differences become bucket numbers by integer comparison alone.

Invariant: no logarithm and no float time anywhere. fp32 logarithms disagree at bucket edges, and one pair in another
bucket moves a score by far more than rounding does. The thresholds travel in the bundle.
"""

from decimal import ROUND_CEILING, Decimal, localcontext

import torch
from torch import Tensor
from torch.nn import functional as F

INT64_MAX = 2**63 - 1


def _thresholds() -> tuple[int, ...]:
    """Return ceil(1000 * exp(0.301 k)) for k = 1..128, saturated; decimal, so that no C library has a say."""
    with localcontext() as context:
        context.prec = 60
        exact = [(1000 * (Decimal("0.301") * k).exp()).to_integral_value(rounding=ROUND_CEILING) for k in range(1, 129)]
    return tuple(min(int(value), INT64_MAX) for value in exact)


TIME_THRESHOLDS_MS = _thresholds()
NUM_TIME_BUCKETS = len(TIME_THRESHOLDS_MS) + 1


def looked_up(table: Tensor, index: Tensor) -> Tensor:
    """Return table[index] for a table [N], whatever the shape of index int64: in a form that exports as a plain Gather,
    several times as fast in ONNX Runtime as the general indexing."""
    return F.embedding(index, table[:, None]).squeeze(-1)


def pairwise_time_buckets(query_times: Tensor, key_times: Tensor) -> Tensor:
    """Return the bucket (0..128) of |query_times[i] - key_times[j]|, int64 [..., Lq, Lk].

    query_times int64 [..., Lq], key_times int64 [..., Lk], milliseconds. Bucket k holds differences from the k-th
    threshold up to below the next: PAPER section 2's floor(ln(seconds) / 0.301). A branchless binary search: it exports
    to ONNX.
    """
    difference = (query_times[..., :, None] - key_times[..., None, :]).abs()
    thresholds = torch.tensor(TIME_THRESHOLDS_MS, dtype=torch.int64, device=difference.device)
    bucket = torch.zeros_like(difference)
    for step in (64, 32, 16, 8, 4, 2, 1):
        bucket = bucket + step * (difference >= looked_up(thresholds, bucket + (step - 1))).to(torch.int64)
    # 127 is the most seven halvings reach; the last threshold is compared on its own.
    return bucket + ((bucket == 127) & (difference >= thresholds[127])).to(torch.int64)

"""What is timed on a GPU computes one function: seen on the CPU in fp32, timed only where a GPU is."""

import pytest
import torch

from kernels import gpu_bench
from kernels.roofline import Shape

SMALL = Shape(num_users=2, history=33, num_targets=0, heads=2, qk_dim=16, v_dim=8, model_dim=32)


def test_padded_eager_equals_ours_and_softmax_has_its_shape():
    leaves, jagged = gpu_bench.inputs(SMALL, "cpu", torch.float32)
    found = gpu_bench.variants(SMALL, leaves, jagged)
    ours, eager = found["ours"](), found["eager"]()
    torch.testing.assert_close(eager, ours, rtol=1e-5, atol=1e-6)
    for got, want in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (eager, ours)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert found["SDPA (softmax, no bias)"]().shape == ours.shape


def test_a_variant_that_computes_something_else_is_not_timed():
    found = {"ours": lambda: torch.ones(3), "eager": lambda: torch.zeros(3), "torch.compile": lambda: torch.ones(3)}
    with pytest.raises(RuntimeError, match="eager disagrees"):
        gpu_bench.check(found)


@pytest.mark.gpu
def test_the_bench_runs_on_the_gpu():
    rows = gpu_bench.rows(SMALL, "small")
    assert len(rows) == 8
    assert all(row["value"] > 0 for row in rows)

"""Inputs of attention tests: jagged batches with times, in any dtype, and comparisons."""

import itertools

import torch

from kernels.hstu_attention import NUM_TIME_BUCKETS, JaggedTimes


def make_times(lengths, generator, *, largest_gap=10**8):
    gaps = [torch.randint(0, largest_gap, (n,), generator=generator).cumsum(0) for n in lengths]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *gaps])


def make_inputs(lengths, *, targets=None, heads=2, qk_dim=8, v_dim=6, dtype=torch.float64, seed=0, max_seq_len=None):
    """Return leaves (q, k, v, pos_weight, time_weight), the batch, and N."""
    generator = torch.Generator().manual_seed(seed)
    total, max_seq_len = sum(lengths), max_seq_len or max([*lengths, 1]) + 1
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    times = make_times(lengths, generator)
    query_times = times + torch.randint(0, 10**7, (total,), generator=generator)
    shapes = (
        (total, heads, qk_dim),
        (total, heads, qk_dim),
        (total, heads, v_dim),
        (max_seq_len,),
        (NUM_TIME_BUCKETS,),
    )
    leaves = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    num_targets = None if targets is None else torch.tensor(targets)
    jagged = JaggedTimes.of(offsets, times, query_times, num_targets)
    return [leaf.requires_grad_() for leaf in leaves], jagged, max_seq_len


def outputs_and_gradients(attention, leaves):
    """Return attention(*leaves) and its gradients under a fixed, uneven seed."""
    out = attention(*leaves)
    seed = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape).to(out.dtype)
    loss = (out * seed).sum() + sum(leaf.sum() * 0.0 for leaf in leaves)
    grads = torch.autograd.grad(loss, leaves)
    return (out.detach(), *grads)


def in_fp64(leaves):
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def assert_close(ours, truth, *, share=1e-5):
    """Assert max|a - b| <= share * max|truth| and that nothing is NaN."""
    for name, a, b in zip(("out", "dq", "dk", "dv", "d_pos", "d_time"), ours, truth, strict=False):
        assert not a.isnan().any(), f"{name} has NaN"
        worst = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
        bound = share * float(b.abs().max()) if b.numel() else 0.0
        assert worst <= bound + 1e-30, f"{name}: {worst:.2e} against a bound of {bound:.2e}"


def rms_ratio(a, b):
    return float((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt())


def users_of(jagged):
    return list(itertools.pairwise(jagged.seq_offsets.tolist()))

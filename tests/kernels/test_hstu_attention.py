"""HSTU attention: the fast path against the plain one, and the properties that caching rests on."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.hstu_attention import (
    NUM_TIME_BUCKETS,
    TIME_THRESHOLDS_MS,
    JaggedTimes,
    hstu_attention,
    hstu_attention_cached,
    hstu_attention_candidates,
    pairwise_time_buckets,
)

MAX_SEQ_LEN = 130
DIVISOR = 130


def make_inputs(lengths, *, heads=2, qk_dim=8, v_dim=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    offsets = torch.tensor([0, *lengths]).cumsum(0)
    gaps = torch.randint(0, 10**8, (total,), generator=generator)
    times = torch.cat([gaps[a:b].cumsum(0) for a, b in itertools.pairwise(offsets)])
    query_times = times + torch.randint(0, 10**7, (total,), generator=generator)
    tensors = normal(total, heads, qk_dim), normal(total, heads, qk_dim), normal(total, heads, v_dim)
    weights = normal(MAX_SEQ_LEN), normal(NUM_TIME_BUCKETS)
    return tensors, weights, JaggedTimes.of(offsets, times, query_times)


def test_time_buckets_agree_with_searchsorted_at_every_threshold_edge():
    thresholds = torch.tensor(TIME_THRESHOLDS_MS)
    below_max = thresholds.clamp(max=2**63 - 2)
    differences = torch.cat([thresholds - 1, thresholds, below_max + 1, torch.tensor([0, 1, 999, 1000, 1001])])
    buckets = pairwise_time_buckets(differences, torch.zeros(1, dtype=torch.int64))[:, 0]
    assert torch.equal(buckets, torch.searchsorted(thresholds, differences, right=True))
    assert buckets.min() == 0
    assert buckets.max() == NUM_TIME_BUCKETS - 1


def test_time_thresholds_are_the_papers_buckets_in_milliseconds():
    assert TIME_THRESHOLDS_MS[0] == 1352
    assert all(abs(t / (1000 * math.exp(0.301 * k)) - 1) < 1e-3 for k, t in enumerate(TIME_THRESHOLDS_MS[:100], 1))
    assert TIME_THRESHOLDS_MS[121] < 2**63 - 1 == TIME_THRESHOLDS_MS[122]


@pytest.mark.parametrize("lengths", [[0], [1], [63], [5, 0, 1, 64], [127, 3, 65]])
def test_cpu_path_equals_reference_forward_and_every_gradient(lengths):
    (q, k, v), weights, jagged = make_inputs(lengths)
    results = []
    for backend in ("reference", "cpu"):
        out = hstu_attention(q, k, v, jagged, *weights, DIVISOR, backend=backend)
        seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        leaves = (q, k, v, *weights)
        grads = torch.autograd.grad((out * seed).sum(), leaves, allow_unused=True)
        results.append((out, *(torch.zeros(x.shape) if g is None else g for g, x in zip(grads, leaves, strict=True))))
    for reference, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference.to(fast.dtype), rtol=1e-10, atol=1e-12)


def test_cpu_path_passes_gradcheck():
    (q, k, v), weights, jagged = make_inputs([4, 1, 3], heads=2, qk_dim=2, v_dim=3)

    def run(*leaves):
        return hstu_attention(*leaves[:3], jagged, *leaves[3:], DIVISOR)

    assert torch.autograd.gradcheck(run, (q, k, v, *weights))


@pytest.mark.parametrize("tokens_before", [1, 2, 3, 5, 8, 17, 33])
def test_a_user_is_bit_equal_whoever_else_is_in_the_batch(tokens_before):
    begin, end = tokens_before, tokens_before + 90
    (q, k, v), weights, jagged = make_inputs([tokens_before, 90, 40], dtype=torch.float32)
    together = hstu_attention(q, k, v, jagged, *weights, DIVISOR)
    alone_times = JaggedTimes.of(torch.tensor([0, 90]), jagged.times[begin:end], jagged.query_times[begin:end])
    leaves = [x[begin:end].detach().requires_grad_() for x in (q, k, v)]
    alone = hstu_attention(*leaves, alone_times, *weights, DIVISOR)
    assert torch.equal(together[begin:end], alone)
    seed = torch.linspace(-1, 1, alone.numel()).view(alone.shape)
    grads_together = torch.autograd.grad((together[begin:end] * seed).sum(), (q, k, v))
    grads_alone = torch.autograd.grad((alone * seed).sum(), leaves)
    for ours, reference in zip(grads_together, grads_alone, strict=True):
        assert torch.equal(ours[begin:end], reference)


@settings(deadline=None, max_examples=25)
@given(length=st.integers(1, 40), data=st.data())
def test_attention_in_two_pieces_equals_attention_at_once(length, data):
    split = data.draw(st.integers(0, length))
    (q, k, v), weights, jagged = make_inputs([length])
    whole = hstu_attention(q, k, v, jagged, *weights, DIVISOR)
    times, query_times = jagged.times, jagged.query_times
    head = hstu_attention_cached(q[:split], k[:split], v[:split], query_times[:split], times[:split], *weights, DIVISOR)
    tail = hstu_attention_cached(q[split:], k, v, query_times[split:], times, *weights, DIVISOR)
    torch.testing.assert_close(torch.cat([head, tail]), whole, rtol=1e-10, atol=1e-12)


def test_candidates_together_equal_each_appended_alone_and_permute():
    (q, k, v), weights, jagged = make_inputs([30])
    past, num_candidates = 25, 5
    request_time = jagged.times[-1:] + 5000
    together = hstu_attention_candidates(
        q[past:], k[past:], v[past:], k[:past], v[:past], request_time, jagged.times[:past], *weights, DIVISOR
    )
    for c in range(num_candidates):
        one = past + c
        keys, values = torch.cat([k[:past], k[one : one + 1]]), torch.cat([v[:past], v[one : one + 1]])
        key_times = torch.cat([jagged.times[:past], request_time])
        alone = hstu_attention_cached(q[one : one + 1], keys, values, request_time, key_times, *weights, DIVISOR)
        torch.testing.assert_close(together[c : c + 1], alone, rtol=1e-10, atol=1e-12)
    order = torch.tensor([3, 0, 4, 2, 1]) + past
    permuted = hstu_attention_candidates(
        q[order], k[order], v[order], k[:past], v[:past], request_time, jagged.times[:past], *weights, DIVISOR
    )
    torch.testing.assert_close(permuted, together[order - past], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("offsets", [[1, 4], [0, 3], [0, 3, 2, 4], []])
def test_wrong_offsets_are_named(offsets):
    times = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="seq_offsets"):
        JaggedTimes.of(torch.tensor(offsets, dtype=torch.int64), times, times)


def test_a_sequence_beyond_the_position_table_is_refused():
    (q, k, v), _, jagged = make_inputs([20])
    with pytest.raises(ValueError, match="20 tokens, pos_weight allows 19"):
        hstu_attention(q, k, v, jagged, torch.zeros(19, dtype=q.dtype), torch.zeros(129, dtype=q.dtype), DIVISOR)

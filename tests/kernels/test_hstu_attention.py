"""HSTU attention: the CPU path and the Triton kernels against the reference, forward and every gradient."""

import dataclasses
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
    pairwise_time_buckets,
    tiles,
)
from kernels.hstu_attention.batch import SCHEDULE_ROWS, schedule
from kernels.hstu_attention.tiles import bucket_of, bucket_of_ordered, groups, spans
from tests.kernels.attention_cases import assert_close, in_fp64, make_inputs, outputs_and_gradients, rms_ratio

# lengths, targets, window, head dims: empty users, one token, block borders, windows, targets alone and with history.
CASES = {
    "no users": ([], None, 0, {}),
    "empty users": ([0, 3, 0], None, 0, {}),
    "one token": ([1], None, 0, {}),
    "below a block": ([63], None, 0, {}),
    "block + 1": ([5, 0, 1, 65, 130], None, 0, {"qk_dim": 32, "v_dim": 32}),
    "window": ([127, 3, 65], None, 10, {}),
    "window of a block": ([150, 64], None, 64, {}),
    "targets": ([90, 40, 41, 42], [20, 0, 41, 5], 0, {}),
    "targets and window": ([100, 40], [70, 0], 37, {"qk_dim": 50, "v_dim": 24}),
    "one head of odd dims": ([70, 20], None, 0, {"heads": 1, "qk_dim": 25, "v_dim": 3}),
    "dim 1": ([20], None, 0, {"heads": 1, "qk_dim": 1, "v_dim": 1}),
}


def attention_of(jagged, max_seq_len, window, backend):
    def attention(q, k, v, pos_weight, time_weight):
        return hstu_attention(
            q, k, v, jagged, pos_weight, time_weight, max_seq_len, max_attn_len=window, backend=backend
        )

    return attention


def compare(backend, case, *, dtype=torch.float32, share=1e-5):
    lengths, targets, window, dims = case
    leaves, jagged, n = make_inputs(lengths, targets=targets, dtype=dtype, **dims)
    truth = outputs_and_gradients(attention_of(jagged, n, window, "reference"), in_fp64(leaves))
    assert_close(outputs_and_gradients(attention_of(jagged, n, window, backend), leaves), truth, share=share)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_forward_and_every_gradient_equal_the_fp64_reference(backend, case, poisoned_empty):
    compare(backend, case)


def test_a_user_of_a_thousand_tokens_equals_the_reference(poisoned_empty):
    leaves, jagged, n = make_inputs([1000, 10], targets=[30, 2], heads=1, qk_dim=16, v_dim=16, dtype=torch.float32)
    truth = outputs_and_gradients(attention_of(jagged, n, 0, "reference"), in_fp64(leaves))
    for backend in ("cpu", "triton"):
        assert_close(outputs_and_gradients(attention_of(jagged, n, 0, backend), leaves), truth)


@pytest.mark.parametrize("blocks", [(64, 32), (64, 16), (32, 32), (32, 16), (16, 32), (16, 16)])
def test_the_tiles_that_gpus_are_given_equal_the_reference(blocks, monkeypatch, poisoned_empty):
    from kernels.hstu_attention import triton

    launched = {choice[:2] for by_dtype in triton.TILINGS.values() for row in by_dtype.values() for _, choice in row}
    assert blocks in launched
    monkeypatch.setattr(triton, "tiling", lambda *_: (*blocks, 4, 1))
    compare("triton", ([70, 5, 41], [7, 5, 0], 0, {"qk_dim": 40, "v_dim": 24}))
    compare("triton", ([70, 33], [9, 0], 21, {"heads": 1}))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_cpu_path_is_exact_in_fp64(case):
    compare("cpu", case, dtype=torch.float64, share=1e-13)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_backend_errs_by_rounding_alone_in_16_bits(dtype, backend):
    leaves, jagged, n = make_inputs([70, 33], targets=[4, 0], qk_dim=16, v_dim=16, dtype=torch.float32)
    narrow = [leaf.detach().mul(0.3).to(dtype).requires_grad_() for leaf in leaves[:3]]
    weights = [leaf.detach().requires_grad_() for leaf in leaves[3:]]
    truth = outputs_and_gradients(attention_of(jagged, n, 0, "reference"), in_fp64(narrow + weights))
    ours = outputs_and_gradients(attention_of(jagged, n, 0, backend), narrow + weights)
    assert [x.dtype for x in ours] == [dtype] * 4 + [torch.float32] * 2
    bound = 5e-3 if dtype == torch.float16 else 1e-2
    assert max(rms_ratio(a, b) for a, b in zip(ours, truth, strict=True)) <= bound


@pytest.mark.parametrize("targets", [None, [2, 0, 3]])
def test_gradcheck(targets):
    leaves, jagged, n = make_inputs([4, 1, 3], targets=targets, qk_dim=2, v_dim=3)
    assert torch.autograd.gradcheck(attention_of(jagged, n, 0, "cpu"), leaves)
    assert torch.autograd.gradcheck(attention_of(jagged, n, 2, "cpu"), leaves)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_kernels_repeat_bit_for_bit(backend):
    leaves, jagged, n = make_inputs([70, 40], targets=[3, 0], dtype=torch.float32)
    first, second = (outputs_and_gradients(attention_of(jagged, n, 0, backend), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_the_time_bucket_is_exact_at_every_threshold_edge(backend):
    thresholds = torch.tensor(TIME_THRESHOLDS_MS[:122])
    differences = torch.cat(
        [thresholds - 1, thresholds, thresholds + 1, torch.tensor([0, 1, 999, 1000, 1001, 2**63 - 2, 2**63 - 1])]
    )
    num_users = len(differences)
    # One user of two tokens a difference; scores are the time weight of the pair alone.
    times = torch.zeros(2 * num_users, dtype=torch.int64)
    query_times = times.clone()
    query_times[1::2] = differences
    jagged = JaggedTimes.of(torch.arange(num_users + 1) * 2, times, query_times)
    zeros, v = torch.zeros(2 * num_users, 1, 16), torch.zeros(2 * num_users, 1, 16)
    v[0::2] = 1.0
    time_weight = torch.arange(NUM_TIME_BUCKETS, dtype=torch.float32) + 10.0
    out = hstu_attention(zeros, zeros, v, jagged, torch.zeros(2), time_weight, 2, backend=backend)
    expected = torch.searchsorted(torch.tensor(TIME_THRESHOLDS_MS), differences, right=True)
    assert torch.equal((2 * out[1::2, 0, 0] - 10.0).round().long(), expected)


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


def _alone(jagged, start, stop, m):
    num_targets = None if jagged.num_targets is None else torch.tensor([m])
    return JaggedTimes.of(
        torch.tensor([0, stop - start]), jagged.times[start:stop], jagged.query_times[start:stop], num_targets
    )


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 300),
    before=st.lists(st.integers(0, 300), max_size=4),
    after=st.lists(st.integers(0, 300), max_size=4),
    heads=st.sampled_from([1, 2, 4]),
    dim=st.sampled_from([8, 25, 32, 50, 64]),
    m=st.integers(0, 5),
)
def test_a_user_is_bit_equal_whoever_else_is_in_the_batch(length, before, after, heads, dim, m):
    lengths, m = [*before, length, *after], min(m, length)
    targets = [min(m, n) for n in lengths]
    leaves, jagged, n = make_inputs(
        lengths, targets=targets, heads=heads, qk_dim=dim, v_dim=dim, dtype=torch.float32, max_seq_len=301
    )
    begin, end = sum(before), sum(before) + length
    own = [leaf[begin:end].detach().requires_grad_() for leaf in leaves[:3]] + leaves[3:]
    together = attention_of(jagged, n, 0, "cpu")(*leaves)[begin:end]
    alone = attention_of(_alone(jagged, begin, end, m), n, 0, "cpu")(*own)
    assert torch.equal(together, alone)
    seed = torch.linspace(-1, 1, alone.numel()).view(alone.shape)
    in_batch = torch.autograd.grad((together * seed).sum(), leaves[:3])
    by_itself = torch.autograd.grad((alone * seed).sum(), own[:3])
    assert all(torch.equal(a[begin:end], b) for a, b in zip(in_batch, by_itself, strict=True))


@pytest.mark.parametrize("before", [1, 64, 100])
def test_in_the_kernels_too_a_user_is_bit_equal_whoever_else_is_in_the_batch(before):
    leaves, jagged, n = make_inputs([before, 90, 40], targets=[0, 4, 1], dtype=torch.float32, max_seq_len=120)
    own = [leaf[before : before + 90].detach().requires_grad_() for leaf in leaves[:3]] + leaves[3:]
    together = attention_of(jagged, n, 0, "triton")(*leaves)
    alone = attention_of(_alone(jagged, before, before + 90, 4), n, 0, "triton")(*own)
    assert torch.equal(together[before : before + 90], alone)


def test_nan_of_one_user_stays_with_it():
    leaves, jagged, n = make_inputs([20, 17, 30], dtype=torch.float32)
    clean = attention_of(jagged, n, 0, "cpu")(*leaves)
    spoilt = [leaf.detach().clone() for leaf in leaves]
    for leaf in spoilt[:3]:
        leaf[20:37] = float("nan")
    for backend in ("cpu", "triton"):
        out = attention_of(jagged, n, 0, backend)(*spoilt)
        assert out[20:37].isnan().all()
        torch.testing.assert_close(torch.cat([out[:20], out[37:]]), torch.cat([clean[:20], clean[37:]]))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_permuting_candidates_permutes_their_rows(backend):
    leaves, jagged, n = make_inputs([40], targets=[12], dtype=torch.float32)
    order = torch.cat([torch.arange(28), 28 + torch.randperm(12, generator=torch.Generator().manual_seed(1))])
    moved = [leaf.detach()[order] for leaf in leaves[:3]] + leaves[3:]
    times, query_times = jagged.times[order], jagged.query_times[order]
    permuted = JaggedTimes.of(jagged.seq_offsets, times, query_times, jagged.num_targets)
    straight = attention_of(jagged, n, 0, backend)(*leaves)
    torch.testing.assert_close(attention_of(permuted, n, 0, backend)(*moved), straight[order], rtol=1e-5, atol=1e-6)


def test_the_rows_of_a_history_do_not_depend_on_its_targets():
    leaves, jagged, n = make_inputs([40], targets=[12], dtype=torch.float32)
    history = [leaf.detach()[:28] for leaf in leaves[:3]] + leaves[3:]
    assert torch.equal(
        attention_of(jagged, n, 0, "cpu")(*leaves)[:28], attention_of(_alone(jagged, 0, 28, 0), n, 0, "cpu")(*history)
    )


def test_queries_keys_and_values_may_be_views_of_one_tensor():
    leaves, jagged, n = make_inputs([70, 9], heads=2, qk_dim=8, v_dim=8, dtype=torch.float32)
    joined = torch.cat([leaf.detach().flatten(1) for leaf in leaves[:3]], 1)
    q, k, v = (part.unflatten(1, (2, 8)) for part in joined.split(16, 1))
    for backend in ("cpu", "triton"):
        torch.testing.assert_close(
            attention_of(jagged, n, 0, backend)(q, k, v, *leaves[3:]), attention_of(jagged, n, 0, backend)(*leaves)
        )


def test_the_plan_names_every_block_of_queries_once_and_the_longest_first():
    plan = schedule([0, 200, 200, 265], [20, 0, 65])
    assert sorted(map(tuple, plan.tolist())) == [(0, 0), (0, 64), (0, 128), (0, 192), (2, 0), (2, 64)]
    keys = [0 if user == 2 else min(first + SCHEDULE_ROWS, 180) for user, first in plan.tolist()]
    assert keys == sorted(keys, reverse=True)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), gap=st.sampled_from([2, 2000, 10**6, 10**15]), shift=st.sampled_from([0, -(10**12), 10**12]))
def test_buckets_of_ordered_times_are_those_of_single_differences(data, gap, shift):
    gaps = st.lists(st.integers(0, gap) | st.sampled_from(TIME_THRESHOLDS_MS[:100]), min_size=1, max_size=40)
    keys = torch.tensor(data.draw(gaps)).cumsum(0)[None] + shift
    queries = keys + torch.tensor(
        data.draw(st.lists(st.integers(0, gap), min_size=keys.shape[1], max_size=keys.shape[1]))
    )
    exact = bucket_of((queries[:, :, None] - keys[:, None, :]).abs())
    seen = torch.ones(keys.shape[1], keys.shape[1]).tril().bool()
    assert torch.equal(bucket_of_ordered(queries, keys)[0][seen], exact[0][seen])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("targets", [None, [3, 0]])
def test_times_in_any_order_are_taken(backend, targets):
    leaves, jagged, n = make_inputs([40, 20], targets=targets, dtype=torch.float32)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = JaggedTimes.of(jagged.seq_offsets, jagged.times[order], jagged.query_times, jagged.num_targets)
    truth = outputs_and_gradients(attention_of(shuffled, n, 0, "reference"), in_fp64(leaves))
    assert_close(outputs_and_gradients(attention_of(shuffled, n, 0, backend), leaves), truth)


@pytest.mark.parametrize("targets", [None, [3, 0, 4]])
def test_buckets_that_are_too_many_are_formed_tile_by_tile_and_not_kept(targets, monkeypatch):
    leaves, jagged, n = make_inputs([300, 0, 40], targets=targets, dtype=torch.float32)
    kept = outputs_and_gradients(attention_of(jagged, n, 0, "cpu"), leaves)
    monkeypatch.setattr(tiles, "PLAN_BYTES", 100)
    large = JaggedTimes.of(jagged.seq_offsets, jagged.times, jagged.query_times, jagged.num_targets)
    assert len(jagged.plan) > 0 == len(large.plan)
    formed = outputs_and_gradients(attention_of(large, n, 0, "cpu"), leaves)
    assert all(torch.equal(a, b) for a, b in zip(kept, formed, strict=True))


def test_groups_hold_every_user_with_a_history_once():
    users = spans([0, 5, 5, 40, 340, 353], None)
    members = [user for group in groups(users) for user in group.users]
    assert sorted(user.start for user in members) == [0, 5, 40, 340]
    assert all(user.h <= group.n < user.h + 16 for group in groups(users) for user in group.users)


def _op_arguments(leaves, jagged, n, window=0):
    shared = (jagged.seq_offsets, jagged.times, jagged.query_times, jagged.num_targets, jagged.plan)
    return (*leaves, *shared, n, window, "cpu")


@pytest.mark.parametrize("targets", [None, [1, 0, 2]])
def test_the_op_passes_opcheck(targets):
    leaves, jagged, n = make_inputs([5, 0, 4], targets=targets, qk_dim=3, v_dim=2)
    torch.library.opcheck(torch.ops.gr.hstu_attention.default, _op_arguments(leaves, jagged, n))


def test_the_op_exports_and_compiles_whole():
    leaves, jagged, n = make_inputs([5, 0, 40], dtype=torch.float32)
    expected = attention_of(jagged, n, 0, None)(*leaves)

    class Attention(torch.nn.Module):
        def forward(self, q, k, v, pos_weight, time_weight):
            return hstu_attention(q, k, v, jagged, pos_weight, time_weight, n)

    exported = torch.export.export(Attention(), tuple(leaf.detach() for leaf in leaves))
    assert any("hstu_attention" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*leaves), expected)
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    eager = torch.autograd.grad(expected.square().sum(), leaves)
    for a, b in zip(grads, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_one_compiled_function_takes_batches_of_any_lengths():
    compiled = torch.compile(
        lambda leaves, jagged: hstu_attention(*leaves[:3], jagged, *leaves[3:], 60), fullgraph=True, backend="aot_eager"
    )
    for seed, lengths in enumerate([[5, 0, 40], [7, 9], [50, 3, 3, 1], [2]]):
        leaves, jagged, _ = make_inputs(lengths, dtype=torch.float32, max_seq_len=60, seed=seed)
        torch.testing.assert_close(compiled(leaves, jagged), attention_of(jagged, 60, 0, None)(*leaves))


def changed(**changes):
    """Return the op's arguments of a small batch with some replaced by f(old)."""
    leaves, jagged, n = make_inputs([5, 7], targets=[1, 0], dtype=torch.float32)
    names = ("q", "k", "v", "pos_weight", "time_weight")
    arguments = dict(zip(names, (leaf.detach() for leaf in leaves), strict=True))
    arguments |= {"jagged": jagged, "max_seq_len": n}
    return arguments | {name: change(arguments.get(name)) for name, change in changes.items()}


BAD = {
    "dtype of q": {"q": lambda q: q.int()},
    "shape of q": {"q": lambda q: q[0]},
    "shape of k": {"k": lambda k: k[:, :, :4]},
    "dtype of v": {"v": lambda v: v.double()},
    "device of v": {"v": lambda v: v.to("meta")},
    "stride of k": {"k": lambda k: k.transpose(1, 2).contiguous().transpose(1, 2)},
    "head dim of q": {"q": lambda q: q.new_zeros(12, 2, 257), "k": lambda k: k.new_zeros(12, 2, 257)},
    "head dim of v": {"v": lambda v: v.new_zeros(12, 2, 0)},
    "shape of pos_weight": {"pos_weight": lambda w: w[:-1]},
    "shape of time_weight": {"time_weight": lambda w: w[:-1]},
    "max_attn_len": {"max_attn_len": lambda _: -1},
    "max_seq_len is 8.0": {"max_seq_len": float},
    "max_attn_len is None": {"max_attn_len": lambda _: None},
    "dtype of q is torch.float64": {
        **{name: lambda x: x.double() for name in ("q", "k", "v", "pos_weight", "time_weight")},
        "backend": lambda _: "triton",
    },
    "backend": {"backend": lambda _: "cuda"},
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_argument_is_named(name):
    with pytest.raises(ValueError, match=name):
        hstu_attention(**changed(**BAD[name]))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_autocast_changes_nothing(backend):
    leaves, jagged, n = make_inputs([40, 9], targets=[3, 0], dtype=torch.float32)
    plain = outputs_and_gradients(attention_of(jagged, n, 0, backend), leaves)

    def attention(*leaves):
        with torch.autocast("cpu", torch.bfloat16):
            return attention_of(jagged, n, 0, backend)(*leaves)

    assert all(torch.equal(a, b) for a, b in zip(outputs_and_gradients(attention, leaves), plain, strict=True))


@pytest.mark.parametrize("first", [-(2**63), -(10**15), 2**62])
def test_times_far_from_zero_are_bucketed_exactly(first):
    (q, k, v, *weights), jagged, n = make_inputs([30], dtype=torch.float32)
    times = jagged.times - jagged.times[0] + first
    far = JaggedTimes.of(jagged.seq_offsets, times, times)
    near = JaggedTimes.of(jagged.seq_offsets, times - first, times - first)
    for backend in ("reference", "cpu"):
        torch.testing.assert_close(
            attention_of(far, n, 0, backend)(q, k, v, *weights),
            attention_of(near, n, 0, "reference")(q, k, v, *weights),
        )


@pytest.mark.parametrize(("length", "m", "fits"), [(8, 0, 8), (8, 1, 8), (8, 5, 4)])
def test_a_history_beyond_n_is_refused_and_targets_do_not_count(length, m, fits):
    leaves, jagged, _ = make_inputs([length], targets=[m], dtype=torch.float32)
    q, k, v, _, time_weight = leaves
    hstu_attention(q, k, v, jagged, torch.zeros(fits), time_weight, fits)
    with pytest.raises(ValueError, match=f"max_seq_len is {fits - 1}, must be at least {fits}"):
        hstu_attention(q, k, v, jagged, torch.zeros(fits - 1), time_weight, fits - 1)


@pytest.mark.parametrize("offsets", [[1, 4], [0, 3], [0, 3, 2, 4], []])
def test_wrong_offsets_are_named(offsets):
    times = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="seq_offsets"):
        JaggedTimes.of(torch.tensor(offsets, dtype=torch.int64), times, times)


def test_wrong_times_and_targets_are_named():
    offsets, times = torch.tensor([0, 4]), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="dtype of times"):
        JaggedTimes.of(offsets, times.float(), times)
    with pytest.raises(ValueError, match="shape of query_times"):
        JaggedTimes.of(offsets, times, times[:3])
    with pytest.raises(ValueError, match=r"num_targets\[0\] is 5, must be between 0 and the user's 4 tokens"):
        JaggedTimes.of(offsets, times, times, torch.tensor([5]))


def on_gpu(leaves, jagged):
    tensors = {f.name: getattr(jagged, f.name) for f in dataclasses.fields(jagged)}
    times = [tensors[name].cuda() for name in ("seq_offsets", "times", "query_times")]
    targets = jagged.num_targets if jagged.num_targets is None else jagged.num_targets.cuda()
    return [leaf.detach().cuda().requires_grad_() for leaf in leaves], JaggedTimes.of(*times, targets)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_on_a_gpu_kernels_equal_the_reference(case, dim, dtype):
    lengths, targets, window, _ = case
    leaves, jagged, n = make_inputs(lengths, targets=targets, qk_dim=dim, v_dim=dim, dtype=torch.float32)
    narrow = [leaf.detach().mul(0.2).to(dtype).requires_grad_() for leaf in leaves[:3]]
    leaves = narrow + [leaf.detach().requires_grad_() for leaf in leaves[3:]]
    truth = outputs_and_gradients(attention_of(jagged, n, window, "reference"), in_fp64(leaves))
    there, batch = on_gpu(leaves, jagged)
    ours = [x.cpu() for x in outputs_and_gradients(attention_of(batch, n, window, None), there)]
    if dtype == torch.float32:
        assert_close(ours, truth)
    else:
        ratios = [rms_ratio(a, b) for a, b in zip(ours, truth, strict=True) if b.count_nonzero()]
        assert max(ratios, default=0.0) <= (5e-3 if dtype == torch.float16 else 3e-2)

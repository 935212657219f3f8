"""Cached attention: new rows over a past, paged or contiguous, equal the same rows of the whole sequence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.hstu_attention import JaggedTimes, hstu_attention
from kernels.hstu_attention_cached import PastKV, attend_candidates, attend_new, hstu_attention_cached, shared_tiles
from tests.kernels.attention_cases import make_inputs, rms_ratio

# (past, new history, candidates) of each user.
USERS = [(30, 3, 0), (0, 5, 4), (70, 0, 90), (100, 1, 1), (0, 0, 0), (17, 0, 0), (0, 0, 3)]


def paged(rows, lengths, page, generator):
    """Return rows [sum lengths, ...] in pages of random places, poisoned where no row is, and the page table."""
    counts = [-(-length // page) for length in lengths]
    places = iter(torch.randperm(sum(counts) + 3, generator=generator).tolist())
    pools = [
        x.new_full((sum(counts) + 3, page, *x.shape[1:]), float("nan") if x.is_floating_point() else -1) for x in rows
    ]
    table = torch.zeros(len(lengths), max([*counts, 1]), dtype=torch.int32)
    start = 0
    for user, length in enumerate(lengths):
        for block in range(0, length, page):
            place, size = next(places), min(page, length - block)
            table[user, block // page] = place
            for pool, x in zip(pools, rows, strict=True):
                pool[place, :size] = x[start + block : start + block + size]
        start += length
    return pools, table


def split(
    users, *, page=0, dtype=torch.float32, window=0, one_request=False, dims=(8, 6), heads=2, seed=0, device="cpu"
):
    """Return the truth (rows of a full forward in fp64) and run(backend) -> the same rows over a cache."""
    lengths, targets = [sum(user) for user in users], [m for _, _, m in users]
    leaves, jagged, n = make_inputs(lengths, targets=targets, heads=heads, qk_dim=dims[0], v_dim=dims[1], seed=seed)
    q, k, v, *weights = (leaf.detach() for leaf in leaves)
    starts = jagged.seq_offsets.tolist()
    times, query_times = jagged.times.clone(), jagged.query_times.clone()
    for start, (p, h, m) in zip(starts[:-1], users, strict=True):
        own = slice(start + p + h, start + p + h + m)
        if one_request and m:
            times[own] = query_times[own] = times[own.start]
    whole = JaggedTimes.of(jagged.seq_offsets, times, query_times, jagged.num_targets)
    full = hstu_attention(q, k, v, whole, *weights, n, max_attn_len=window, backend="reference")
    past_rows = torch.cat([torch.arange(s, s + p) for s, (p, _, _) in zip(starts[:-1], users, strict=True)])
    new_rows = torch.cat([torch.arange(s + p, s + p + h + m) for s, (p, h, m) in zip(starts[:-1], users, strict=True)])
    past = [k[past_rows].to(dtype), v[past_rows].to(dtype), times[past_rows]]
    past_lengths, table = [p for p, _, _ in users], None
    if page:
        past, table = paged(past, past_lengths, page, torch.Generator().manual_seed(seed))
    offsets = torch.tensor([0, *(h + m for _, h, m in users)]).cumsum(0)
    new = [x[new_rows].to(dtype) for x in (q, k, v)]
    narrow = [w.to(torch.float32 if dtype != torch.float64 else dtype) for w in weights]

    def there(*tensors):
        return [None if x is None else x.to(device) for x in tensors]

    def run(backend, order=slice(None)):
        cache = PastKV(*there(*past, torch.tensor([0, *past_lengths]).cumsum(0), table))
        q, k, v, own_times, asked = (x[order] for x in (*new, times[new_rows], query_times[new_rows]))
        given = there(q, k, v, offsets, own_times, asked)
        num_targets = torch.tensor(targets).to(device)
        options = {"num_targets": num_targets, "max_attn_len": window, "backend": backend}
        return hstu_attention_cached(*given, cache, *there(*narrow), n, **options).cpu()

    return full[new_rows], run


def test_tiles_that_layers_share_change_no_bit():
    for page in (0, 4):
        given = arguments(page)
        names = ("seq_offsets", "times", "query_times", "past", "num_targets")
        tiles = shared_tiles(*(given[name] for name in names))
        assert torch.equal(hstu_attention_cached(**given, tiles=tiles), hstu_attention_cached(**given))


def worst_share(ours, truth):
    return float((ours - truth).abs().max() / truth.abs().max()) if truth.numel() else 0.0


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("page", [0, 16])
def test_rows_over_a_cache_equal_the_full_forward(backend, window, page, poisoned_empty):
    truth, run = split(USERS, page=page, window=window, one_request=page == 16)
    assert worst_share(run(backend), truth) <= 1e-5


@settings(deadline=None, max_examples=40)
@given(
    users=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(0, 12)), min_size=1, max_size=4),
    page=st.sampled_from([0, 1, 16]),
    window=st.sampled_from([0, 7]),
)
def test_every_split_into_past_and_new_is_exact_in_fp64(users, page, window):
    truth, run = split(users, page=page, dtype=torch.float64, window=window)
    assert worst_share(run("cpu"), truth) <= 1e-12


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_every_backend_errs_by_rounding_alone_in_fp16(backend):
    truth, run = split([(60, 3, 9), (5, 0, 70)], dtype=torch.float16, dims=(16, 16))
    out = run(backend)
    assert out.dtype == torch.float16
    assert rms_ratio(out, truth) <= 5e-3


def test_pages_and_contiguous_rows_give_the_same_bits():
    _, run = split(USERS)
    _, run_paged = split(USERS, page=16)
    for backend in ("cpu", "triton"):
        assert torch.equal(run(backend), run_paged(backend))


def test_permuting_candidates_permutes_rows_of_the_op():
    order = torch.cat([torch.arange(2), 2 + torch.randperm(40, generator=torch.Generator().manual_seed(1))])
    for page, backend in ((0, "cpu"), (16, "cpu"), (0, "triton"), (16, "triton")):
        _, run = split([(90, 2, 40)], page=page)
        torch.testing.assert_close(run(backend, order), run(backend)[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["past.offsets is a user with 9 tokens", r"past.page_table\[0\] is"])
def test_the_reference_refuses_the_same_places(name):
    page, changes = BAD[name]
    with pytest.raises(ValueError, match=name):
        hstu_attention_cached(**arguments(page, **changes), backend="reference")


def test_candidates_of_one_request_equal_those_with_a_time_each():
    truth, run = split([(90, 2, 40)], one_request=True)
    assert worst_share(run("cpu"), truth) <= 1e-5


@settings(deadline=None, max_examples=25)
@given(length=st.integers(1, 40), data=st.data())
def test_attention_in_two_pieces_equals_attention_at_once(length, data):
    cut = data.draw(st.integers(0, length))
    (q, k, v, *weights), jagged, n = make_inputs([length])
    whole = hstu_attention(q, k, v, jagged, *weights, n)
    times, query_times = jagged.times, jagged.query_times
    head = attend_new(q[:cut], k[:cut], v[:cut], query_times[:cut], times[:cut], *weights, n)
    tail = attend_new(q[cut:], k, v, query_times[cut:], times, *weights, n)
    torch.testing.assert_close(torch.cat([head, tail]), whole, rtol=1e-10, atol=1e-12)


def test_candidates_together_equal_each_appended_alone_and_permute():
    (q, k, v, *weights), jagged, n = make_inputs([30])
    past, num_candidates = 25, 5
    request_time = jagged.times[-1:] + 5000
    together = attend_candidates(
        q[past:], k[past:], v[past:], k[:past], v[:past], request_time, jagged.times[:past], *weights, n
    )
    for c in range(num_candidates):
        one = past + c
        keys, values = torch.cat([k[:past], k[one : one + 1]]), torch.cat([v[:past], v[one : one + 1]])
        key_times = torch.cat([jagged.times[:past], request_time])
        alone = attend_new(q[one : one + 1], keys, values, request_time, key_times, *weights, n)
        torch.testing.assert_close(together[c : c + 1], alone, rtol=1e-10, atol=1e-12)
    order = torch.tensor([3, 0, 4, 2, 1]) + past
    permuted = attend_candidates(
        q[order], k[order], v[order], k[:past], v[:past], request_time, jagged.times[:past], *weights, n
    )
    torch.testing.assert_close(permuted, together[order - past], rtol=1e-10, atol=1e-12)


def arguments(page=0, **changes):
    (q, k, v, *weights), jagged, n = make_inputs([9], dtype=torch.float32, max_seq_len=12)
    q, k, v, *weights = (x.detach() for x in (q, k, v, *weights))
    past = {"k": k[:6], "v": v[:6], "times": jagged.times[:6], "offsets": torch.tensor([0, 6]), "page_table": None}
    if page:
        pools, past["page_table"] = paged([past["k"], past["v"], past["times"]], [6], page, torch.Generator())
        past |= dict(zip(("k", "v", "times"), pools, strict=True))
    given = {
        "q": q[6:], "k": k[6:], "v": v[6:], "seq_offsets": torch.tensor([0, 3]), "times": jagged.times[6:],
        "query_times": jagged.query_times[6:], "pos_weight": weights[0], "time_weight": weights[1], "max_seq_len": n,
        "num_targets": torch.tensor([1]),
    }  # fmt: skip
    for name, change in changes.items():
        where, name = (past, name.removeprefix("past_")) if name.startswith("past_") else (given, name)
        where[name] = change(where[name])
    return given | {"past": PastKV(**past)}


BAD = {
    "dtype of past.k": (0, {"past_k": lambda k: k.double()}),
    "shape of past.v": (0, {"past_v": lambda v: v[:5]}),
    "stride of past.k": (0, {"past_k": lambda k: k.transpose(0, 1).contiguous().transpose(0, 1)}),
    "dtype of past.page_table": (4, {"past_page_table": lambda t: t.long()}),
    "shape of past.offsets": (0, {"past_offsets": lambda o: o[:1]}),
    "past.offsets is": (0, {"past_offsets": lambda o: o - o + torch.tensor([0, 5])}),
    "past.offsets is a user with 9 tokens": (4, {"past_offsets": lambda o: torch.tensor([0, 9])}),
    r"past.page_table\[0\] is": (4, {"past_page_table": lambda t: t - t + torch.tensor([[0, 9]], dtype=torch.int32)}),
    "must be page numbers": (4, {"past_page_table": lambda t: t - t - 1}),
    "max_seq_len is 12.0": (0, {"max_seq_len": float}),
    "seq_offsets": (0, {"seq_offsets": lambda o: torch.tensor([0, 2])}),
    "num_targets": (0, {"num_targets": lambda m: m + 3}),
    "max_seq_len is 8, must be at least 9": (
        0,
        {"max_seq_len": lambda n: 8, "pos_weight": lambda w: w[:8]},
    ),
    "shape of query_times": (0, {"query_times": lambda t: t[:2]}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_argument_is_named(name):
    page, changes = BAD[name]
    with pytest.raises(ValueError, match=name):
        hstu_attention_cached(**arguments(page, **changes))


@pytest.mark.parametrize("page", [0, 4])
def test_the_op_passes_opcheck_and_compiles_whole(page):
    given = arguments(page)
    past = given["past"]
    flat = (
        *(given[name] for name in ("q", "k", "v", "seq_offsets", "times", "query_times", "num_targets")),
        past.k, past.v, past.times, past.offsets, past.page_table, given["pos_weight"], given["time_weight"],
        given["max_seq_len"], 0,
    )  # fmt: skip
    tiles = shared_tiles(given["seq_offsets"], given["times"], given["query_times"], past, given["num_targets"])
    for shared in ([], tiles):
        torch.library.opcheck(torch.ops.gr.hstu_attention_cached.default, (*flat, shared, "cpu"))
    compiled = torch.compile(lambda q: hstu_attention_cached(**given | {"q": q}), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given["q"]), hstu_attention_cached(**given))


@pytest.mark.gpu
@pytest.mark.parametrize("page", [0, 64])
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_on_a_gpu_rows_over_a_cache_equal_the_full_forward(dim, page):
    truth, run = split(USERS, page=page, dims=(dim, dim), device="cuda")
    assert worst_share(run(None), truth) <= 1e-5

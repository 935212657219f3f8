"""What every encoder keeps: users apart, the future unseen, rows on demand; and of those with K/V, exact caching."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_platform.errors import UserError
from gr_platform.models.batch import EventBatch
from gr_platform.models.build import build_encoder, build_model
from gr_platform.models.compute import TorchCompute
from gr_platform.models.config import ModelConfig
from gr_platform.models.hstu_softmax import HSTUSoftmax
from gr_platform.models.paged import PaddedPast
from gr_platform.models.softmax_attention import Blocks, softmax_attention
from gr_platform.models.tokens import ranking_tokens, retrieval_tokens
from kernels import JaggedTimes
from tests.gr_platform.paging import NUM_PAGES, encode_in_pieces, score

NUM_ROWS, FIRST_ITEM, NUM_ACTIONS, TASKS = 60, 5, 3, ["like", "purchase"]
TOLERANCE = 1e-10
CACHED = ("transformer", "sasrec", "hstu_softmax")
CAUSAL = (*CACHED, "gru4rec")
LENGTHS = (1, 7, 30, 31, 12)


def make_config(encoder, kind="retrieval", **changes):
    shape = {"embedding_dim": 12, "num_layers": 3, "num_heads": 2, "qk_dim": 5, "v_dim": 4, "max_events": 30}
    return ModelConfig(kind=kind, encoder=encoder, **(shape | changes))


def make_encoder(encoder, **changes):
    torch.manual_seed(0)
    model = build_encoder(make_config(encoder, **changes)).double().eval()
    return grown(model, encoder)


def make_model(encoder, kind):
    torch.manual_seed(0)
    model = build_model(make_config(encoder, kind), num_rows=NUM_ROWS, num_actions=NUM_ACTIONS, tasks=TASKS).double()
    return grown(model, encoder).eval()


def grown(model, encoder):
    """Return the model with weights as large as trained ones, so that every term matters in a comparison."""
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if encoder == "hstu_softmax" else 1.5)
    return model


def make_jagged(lengths=LENGTHS, seed=0):
    """Return token vectors [L, 12] in fp64 and the jagged times of users of these lengths."""
    rng = np.random.default_rng(seed)
    offsets = torch.tensor(np.cumsum([0, *lengths]))
    users = [np.cumsum((10 ** rng.uniform(0, 9, n + 1)).astype(np.int64)) for n in lengths]
    times = torch.from_numpy(np.concatenate([t[:-1] for t in users]))
    query_times = torch.from_numpy(np.concatenate([t[1:] for t in users]))
    x = torch.from_numpy(rng.normal(size=(int(offsets[-1]), 12)))
    return x, JaggedTimes.of(offsets, times, query_times)


def make_history(length, seed):
    rng = np.random.default_rng(seed)
    times = 10**12 + np.cumsum((10 ** rng.uniform(0, 9, length + 1)).astype(np.int64))
    items, actions = rng.integers(FIRST_ITEM, NUM_ROWS, length), rng.integers(1, 2**NUM_ACTIONS, length)
    return (items, actions, times[:-1]), int(times[-1])


def close(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    scale = max(float(np.max(np.abs(expected), initial=0.0)), 1e-30)
    return float(np.max(np.abs(actual - expected), initial=0.0)) <= TOLERANCE * scale


@torch.no_grad()
@pytest.mark.parametrize("encoder", [*CAUSAL, "bert4rec"])
def test_rows_of_a_user_do_not_depend_on_batch_mates(encoder):
    model = make_encoder(encoder)
    x, jagged = make_jagged()
    bounds = jagged.seq_offsets.tolist()
    together = model(x, jagged)
    for start, stop in pairwise(bounds):
        span = slice(start, stop)
        own = JaggedTimes.of(torch.tensor([0, stop - start]), jagged.times[span], jagged.query_times[span])
        assert close(together[span], model(x[span], own))


@torch.no_grad()
@pytest.mark.parametrize("encoder", CAUSAL)
def test_a_later_token_changes_no_earlier_row(encoder):
    model = make_encoder(encoder)
    x, jagged = make_jagged((20, 9))
    changed = x.clone()
    changed[[12, 25]] = torch.linspace(-1, 2, 12, dtype=torch.float64) ** 2
    before, after = model(x, jagged), model(changed, jagged)
    moved = (before - after).abs().amax(1) > 1e-9
    assert moved[12:20].all()
    assert moved[25:29].all()
    assert not moved[:12].any()
    assert not moved[20:25].any()


@torch.no_grad()
def test_bert4rec_sees_both_sides():
    model = make_encoder("bert4rec")
    x, jagged = make_jagged((20,))
    changed = x.clone()
    changed[12] = torch.linspace(-1, 2, 12, dtype=torch.float64) ** 2
    assert ((model(x, jagged) - model(changed, jagged)).abs().amax(1) > 1e-9).all()


@torch.no_grad()
@pytest.mark.parametrize("encoder", [*CAUSAL, "bert4rec"])
@pytest.mark.parametrize("rows", [[80, 3, 3, 40], [0], []])
def test_rows_on_demand_are_those_of_the_full_output(encoder, rows):
    model = make_encoder(encoder)
    x, jagged = make_jagged()
    rows = torch.tensor(rows, dtype=torch.int64)
    assert close(model(x, jagged, rows), model(x, jagged)[rows])


@settings(deadline=None, max_examples=8)
@given(length=st.integers(0, 30), seed=st.integers(0, 5), data=st.data())
@pytest.mark.parametrize("encoder", CACHED)
def test_ranking_full_forward_equals_prefill_delta_and_score(encoder, length, seed, data):
    model = make_model(encoder, "ranking")
    history, request_time = make_history(length, seed)
    tokens = ranking_tokens(*history, request_time)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=3)))
    compute = TorchCompute(model, NUM_PAGES)
    _, pages = encode_in_pieces(compute, tokens, cuts, keeps_last=True)
    candidates = np.random.default_rng(seed).integers(FIRST_ITEM, NUM_ROWS, 5)
    full = model.score(EventBatch.of([history], [request_time]), torch.from_numpy(candidates)[None])[0]
    microbatch = data.draw(st.integers(1, 5))
    pieces = [
        score(compute, candidates[i : i + microbatch], request_time, len(tokens), pages)
        for i in range(0, 5, microbatch)
    ]
    assert close(np.concatenate(pieces), full)


@settings(deadline=None, max_examples=8)
@given(length=st.integers(0, 30), seed=st.integers(0, 5), data=st.data())
@pytest.mark.parametrize("encoder", CACHED)
def test_retrieval_full_forward_equals_prefill_and_delta(encoder, length, seed, data):
    model = make_model(encoder, "retrieval")
    history, request_time = make_history(length, seed)
    tokens = retrieval_tokens(*history, request_time)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=3)))
    rows, _ = encode_in_pieces(TorchCompute(model, NUM_PAGES), tokens, cuts, keeps_last=False)
    user = rows[0] / np.linalg.norm(rows[0])
    assert close(user, model.user_vectors(EventBatch.of([history], [request_time]))[0].detach())


@pytest.mark.parametrize("encoder", ["gru4rec", "bert4rec"])
def test_an_encoder_without_kv_refuses_to_go_on_from_a_cache(encoder):
    model, none = make_encoder(encoder), torch.zeros(0)
    with pytest.raises(UserError, match="keeps no K/V"):
        model.encode(none, none, none, none, none, none)
    with pytest.raises(UserError, match="keeps no K/V"):
        model.score(none, none, PaddedPast.of_one(none, none[None], none[None]))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_blocks_is_softmax_attention_of_each_user(causal):
    torch.manual_seed(0)
    offsets = torch.tensor(np.cumsum([0, 0, *LENGTHS, 0]))
    q, k, v = torch.randn(3, int(offsets[-1]), 2, 5, dtype=torch.float64)
    blocks = Blocks.of(offsets)
    padded = softmax_attention(*(x[blocks.source] for x in (q, k, v)), blocks, causal=causal)
    for start, stop in pairwise(offsets):
        scores = torch.einsum("chd,lhd->hcl", q[start:stop], k[start:stop]) / 5**0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        expected = torch.einsum("hcl,lhd->chd", scores.softmax(-1), v[start:stop])
        assert close(padded[blocks.place[start:stop]], expected)


def test_blocks_hold_every_token_once_and_little_padding():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 202, 128)
    offsets = torch.tensor(np.cumsum([0, *lengths]))
    blocks = Blocks.of(offsets)
    assert torch.equal(blocks.source[blocks.place], torch.arange(int(offsets[-1])))
    assert int(blocks.real.sum()) == int(offsets[-1])
    assert sum(count * n for count, n in blocks.shapes) == len(blocks.source) <= 1.1 * int(offsets[-1])
    assert sum(count for count, _ in blocks.shapes) == int((lengths > 0).sum())


def test_gradients_of_softmax_hstu_match_finite_differences():
    torch.manual_seed(0)
    shape = {"embedding_dim": 4, "num_layers": 2, "qk_dim": 3, "v_dim": 2, "max_events": 9, "chunk": 4}
    encoder = HSTUSoftmax(make_config("hstu_softmax", **shape)).double().eval()
    for parameter in encoder.parameters():
        parameter.data.mul_(8.0)
    _, jagged = make_jagged((3, 0, 6))
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in encoder.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(encoder, dict(zip(names, values, strict=True)), (x, jagged))

    assert torch.autograd.gradcheck(run, (x, *encoder.parameters()), fast_mode=True)
    encoder(x, jagged).square().sum().backward()
    assert all(layer.pos_weight.grad.any() and layer.time_weight.grad.any() for layer in encoder.layers)


def test_softmax_hstu_without_biases_learns_none():
    encoder = build_encoder(make_config("hstu_softmax", position_bias=False, time_bias=False))
    assert not any(layer.pos_weight.requires_grad or layer.time_weight.requires_grad for layer in encoder.layers)
    assert not any(layer.pos_weight.any() or layer.time_weight.any() for layer in encoder.layers)

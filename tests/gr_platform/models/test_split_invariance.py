"""Caching is exact: a full forward equals prefill + delta + score for every split, in fp64 to 1e-10."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr_platform.bundle.compute import Ask, Piece
from gr_platform.models.batch import EventBatch
from gr_platform.models.build import build_model
from gr_platform.models.compute import TorchCompute
from gr_platform.models.config import ModelConfig
from gr_platform.models.tokens import ranking_tokens, retrieval_tokens
from tests.gr_platform.paging import NUM_PAGES, encode_in_pieces, score, scrambled

NUM_ROWS, NUM_ACTIONS, TASKS = 60, 3, ["like", "purchase"]
TOLERANCE = 1e-10


def make_model(kind, *, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    config = ModelConfig(kind=kind, embedding_dim=12, num_layers=3, num_heads=2, qk_dim=5, v_dim=4, max_events=30)
    model = build_model(config, num_rows=NUM_ROWS, num_actions=NUM_ACTIONS, tasks=TASKS).to(dtype).eval()
    # Weights as large as trained ones, so that every term of the bias matters in the comparison.
    for parameter in model.parameters():
        parameter.data.mul_(8.0)
    return model


def make_history(length, seed):
    rng = np.random.default_rng(seed)
    times = 10**12 + np.cumsum((10 ** rng.uniform(0, 9, length + 1)).astype(np.int64))
    return (rng.integers(1, NUM_ROWS, length), rng.integers(1, 2**NUM_ACTIONS, length), times[:-1]), int(times[-1])


def close(actual, expected):
    scale = max(float(np.max(np.abs(expected), initial=0.0)), 1e-30)
    return float(np.max(np.abs(actual - expected), initial=0.0)) <= TOLERANCE * scale


@settings(deadline=None, max_examples=30)
@given(length=st.integers(0, 30), seed=st.integers(0, 5), data=st.data())
def test_ranking_full_forward_equals_prefill_delta_and_score(length, seed, data):
    model = make_model("ranking")
    history, request_time = make_history(length, seed)
    tokens = ranking_tokens(*history, request_time)
    # Cuts fall anywhere, also between the item and the action of one event.
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=3)))
    compute = TorchCompute(model, NUM_PAGES)
    _, pages = encode_in_pieces(compute, tokens, cuts, keeps_last=True)
    candidates = np.random.default_rng(seed).integers(1, NUM_ROWS, 7)
    full = model.score(EventBatch.of([history], [request_time]), torch.from_numpy(candidates)[None])[0].numpy()
    microbatch = data.draw(st.integers(1, 7))
    pieces = [
        score(compute, candidates[i : i + microbatch], request_time, len(tokens), pages)
        for i in range(0, 7, microbatch)
    ]
    assert close(np.concatenate(pieces), full)


@settings(deadline=None, max_examples=30)
@given(length=st.integers(0, 30), seed=st.integers(0, 5), data=st.data())
def test_retrieval_full_forward_equals_prefill_and_delta(length, seed, data):
    model = make_model("retrieval")
    history, request_time = make_history(length, seed)
    tokens = retrieval_tokens(*history, request_time)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=3)))
    rows, _ = encode_in_pieces(TorchCompute(model, NUM_PAGES), tokens, cuts, keeps_last=False)
    user = rows[0] / np.linalg.norm(rows[0])
    assert close(user, model.user_vectors(EventBatch.of([history], [request_time]))[0].detach().numpy())


@pytest.mark.parametrize("kind", ["ranking", "retrieval"])
def test_only_the_last_retrieval_token_depends_on_the_request_time(kind):
    history, request_time = make_history(12, 1)
    build = ranking_tokens if kind == "ranking" else retrieval_tokens
    keys = []
    for at in (request_time, request_time + 10**8):
        compute, tokens = TorchCompute(make_model(kind), NUM_PAGES), build(*history, at)
        _, pages = encode_in_pieces(compute, tokens, [], keeps_last=True)
        keys.append(compute.pages.k[:, pages.tolist()].flatten(1, 2)[:, : len(tokens)])
    first, later = keys
    assert torch.equal(first[:, :-1], later[:, :-1])
    assert torch.equal(first[:, -1], later[:, -1]) == (kind == "ranking")


@settings(deadline=None, max_examples=20)
@given(users=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40), st.integers(0, 6)), min_size=1, max_size=4))
@pytest.mark.parametrize("kind", ["ranking", "retrieval"])
def test_users_of_one_step_get_what_each_gets_alone(kind, users):
    build = ranking_tokens if kind == "ranking" else retrieval_tokens
    compute = TorchCompute(make_model(kind), 4 * NUM_PAGES)
    room, pieces, asks, alone = scrambled(10**6, num_pages=4 * NUM_PAGES), [], [], []
    for number, (length, cached, num_candidates) in enumerate(users):
        history, request_time = make_history(length, number)
        tokens, pages = build(*history, request_time), room[number * NUM_PAGES :][:NUM_PAGES]
        past = min(cached, len(tokens) - 1)
        keep = len(tokens) - past - (kind == "retrieval")
        ask = Ask(candidates=1 + np.arange(num_candidates), request_time=request_time, past=len(tokens), pages=pages)
        apart = TorchCompute(compute.model, NUM_PAGES)
        rows, own = encode_in_pieces(apart, tokens, [], keeps_last=kind == "ranking")
        alone.append(rows if kind == "retrieval" else score(apart, ask.candidates, request_time, ask.past, own))
        if past:
            encode_in_pieces(compute, tokens.slice(0, past), [], keeps_last=True, pages=pages)
        pieces.append(Piece(tokens=tokens.slice(past, len(tokens)), past=past, pages=pages, keep=keep))
        asks.append(ask)
    together = compute.encode(pieces)
    found = compute.score(asks) if kind == "ranking" else together[:, None]
    assert len(found) == len(users)
    for ours, expected in zip(found, alone, strict=True):
        assert close(ours, expected)


def test_scores_do_not_depend_on_batch_mates():
    model = make_model("ranking", dtype=torch.float32)
    users = [make_history(length, seed) for seed, length in enumerate((3, 30, 0, 17))]
    batch = EventBatch.of([history for history, _ in users], [at for _, at in users])
    with torch.no_grad():
        together = model.logits(batch)
        alone = torch.cat([model.logits(EventBatch.of([history], [at])) for history, at in users])
    assert float((together - alone).abs().max()) <= 1e-5 * float(together.abs().max())


def test_candidates_do_not_see_each_other():
    compute = TorchCompute(make_model("ranking"), NUM_PAGES)
    history, request_time = make_history(9, 3)
    _, pages = encode_in_pieces(compute, ranking_tokens(*history, request_time), [], keeps_last=True)
    candidates = np.array([5, 9, 5, 33, 2])
    together = score(compute, candidates, request_time, 19, pages)
    alone = np.concatenate([score(compute, candidates[i : i + 1], request_time, 19, pages) for i in range(5)])
    assert close(together, alone)
    assert close(together[0], together[2])


def test_a_target_never_sees_its_own_action():
    model = make_model("ranking")
    history, request_time = make_history(8, 2)
    changed = (history[0], np.concatenate([history[1][:-1], history[1][-1:] ^ 7]), history[2])
    with torch.no_grad():
        logits = [model.logits(EventBatch.of([h], [request_time])).numpy() for h in (history, changed)]
    assert np.array_equal(*logits)

"""score.onnx of several users in one call: nobody's score depends on whom it was padded beside."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gr_platform.bundle.compute import Ask, pages_for
from gr_platform.bundle.export import write_graphs
from gr_platform.bundle.groups import CALL_PAIRS, GROUP_BYTES, groups
from gr_platform.bundle.onnx_compute import OnnxCompute
from gr_platform.models.build import build_model
from gr_platform.models.compute import TorchCompute
from gr_platform.models.config import ModelConfig
from gr_platform.models.tokens import ranking_tokens
from tests.gr_platform.paging import encode_in_pieces

NUM_ROWS, FIRST_ITEM, TASKS, MAX_EVENTS, NUM_PAGES = 60, 5, ["like", "buy"], 40, 64
SHAPE = {"embedding_dim": 12, "num_layers": 2, "num_heads": 2, "qk_dim": 5, "v_dim": 4, "max_events": MAX_EVENTS}


@pytest.fixture(scope="module", params=["hstu", "hstu_softmax", "transformer"])
def computes(request, tmp_path_factory):
    """The graphs over pages that hold no numbers yet, and the model in torch."""
    torch.manual_seed(0)
    config = ModelConfig(kind="ranking", encoder=request.param, **SHAPE)
    model = build_model(config, num_rows=NUM_ROWS, num_actions=2, tasks=TASKS).eval()
    for parameter in model.parameters():
        # As large as trained weights, so that every term matters.
        parameter.data.mul_(2.0)
    folder = tmp_path_factory.mktemp("graphs")
    write_graphs(model, folder)
    graph = OnnxCompute(folder, config, len(TASKS), NUM_PAGES)
    for pool in (graph.k, graph.v):
        pool.fill(np.nan)
    graph.times.fill(np.iinfo(np.int64).min)
    return graph, TorchCompute(model, NUM_PAGES)


def ask_of(compute, length, num_candidates, seed, pages):
    rng = np.random.default_rng(seed)
    times = 10**12 + np.cumsum((10 ** rng.uniform(0, 9, length + 1)).astype(np.int64))
    history = rng.integers(FIRST_ITEM, NUM_ROWS, length), rng.integers(1, 4, length), times[:-1]
    tokens = ranking_tokens(*history, int(times[-1]))
    encode_in_pieces(compute, tokens, [], keeps_last=True, pages=pages[: pages_for(len(tokens))])
    candidates = rng.integers(FIRST_ITEM, NUM_ROWS, num_candidates)
    return Ask(candidates=candidates, request_time=int(times[-1]), past=len(tokens), pages=pages)


@settings(deadline=None, max_examples=10)
@example(sizes=[(0, 1), (MAX_EVENTS, 1)])
@given(sizes=st.lists(st.tuples(st.integers(0, MAX_EVENTS), st.integers(0, 9)), min_size=1, max_size=8))
def test_users_scored_together_get_what_each_gets_alone(computes, sizes):
    found = []
    for compute in computes:
        pages = np.random.default_rng(len(sizes)).permutation(NUM_PAGES).astype(np.int32)
        asks = [ask_of(compute, *size, seed, pages[8 * seed : 8 * seed + 8]) for seed, size in enumerate(sizes)]
        found += [compute.score(asks), [compute.score([ask])[0] for ask in asks]]
    for graph_together, graph_alone, together, alone in zip(*found, strict=True):
        np.testing.assert_allclose(graph_together, graph_alone, rtol=1e-5, atol=0)
        np.testing.assert_allclose(together, alone, rtol=1e-5, atol=0)
        # Two libraries round the large weights of this model apart.
        np.testing.assert_allclose(graph_together, together, rtol=1e-4, atol=0)


@given(sizes=st.lists(st.tuples(st.integers(0, 600), st.integers(1, 4096)), max_size=12))
def test_every_list_is_in_one_group_that_is_worth_its_padding_and_stays_in_the_caches(sizes):
    config = ModelConfig(kind="ranking", encoder="hstu", **SHAPE)
    asks = [
        Ask(candidates=np.zeros(c, np.int64), request_time=0, past=past, pages=np.zeros(0, np.int32))
        for c, past in sizes
    ]
    found = list(groups(asks, config))
    assert sorted(place for group in found for place in group.places) == [i for i, (c, _) in enumerate(sizes) if c]
    for own in ([sizes[place] for place in group.places] for group in found if len(group.places) > 1):
        most, longest = max(c for c, _ in own), max(past for _, past in own)
        assert len(own) * most * longest - sum(c * past for c, past in own) <= CALL_PAIRS * (len(own) - 1)
        assert len(own) * longest * (4 * 2 * 2 * (5 + 4) + 4 * 2 * most) <= GROUP_BYTES


def test_one_long_history_does_not_pad_many_short_ones():
    config = ModelConfig(kind="ranking", encoder="hstu", **SHAPE)
    one = np.zeros(1, np.int64)
    asks = [Ask(candidates=one, request_time=0, past=past, pages=np.zeros(0, np.int32)) for past in [2] * 31 + [4096]]
    assert [len(group.places) for group in groups(asks, config)] == [31, 1]


def test_equal_lists_are_one_call(computes, monkeypatch):
    graph, _ = computes
    pages = np.arange(NUM_PAGES, dtype=np.int32)
    asks = [ask_of(graph, 20, 4, seed, pages[8 * seed : 8 * seed + 8]) for seed in range(4)]
    sessions = []

    class Counted:
        def run(self, names, feeds):
            sessions.append(feeds["candidates"].shape)
            return graph_session.run(names, feeds)

    graph_session = graph._score
    monkeypatch.setattr(graph, "_score", Counted())
    graph.score(asks)
    assert sessions == [(4, 4)]

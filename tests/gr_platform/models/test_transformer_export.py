"""M-FALCON serves a Transformer as it serves HSTU: the exported graphs give the model's scores."""

import numpy as np
import pytest
import torch

from gr_platform.bundle.export import write_graphs
from gr_platform.bundle.onnx_compute import OnnxCompute
from gr_platform.models.build import build_model
from gr_platform.models.compute import TorchCompute
from gr_platform.models.recipes import named
from gr_platform.models.tokens import ranking_tokens
from tests.gr_platform.paging import NUM_PAGES, encode_in_pieces, score

NUM_ROWS, FIRST_ITEM, TASKS = 60, 5, ["like", "buy"]


@pytest.fixture(scope="module")
def computes(tmp_path_factory):
    torch.manual_seed(0)
    config = named("tiny-transformer", "ranking").model
    model = build_model(config, num_rows=NUM_ROWS, num_actions=2, tasks=TASKS).eval()
    folder = tmp_path_factory.mktemp("graphs")
    write_graphs(model, folder)
    return OnnxCompute(folder, config, len(TASKS), NUM_PAGES), TorchCompute(model, NUM_PAGES)


@pytest.mark.parametrize(("length", "cut"), [(0, 0), (1, 1), (2, 0), (2, 4), (30, 31)])
def test_exported_graphs_equal_the_model(computes, length, cut):
    rng = np.random.default_rng(length)
    history = rng.integers(FIRST_ITEM, NUM_ROWS, length), rng.integers(1, 4, length), np.arange(length)
    tokens, candidates, answers = ranking_tokens(*history, length), np.arange(FIRST_ITEM, 20), []
    for compute in computes:
        _, pages = encode_in_pieces(compute, tokens, [cut], keeps_last=True)
        answers.append((score(compute, candidates, length, len(tokens), pages),))
    for exported, expected in zip(*answers, strict=True):
        assert np.abs(exported - expected).max() <= 1e-5 * np.abs(expected).max()

"""FLOPs counted from shapes are those that torch counts on the plain path, what is masked there taken off."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gr_platform.models import config as configs
from gr_platform.models.batch import EventBatch
from gr_platform.models.build import ENCODERS, build_encoder, build_model
from gr_platform.models.config import ModelConfig
from gr_platform.training import flops
from kernels import JaggedTimes, full_softmax, sampled_softmax

# No user of one token, whose products torch forms and counts otherwise; none of nearly the same length, which softmax
# encoders pad.
LENGTHS = np.array([2, 15, 0, 100, 40])
RETRIEVAL = ModelConfig(
    kind="retrieval", embedding_dim=10, num_layers=3, num_heads=2, qk_dim=3, v_dim=5, max_events=100, chunk=4
)
RANKING = replace(RETRIEVAL, kind="ranking")


def _counted(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def _step(config, rows):
    """Return what torch counts in a forward and backward pass of plain operations."""
    encoder = build_encoder(config).train()
    encoder.backend = "reference"
    num_tokens = int(LENGTHS.sum())
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(LENGTHS)]))
    times = torch.arange(num_tokens) * 60_000
    x = torch.randn(num_tokens, config.embedding_dim, requires_grad=True)
    jagged = JaggedTimes.of(offsets, times, times)
    with sdpa_kernel(SDPBackend.MATH):
        return _counted(lambda: encoder(x, jagged, rows).sum().backward())


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("num_rows", [int(LENGTHS.sum()), 5])
def test_an_encoder_takes_what_torch_counts_less_the_masked_pairs(name, num_rows):
    config = replace(RETRIEVAL, encoder=name)
    rows = torch.arange(num_rows) if num_rows < LENGTHS.sum() else None
    work = flops.work_of(LENGTHS, num_rows)
    # The plain path forms every pair of a user and masks those above the diagonal.
    masked = replace(work, num_pairs=work.full_pairs)
    # A recurrence begins with zeros, which take no gradient.
    no_gradient = 2 * 3 * 10 * 10 * 3 * np.count_nonzero(LENGTHS) if name == "gru4rec" else 0
    assert _step(config, rows) == flops.PER_STEP * flops.encoder_flops(config, masked) - no_gradient
    assert work.num_pairs == sum(n * (n + 1) // 2 for n in LENGTHS.tolist())


def test_every_encoder_has_a_count():
    assert set(flops.ENCODER_PRODUCTS) == set(ENCODERS)
    assert {*flops.ENCODER_PRODUCTS, "dlrm"} == set(get_args(configs.Encoder))


def _outputs(config, num_outputs):
    """Return the FLOPs of a step of 8 targets that are not the encoder's."""
    whole = flops.step_flops(config, LENGTHS, num_targets=8, num_outputs=num_outputs)
    return whole - flops.PER_STEP * flops.encoder_flops(config, flops.work_of(LENGTHS, 8))


def test_the_retrieval_loss_takes_its_logits():
    users, items = torch.randn(8, 10, requires_grad=True), torch.randn(30, 10, requires_grad=True)
    targets, negatives = torch.arange(8), torch.randint(30, (8, 6))
    full = _counted(lambda: full_softmax(users, items, targets, 0.1, backend="reference").sum().backward())
    sampled = _counted(
        lambda: sampled_softmax(users, items, targets, negatives, 0.1, backend="reference").sum().backward()
    )
    # The plain sampled softmax forms the logits of all items and picks those drawn.
    assert full == sampled == _outputs(RETRIEVAL, 30)
    assert _outputs(RETRIEVAL, 1 + 6) == 3 * 2 * 8 * 7 * 10


def test_ranking_heads_take_two_layers():
    heads = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.SiLU(), torch.nn.Linear(10, 3))
    x = torch.randn(8, 10, requires_grad=True)
    assert _counted(lambda: heads(x).sum().backward()) == _outputs(RANKING, 3)


def test_a_dlrm_takes_its_two_mlps_and_its_crosses():
    config = replace(RANKING, encoder="dlrm", dropout=0.0)
    model = build_model(config, num_rows=30, num_actions=2, tasks=["like", "buy"])
    histories = [tuple(np.arange(1, n + 1, dtype=np.int64) for _ in range(3)) for n in (4, 9)]
    batch = EventBatch.of(histories, [10, 10])
    counted = _counted(lambda: model.loss(batch, task_masks=[1, 2])[0].backward())
    whole = flops.step_flops(config, np.array([9, 19]), num_targets=13, num_outputs=2, num_actions=2)
    # What the bottom MLP reads takes no gradient; torch counts the lookups of actions, made twice, as products.
    assert counted == whole - 2 * 13 * (2 + 2 * 2) * 4 * 10 + 2 * (2 * 2 * 13 * 2 * 10)


def test_candidates_of_a_history_cost_what_a_full_forward_of_each_adds():
    config = replace(RANKING, num_layers=1)
    length, num_candidates = 20, 4
    asked = flops.inference_flops(config, np.array([length]), num_candidates=num_candidates, num_tasks=2)
    alone = flops.inference_flops(config, np.array([length]), num_candidates=1, num_tasks=2)
    none = flops.inference_flops(config, np.array([length]), num_candidates=0, num_tasks=2)
    assert asked - none == num_candidates * (alone - none)
    extended = flops.encoder_flops(config, flops.work_of(np.array([length + 1]), 1))
    heads = 2 * (10 * 10 + 10 * 2)
    assert alone == extended + heads


def test_retrieval_answers_with_one_row_a_user():
    asked = flops.inference_flops(RETRIEVAL, LENGTHS, num_candidates=100)
    assert asked == flops.encoder_flops(RETRIEVAL, flops.work_of(LENGTHS, 5)) + 2 * 5 * 100 * 10


def test_a_run_at_the_peak_for_a_day_is_utilised_whole():
    facts = flops.run_facts(train_flops=1e15 * 86_400, seconds=86_400, peak_gflops=1e6)
    assert facts["pflops_days"] == pytest.approx(1)
    assert facts["flops_utilisation"] == pytest.approx(1)
    assert flops.run_facts(1e12, 20.0, 100.0)["flops_utilisation"] == pytest.approx(0.5)

"""One step is the same step however it is cut: into impressions, into parts, into the targets of a process."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gr_platform.models.batch import EventBatch
from gr_platform.models.build import build_model
from gr_platform.models.recipes import tiny
from gr_platform.training.loop import train
from gr_platform.training.negatives import uniform_negatives
from kernels import sampled_softmax

KINDS = ["retrieval", "ranking"]
POSITIVE, TASKS, NEGATIVES = 0b11, [0b10, 0b01], torch.arange(6, 16)


def double_model(kind):
    torch.manual_seed(3)
    config = replace(tiny(kind).model, dropout=0.0)
    model = build_model(config, num_rows=25, num_actions=2, tasks=["like", "view"]).double()
    for weight in model.parameters():
        weight.data.mul_(4.0)
    return model.train()


def history(num_events, seed):
    rng = np.random.default_rng(seed)
    times = np.cumsum((10 ** rng.uniform(0, 9, num_events)).astype(np.int64))
    return rng.integers(5, 25, num_events), rng.integers(1, 4, num_events), times


def gradients(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, model.parameters(), strict=True)]


def impression(model, items, actions, times, place):
    """Return the loss of one event as an impression-level trainer sees it: the history before it, then the question."""
    if model.config.kind == "ranking":
        upto = slice(place + 1)
        batch = EventBatch.of([(items[upto], actions[upto], times[upto])], [int(times[place])])
        labels = torch.tensor([[bool(int(actions[place]) & mask) for mask in TASKS]]).double()
        return torch.nn.functional.binary_cross_entropy_with_logits(model.logits(batch)[-1:], labels)
    before = slice(place)
    batch = EventBatch.of([(items[before], actions[before], times[before])], [int(times[place])])
    target = torch.tensor([items[place]])
    vectors = model.user_vectors(batch), model.item_vectors()
    return sampled_softmax(*vectors, target, NEGATIVES, model.config.temperature, backend="reference").sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_events", [1, 2, 17])
def test_a_generative_pass_over_a_user_is_the_sum_of_its_impressions_gradients(kind, num_events):
    # For retrieval too: every token looks from the time of the event that follows it, which is when that was asked for.
    model, (items, actions, times) = double_model(kind), history(num_events, seed=num_events)
    batch = EventBatch.of([(items, actions, times)], [int(times[-1])])
    if kind == "ranking":
        loss, count = model.loss(batch, task_masks=TASKS)
    else:
        loss, count = model.loss(batch, negatives=NEGATIVES, positive_mask=POSITIVE)
    assert count == num_events
    whole = gradients(model, loss)
    each = [gradients(model, impression(model, items, actions, times, place)) for place in range(num_events)]
    for one, parts in zip(whole, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(parts).sum(0), rtol=1e-10, atol=1e-10)
    assert sum(float(one.abs().sum()) for one in whole) > 0


@pytest.mark.parametrize(
    ("kind", "negatives"), [("retrieval", "shared"), ("retrieval", "per_token"), ("ranking", "all")]
)
def test_a_step_in_four_parts_is_the_step_at_once(cycle_dataset, tmp_path, kind, negatives):
    recipe = tiny(kind).with_training(max_epochs=2, batch_size=32, negatives=negatives, clip_norm=0.5, patience=9)
    recipe = replace(recipe, model=replace(recipe.model, dropout=0.0))
    found, losses = [], []
    for parts in (1, 4):
        out = tmp_path / str(parts)
        train(cycle_dataset, recipe.with_training(accumulate=parts), out, progress=False)
        found.append(load_file(out / "model.safetensors"))
        losses.append([entry["loss"] for entry in json.loads((out / "curves.json").read_text())])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, weight in found[0].items():
        # Four steps of Adam, whose first ones divide small gradients by themselves.
        torch.testing.assert_close(found[1][name], weight, rtol=0, atol=1e-4, msg=name)


def draw(seed=1, step=3, num_negatives=100, **which):
    return uniform_negatives(first_item=5, num_rows=9, num_negatives=num_negatives, seed=seed, step=step, **which)


def test_negatives_are_item_rows_drawn_by_seed_step_and_target():
    assert draw().dtype == torch.int64
    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(), draw(step=4))
    assert not torch.equal(draw(), draw(seed=2))
    counts = torch.bincount(draw(num_targets=400).flatten(), minlength=9)
    assert counts[:5].sum() == 0
    assert (counts[5:] / 10_000 - 1).abs().max() < 0.05
    with pytest.raises(ValueError, match="no item rows"):
        uniform_negatives(first_item=5, num_rows=5, num_negatives=4, seed=1, step=0)


@pytest.mark.parametrize("num_negatives", [1, 8, 13, 128])
def test_a_processs_share_of_the_negatives_is_a_slice_of_the_steps(num_negatives):
    whole = draw(num_negatives=num_negatives, num_targets=50)
    assert whole.shape == (50, num_negatives)
    share = draw(num_negatives=num_negatives, num_targets=9, first_target=20)
    assert torch.equal(share, whole[20:29])
    assert torch.equal(draw(num_negatives=num_negatives), whole[0])

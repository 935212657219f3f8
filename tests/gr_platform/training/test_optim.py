"""The optimiser: schedule, decay, rowwise tables, clipping, the mean of the weights, and its state."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gr_platform.models.build import build_model
from gr_platform.models.config import Recipe
from gr_platform.models.recipes import tiny
from gr_platform.training.optim import Optimizer, decaying, item_tables, learning_rate
from gr_platform.training.seeds import counted


def model_of(kind="ranking", seed=0, **fields):
    torch.manual_seed(seed)
    return build_model(replace(tiny(kind).model, **fields), num_rows=30, num_actions=2, tasks=["like"])


def training_of(**fields):
    return tiny("ranking").with_training(**fields).training


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.2, 0.4, 0.4, 0.4]),
        ("linear", [0.2, 0.4 * 0.75, 0.4 * 0.5, 0.4 * 0.25]),
        ("cosine", [0.2, 0.4 * (0.5 + math.sqrt(0.125)), 0.4 * 0.5, 0.4 * (0.5 - math.sqrt(0.125))]),
    ],
)
def test_the_learning_rate_follows_its_schedule_by_hand(schedule, expected):
    training = training_of(learning_rate=0.4, schedule=schedule, warmup_steps=2)
    assert [learning_rate(training, step, step / 4) for step in range(4)] == pytest.approx(expected)
    # The optimiser hands it to every group in turn.
    model = model_of()
    optimizer = Optimizer(model, replace(training, table_optimizer="rowwise"))
    for step, rate in enumerate(expected):
        gradients(model, step)
        optimizer.step(1, step / 4)
        rates = [group["lr"] for part in optimizer.parts for group in part.param_groups]
        assert rates == pytest.approx([rate] * 3)


def test_embeddings_norms_and_biases_never_decay():
    model = model_of()
    names = {id(weight): name for name, weight in model.named_parameters()}
    decay = {names[id(weight)] for weight in decaying(model)}
    layers = [f"encoder.layers.{layer}.{name}" for layer in (0, 1) for name in ("uvqk", "output.weight")]
    assert decay == {*layers, "heads.1.weight", "heads.3.weight"}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = Optimizer(model, training_of(weight_decay=0.5, learning_rate=0.1))
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name] * (0.95 if name in decay else 1.0), msg=name)


def test_a_rowwise_table_moves_by_one_second_moment_a_row():
    model = model_of()
    [table] = item_tables(model)
    assert table is model.embedding.items.weight
    optimizer = Optimizer(model, training_of(table_optimizer="rowwise", learning_rate=0.1))
    gradients(model, 1)
    before, gradient = table.detach().clone(), table.grad.clone()
    optimizer.step()
    scale = gradient.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(table.detach(), before - 0.1 * gradient / scale)
    other = model.embedding.kinds
    assert optimizer.parts[0].state[other]["exp_avg_sq"].shape == other.shape
    assert optimizer.parts[1].state[table]["exp_avg_sq"].shape == table.shape[:1]


def test_a_frozen_table_stays_as_it_was_drawn_and_keeps_no_state():
    model = model_of()
    [table] = item_tables(model)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = Optimizer(model, training_of(table_optimizer="frozen", average=0.9))
    gradients(model, 1)
    optimizer.step()
    still = {name for name, weight in model.named_parameters() if torch.equal(weight, before[name])}
    assert still == {"embedding.items.weight"}
    assert not table.requires_grad
    assert not [name for name in optimizer.state() if name.startswith("embedding.items")]


def test_clipping_bounds_the_norm_of_all_gradients_together_after_the_mean():
    plain, clipped = model_of(), model_of()
    norm = 0.0
    for model, longest in ((plain, 0.0), (clipped, 0.25)):
        gradients(model, 2)
        norm = math.sqrt(sum(float(weight.grad.square().sum()) for weight in model.parameters())) / 10
        Optimizer(model, training_of(clip_norm=longest)).step(10)
    after = math.sqrt(sum(float(weight.grad.square().sum()) for weight in clipped.parameters()))
    assert after == pytest.approx(0.25, rel=1e-4)
    assert norm > 0.25
    assert math.sqrt(sum(float(w.grad.square().sum()) for w in plain.parameters())) == pytest.approx(norm, rel=1e-5)


def test_the_mean_of_the_weights_is_lent_to_the_model_and_given_back():
    model = model_of()
    optimizer = Optimizer(model, training_of(average=0.5, learning_rate=0.1))
    weight = model.heads[1].weight
    mean = weight.detach().clone()
    for step in range(1, 6):
        gradients(model, step)
        optimizer.step()
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weight.detach()
    after = weight.detach().clone()
    with optimizer.averaged():
        torch.testing.assert_close(model.heads[1].weight.detach(), mean)
        assert not torch.equal(model.heads[1].weight, after)
    assert torch.equal(model.heads[1].weight, after)


@pytest.mark.parametrize("table", ["adamw", "rowwise", "frozen"])
def test_an_optimiser_goes_on_from_its_state_bit_for_bit(table):
    training = training_of(average=0.9, table_optimizer=table, schedule="linear", weight_decay=0.1)
    whole, part = model_of(), model_of()
    one, two = Optimizer(whole, training), Optimizer(part, training)
    for step in range(2):
        for model, optimizer in ((whole, one), (part, two)):
            gradients(model, step)
            optimizer.step(3, step / 4)
    rest = model_of(seed=5)
    rest.load_state_dict(part.state_dict())
    three = Optimizer(rest, training)
    three.load({name: value.clone() for name, value in two.state().items()})
    assert three.num_steps == 2
    for model, optimizer in ((whole, one), (rest, three)):
        gradients(model, 7)
        optimizer.step(3, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))
    assert all(torch.equal(one.average[name], three.average[name]) for name in one.average)


def test_a_step_without_targets_counts_but_moves_nothing():
    model = model_of()
    before = [weight.detach().clone() for weight in model.parameters()]
    optimizer = Optimizer(model, training_of())
    gradients(model, 0)
    optimizer.step(0)
    assert optimizer.num_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_counted_stream_can_be_joined_at_any_block():
    whole = counted(3, "x", 1, first=0).random_raw(40)
    assert np.array_equal(counted(3, "x", 1, first=6).random_raw(8), whole[24:32])
    assert not np.array_equal(counted(3, "x", 2, first=0).random_raw(40), whole)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("schedule", "step", "must be one of 'constant', 'cosine', 'linear'"),
        ("table_optimizer", "sgd", "must be one of 'adamw', 'rowwise'"),
        ("precision", "fp8", "must be one of 'auto', 'fp32', 'bf16'"),
        ("negatives", "own", "must be one of 'shared', 'per_token', 'all'"),
        ("average", 1.0, r"must be in \[0, 1\)"),
        ("clip_norm", -1.0, "must be 0 or more"),
        ("warmup_steps", -1, "must be 0 or more"),
        ("weight_decay", -0.1, "must be 0 or more"),
        ("accumulate", 0, "must be positive"),
        ("accumulate", 3, "must divide batch_size = 32"),
    ],
)
def test_a_training_that_contradicts_itself_is_refused(field, value, rule):
    with pytest.raises(ValueError, match=rf"TrainingConfig\.{field} is .*{rule}"):
        tiny("retrieval").with_training(**{field: value})


def test_a_recipe_survives_json_and_an_older_one_gets_the_defaults():
    recipe = tiny("retrieval").with_training(schedule="cosine", refit=True, average=0.99, accumulate=4)
    assert Recipe.from_json(recipe.to_json()) == recipe
    older = tiny("retrieval").to_json()
    for name in (
        "schedule", "warmup_steps", "weight_decay", "table_optimizer", "clip_norm", "accumulate", "refit", "average",
        "precision", "compile", "negatives", "stochastic_length",
    ):  # fmt: skip
        del older["training"][name]
    assert Recipe.from_json(older) == tiny("retrieval")

"""Training on thinned sequences: what a kept token answers, and that dropping nothing changes nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from gr_platform.models.batch import EventBatch
from gr_platform.models.build import build_model
from gr_platform.models.config import Recipe, StochasticLength
from gr_platform.models.recipes import tiny
from gr_platform.models.tokens import ACTION, ITEM, START, ranking_tokens, retrieval_tokens
from gr_platform.sequences.reader import thinned
from gr_platform.training.batches import request_batch, training_batch, training_reader
from gr_platform.training.loop import train
from gr_platform.training.phases import training_users
from kernels import JaggedTimes, sampled_softmax

KINDS = ["retrieval", "ranking"]
POSITIVE, NEGATIVES, TASKS = 0b10, torch.arange(5, 15), [0b10, 0b01]


@pytest.fixture(scope="module")
def dataset(make_dataset):
    rng = np.random.default_rng(3)
    lengths = [4, 5, 40, 41, 43, 60, 12, 30, 55, 6, 9, 47]
    users = []
    for n in lengths:
        times = np.cumsum((10 ** rng.uniform(0, 9, n)).astype(np.int64))
        users.append([(int(rng.integers(30)), int(rng.integers(1, 4)), int(at)) for at in times])
    return make_dataset(users, 30)


def thinning(kind, **settings):
    fields = {"stochastic_length": StochasticLength(**settings)} if settings else {}
    return tiny(kind).with_training(batch_size=12, max_epochs=2, **fields)


def make_model(dataset, kind):
    torch.manual_seed(1)
    config = replace(tiny(kind).model, dropout=0.0)
    model = build_model(config, num_rows=dataset.vocabulary.num_rows, num_actions=2, tasks=["like", "view"]).double()
    for parameter in model.parameters():
        parameter.data.mul_(4.0)
    return model


def loss_of(model, batch):
    if model.config.kind == "retrieval":
        total, count = model.loss(batch, negatives=NEGATIVES, positive_mask=POSITIVE)
    else:
        total, count = model.loss(batch, task_masks=TASKS)
    return total / count, count


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def token_by_token(model, dataset, reader, read):
    """Return the loss of a thinned batch: every user's tokens of the whole span, those of kept events picked out."""
    config, losses = model.config, []
    build = retrieval_tokens if config.kind == "retrieval" else ranking_tokens
    starts = dict(zip(reader.rows.tolist(), reader.starts.tolist(), strict=True))
    stops = dict(zip(reader.rows.tolist(), reader.stops.tolist(), strict=True))
    for row, (_, _, kept_times) in zip(read.rows.tolist(), read.events.histories(), strict=True):
        items, actions, times = (part[starts[row] :] for part in dataset.history(row, stops[row]))
        places = [times.tolist().index(at) for at in kept_times.tolist()]
        whole = build(items, actions, times, int(times[-1]))
        per_event = 1 if config.kind == "retrieval" else 2
        chosen = [0] + [1 + per_event * place + i for place in places for i in range(per_event)]
        kinds, its, acts, ts, queries = (
            torch.tensor([getattr(whole, name)[token] for token in chosen])
            for name in ("kinds", "items", "actions", "times", "query_times")
        )
        x = model.embedding(kinds, its, acts, torch.arange(len(chosen)))
        rows = model.encoder(x, JaggedTimes.of(torch.tensor([0, len(chosen)]), ts, queries))
        for token, vector in zip(chosen, rows, strict=True):
            if config.kind == "ranking":
                if whole.kinds[token] == ITEM:
                    done = int(actions[(token - 1) // 2])
                    labels = torch.tensor([bool(done & mask) for mask in TASKS]).double()
                    logits = model.heads(vector)
                    losses.append(torch.nn.functional.binary_cross_entropy_with_logits(logits, labels))
            elif token < len(items) and actions[token] & POSITIVE:
                unit_vector = torch.nn.functional.normalize(vector, dim=0)[None]
                target = torch.tensor([items[token]])
                losses.append(
                    sampled_softmax(
                        unit_vector, model.item_vectors(), target, NEGATIVES, config.temperature, backend="reference"
                    )[0]
                )
    return torch.stack(losses).mean(), len(losses)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["recent", "recency", "uniform"])
def test_a_thinned_batch_is_what_a_reference_builds_token_by_token(dataset, kind, choice):
    reader = training_reader(dataset, *training_users(dataset), thinning(kind, alpha=1.3, choice=choice))
    read = next(reader.read(0))
    assert (read.events.lengths < (reader.stops - reader.starts)[np.searchsorted(reader.rows, read.rows)]).any()
    model = make_model(dataset, kind)
    loss, count = loss_of(model, training_batch(read))
    expected, expected_count = token_by_token(model, dataset, reader, read)
    assert count == expected_count
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for a, b in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_thinning_that_drops_nothing_gives_the_same_bits(dataset, kind):
    reader = training_reader(dataset, *training_users(dataset), thinning(kind))
    read = next(reader.read(0))
    model = make_model(dataset, kind).float()
    # The path of a thinned batch, with every place kept, and the alpha that keeps all.
    everything = thinned(read.rows, read.events, read.events.lengths, np.arange(len(read.events.items)))
    assert everything.targets is not everything.events
    off = next(training_reader(dataset, *training_users(dataset), thinning(kind, alpha=2.0)).read(0))
    plain = EventBatch.of(read.events.histories(), read.events.times[read.events.offsets[1:] - 1])
    expected, count = loss_of(model, plain)
    for other in (everything, off):
        loss, other_count = loss_of(model, training_batch(other))
        assert other_count == count
        assert torch.equal(loss, expected)
        for a, b in zip(gradients(model, loss), gradients(model, expected), strict=True):
            assert torch.equal(a, b)
        expected, _ = loss_of(model, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_token_keeps_its_time_and_positions_count_kept_tokens(dataset, kind):
    reader = training_reader(dataset, *training_users(dataset), thinning(kind, alpha=1.3, choice="recent"))
    read = next(reader.read(0))
    tokens = training_batch(read).tokens(kind)
    bounds = tokens.jagged.seq_offsets.tolist()
    for index, row in enumerate(read.rows.tolist()):
        begin, end = bounds[index], bounds[index + 1]
        start = reader.starts[np.searchsorted(reader.rows, row)]
        assert tokens.kinds[begin] == START
        assert tokens.jagged.times[begin] == dataset.at(np.array([row]), np.array([start])).times[0]
        assert tokens.positions[begin:end].tolist() == list(range(end - begin))
        if kind == "ranking":
            assert tokens.kinds[end - 1] == ACTION


@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_of_a_thinned_run_draws_anew(cycle_dataset, tmp_path, kind):
    recipe = thinning(kind, alpha=1.1).with_training(max_epochs=3, patience=9)
    recipe = replace(recipe, model=replace(recipe.model, max_events=10))
    train(cycle_dataset, recipe, tmp_path / "thin", progress=False)
    train(cycle_dataset, recipe.with_training(stochastic_length=StochasticLength()), tmp_path / "off", progress=False)
    thin, off = (
        [epoch["tokens"] for epoch in json.loads((tmp_path / name / "curves.json").read_text())]
        for name in ("thin", "off")
    )
    assert len(set(off)) == 1
    assert len(set(thin)) == 3
    assert max(thin) < off[0]


def test_evaluation_never_thins(dataset):
    batch = request_batch(dataset, np.array([5]), np.array([40]), tiny("retrieval").model)
    assert len(batch.items) == 40
    assert torch.equal(batch.target_times, batch.times)


def test_stochastic_length_is_off_by_default_travels_with_a_recipe_and_is_checked():
    assert tiny("retrieval").training.stochastic_length.alpha == 2
    recipe = thinning("ranking", alpha=1.6, choice="uniform")
    assert Recipe.from_json(recipe.to_json()) == recipe
    written = recipe.to_json()
    del written["training"]["stochastic_length"]
    assert Recipe.from_json(written) == recipe.with_training(stochastic_length=StochasticLength())
    with pytest.raises(ValueError, match=r"StochasticLength\.alpha is 1"):
        StochasticLength(alpha=1.0)
    with pytest.raises(ValueError, match=r"StochasticLength\.choice is 'oldest'"):
        StochasticLength(choice="oldest")

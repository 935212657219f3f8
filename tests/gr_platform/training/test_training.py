import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gr_platform.errors import UserError
from gr_platform.evaluation.protocols import evaluate_ranking, evaluate_retrieval, rank_by_popularity, retrieval_facts
from gr_platform.models.build import build_model
from gr_platform.models.config import Recipe
from gr_platform.models.recipes import tiny
from gr_platform.models.retrieval import RetrievalModel
from gr_platform.sequences.reader import Reader
from gr_platform.training import epoch as epoch_module
from gr_platform.training import loop
from gr_platform.training.batches import training_batch, training_reader
from gr_platform.training.checkpoint import CHECKPOINT, Progress, load_checkpoint, save_checkpoint
from gr_platform.training.load import load_model
from gr_platform.training.loop import finished, train, training_users
from gr_platform.training.negatives import uniform_negatives
from gr_platform.training.objectives import RetrievalObjective

KINDS = ["retrieval", "ranking"]


class Killed(BaseException):
    """Stands for a signal: nothing may catch it."""


def kill_at_epoch(monkeypatch, number):
    real = Reader.read

    def until(self, epoch):
        for index, batch in enumerate(real(self, epoch)):
            if epoch == number and index == 1:
                raise Killed
            yield batch

    monkeypatch.setattr(Reader, "read", until)


def whole_batch(dataset, rows, ends, config):
    """Return users' exposures before `ends` as one training batch."""
    reader = training_reader(dataset, np.asarray(rows), np.asarray(ends), replace(tiny(config.kind), model=config))
    return training_batch(reader.form(np.arange(len(rows)), epoch=0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_learns_a_small_set_by_heart(cycle_dataset, tmp_path, kind):
    recipe = tiny(kind).with_training(max_epochs=25, patience=25, batch_size=16, learning_rate=5e-3)
    facts = train(cycle_dataset, recipe, tmp_path / "run", progress=False)
    model = load_model(tmp_path / "run")
    if kind == "retrieval":
        found = evaluate_retrieval(model, cycle_dataset, "test")
        popular = retrieval_facts(rank_by_popularity(cycle_dataset, "test"))
        assert found["hr_at_1"] > 0.9
        assert popular["hr_at_1"] < 0.2
    else:
        found = evaluate_ranking(model, cycle_dataset, "test")["like"]
        assert found["auc"] > 0.99
        assert found["ne"] < 0.3
    assert facts["num_users"] == 60
    assert facts["tokens_per_s"] > 0
    curves = json.loads((tmp_path / "run" / "curves.json").read_text())
    assert [entry["epoch"] for entry in curves] == list(range(facts["epochs"]))
    assert curves[-1]["loss"] < curves[0]["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(cycle_dataset, tmp_path, monkeypatch, kind):
    recipe = tiny(kind).with_training(max_epochs=3, patience=9, batch_size=16)
    train(cycle_dataset, recipe, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patched:
        kill_at_epoch(patched, 1)
        with pytest.raises(Killed):
            train(cycle_dataset, recipe, tmp_path / "resumed", progress=False)
    assert (tmp_path / ".checkpoint-resumed" / CHECKPOINT).is_file()
    torch.manual_seed(99)  # what ran before in the process must not matter
    train(cycle_dataset, recipe, tmp_path / "resumed", progress=False)
    for name in ("model.safetensors", "curves.json", "recipe.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), name
    assert not list(tmp_path.glob(".checkpoint*"))


def test_the_best_epochs_weights_are_kept_and_patience_stops(cycle_dataset, tmp_path, monkeypatch):
    goals = iter([0.1, 0.5, 0.2, 0.3, 0.9])
    states = []

    def validate(self, model):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        goal = next(goals)
        return {"ndcg_at_10": goal}, goal

    monkeypatch.setattr("gr_platform.training.objectives.RetrievalObjective.validate", validate)
    recipe = tiny("retrieval").with_training(max_epochs=5, patience=2)
    facts = train(cycle_dataset, recipe, tmp_path / "run", progress=False)
    assert facts["epochs"] == 4
    assert facts["best_epoch"] == 1
    assert facts["best"]["ndcg_at_10"] == 0.5
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert saved.keys() == states[1].keys()
    assert all(torch.equal(saved[name], states[1][name]) for name in saved)


@pytest.mark.parametrize(
    ("goals", "over"), [([], False), ([3], False), ([3, 2], False), ([3, 2, 1], True), ([1, 2, 3, 4], True)]
)
def test_training_is_over_at_the_last_epoch_or_after_patience(goals, over):
    training = tiny("retrieval").with_training(max_epochs=4, patience=2).training
    best = goals.index(max(goals)) if goals else 0
    assert finished(Progress(curves=[{} for _ in goals], goals=goals, best_epoch=best), training) is over


@pytest.mark.parametrize("where", ["loss", "validation"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_whole_epoch(cycle_dataset, tmp_path, monkeypatch, where):
    real = epoch_module.training_batch
    calls = iter(range(100))

    def poisoned(read):
        batch = real(read)
        if next(calls) >= 2:  # two batches an epoch: from epoch 1 on
            with torch.no_grad():
                for parameter in models[0].parameters():
                    parameter.fill_(float("nan"))
        return batch

    models = []
    build = loop.build_model
    monkeypatch.setattr(loop, "build_model", lambda *a, **k: (models.append(build(*a, **k)), models[-1])[1])
    monkeypatch.setattr(epoch_module, "training_batch", poisoned)
    if where == "validation":
        objective = "gr_platform.training.objectives.RetrievalObjective.loss"
        monkeypatch.setattr(objective, lambda self, model, batch, step: (torch.zeros(()), 0))
    with pytest.raises(epoch_module.NonFiniteLoss, match="epoch 1") as caught:
        train(cycle_dataset, tiny("retrieval"), tmp_path / "run", progress=False)
    assert str(tmp_path) not in str(caught.value)
    folder = tmp_path / ".checkpoint-run"
    if where == "loss":
        bad = json.loads((folder / epoch_module.BAD_BATCH).read_text())
        assert (bad["epoch"], bad["step"], bad["loss"]) == (1, 0, "nan")
        assert len(bad["user_ids"]) == 32
        assert set(bad["user_ids"]) <= {str(user) for user in cycle_dataset.user_ids}
    kept = load_file(folder / CHECKPOINT)
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    assert not (tmp_path / "run").exists()


def test_too_few_users_and_tasks_that_cannot_be_learned_are_refused(make_dataset, tmp_path):
    short = make_dataset([[(0, 1, 0), (1, 1, 1)]] * 50 + [[(0, 1, i) for i in range(5)]] * 9, 5)
    with pytest.raises(UserError, match="only 9 users"):
        train(short, tiny("retrieval"), tmp_path / "run", progress=False)
    views = make_dataset([[(i, 1, i) for i in range(5)]] * 20, 5)
    with pytest.raises(UserError, match=r"like in 0%.*dataset.toml"):
        train(views, tiny("ranking"), tmp_path / "run", progress=False)
    undeclared = make_dataset([[(i, 1, i) for i in range(5)]] * 20, 5, tasks={})
    with pytest.raises(UserError, match="none declared"):
        train(undeclared, tiny("ranking"), tmp_path / "run", progress=False)
    one_action = make_dataset([[(i, 1, i) for i in range(5)]] * 20, 5, actions=("view",), positives=("view",), tasks={})
    with pytest.raises(UserError, match=r"the same action \(view\)"):
        train(one_action, tiny("ranking"), tmp_path / "run", progress=False)
    nothing_wanted = make_dataset([[(i, 1, i) for i in range(5)]] * 20, 5, positives=("like",))
    with pytest.raises(UserError, match="positive actions"):
        train(nothing_wanted, tiny("retrieval"), tmp_path / "run", progress=False)


def test_no_batch_holds_a_held_out_event_and_every_user_comes_once(cycle_dataset):
    rows, ends = training_users(cycle_dataset)
    reader = training_reader(cycle_dataset, rows, ends, tiny("retrieval").with_training(batch_size=16))
    for number in range(2):
        seen = []
        for read in reader.read(number):
            batch = training_batch(read)
            for index, row in enumerate(read.rows):
                times = batch.times[batch.offsets[index] : batch.offsets[index + 1]]
                held_out = cycle_dataset.history(row, cycle_dataset.lengths[row])[2][-2]
                assert times.max() < held_out
            seen += read.rows.tolist()
        assert sorted(seen) == rows.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_position_that_answers_a_full_window_is_trained(make_dataset, kind):
    config = tiny(kind).model
    users = [[(step % 20, 1 + step % 2, 1000 * step) for step in range(config.max_events + 1)]]
    dataset = make_dataset(users, 20)
    batch = whole_batch(dataset, np.array([0]), np.array([config.max_events + 1]), config)
    model = build_model(config, num_rows=dataset.vocabulary.num_rows, num_actions=2, tasks=["like"])
    if kind == "retrieval":
        loss, _ = model.loss(batch, negatives=torch.arange(5, 15), positive_mask=0b11)
    else:
        loss, _ = model.loss(batch, task_masks=[0b10])
    loss.backward()
    answering = config.max_events if kind == "retrieval" else 2 * config.max_events + 1
    assert model.embedding.positions.grad[answering].abs().sum() > 0
    assert model.encoder.layers[0].pos_weight.grad[answering] != 0


def test_negatives_are_item_rows_drawn_by_seed_and_step():
    def draw(seed, step):
        return uniform_negatives(first_item=5, num_rows=9, num_negatives=400, seed=seed, step=step)

    assert draw(1, 3).dtype == torch.int64
    assert torch.equal(draw(1, 3), draw(1, 3))
    assert not torch.equal(draw(1, 3), draw(1, 4))
    counts = torch.bincount(draw(1, 3), minlength=9)
    assert counts[:5].sum() == 0
    assert (counts[5:] > 60).all()
    with pytest.raises(ValueError, match="no item rows"):
        uniform_negatives(first_item=5, num_rows=5, num_negatives=4, seed=1, step=0)
    for_each = uniform_negatives(first_item=5, num_rows=9, num_negatives=100, seed=1, step=3, num_targets=4)
    assert for_each.shape == (4, 100)
    # The same stream as the shared draw: a function of (seed, step), whatever the shape.
    assert torch.equal(for_each.flatten(), draw(1, 3))


@pytest.mark.parametrize("for_each", [False, True])
@pytest.mark.parametrize("num_rows", [20, 2000])
def test_the_retrieval_loss_is_cross_entropy_over_the_target_and_its_negatives(make_dataset, num_rows, for_each):
    config = tiny("retrieval").model
    users = [[((7 * step + user) % 15, 1 + step % 2, 1000 * step) for step in range(9)] for user in range(4)]
    dataset = make_dataset(users, 15)
    batch = whole_batch(dataset, np.arange(4), np.full(4, 9), config)
    torch.manual_seed(1)
    model = build_model(config, num_rows=num_rows, num_actions=2, tasks=[]).eval()
    is_target = (batch.actions & 0b10) != 0
    num_targets, targets = int(is_target.sum()), batch.items[is_target]
    shape = (num_targets, 30) if for_each else (30,)
    negatives = torch.randint(5, 20, shape, generator=torch.Generator().manual_seed(2))
    loss, count = model.loss(batch, negatives=negatives, positive_mask=0b10)
    got = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    seq_offsets = batch.offsets + torch.arange(len(batch.offsets))
    rows = model._rows(batch, lambda offsets: torch.arange(int(offsets[-1])))
    predicts = torch.ones(len(rows), dtype=torch.bool)
    predicts[seq_offsets[1:] - 1] = False
    scores = torch.nn.functional.normalize(rows[predicts][is_target], dim=1) @ model.item_vectors().T
    drawn = negatives.expand(num_targets, 30)
    negative = scores.gather(1, drawn).masked_fill(drawn == targets[:, None], float("-inf"))
    logits = torch.cat([scores.gather(1, targets[:, None]), negative], dim=1) / config.temperature
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(num_targets, dtype=torch.int64), reduction="sum")
    assert count == num_targets
    assert (drawn == targets[:, None]).any()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(got, torch.autograd.grad(expected, list(model.parameters()), allow_unused=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_batch_without_targets_has_no_loss(make_dataset):
    config = tiny("retrieval").model
    dataset = make_dataset([[(step, 1, step) for step in range(6)]], 10)
    batch = whole_batch(dataset, np.array([0]), np.array([6]), config)
    model = build_model(config, num_rows=dataset.vocabulary.num_rows, num_actions=2, tasks=[])
    loss, count = model.loss(batch, negatives=torch.arange(5, 9), positive_mask=0b10)
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)


def test_a_model_trains_with_negatives_of_each_target(cycle_dataset, tmp_path, monkeypatch):
    shapes = []
    real = RetrievalModel.loss
    monkeypatch.setattr(
        RetrievalModel, "loss", lambda self, *a, **k: (shapes.append(k["negatives"].shape), real(self, *a, **k))[1]
    )
    recipe = tiny("retrieval").with_training(max_epochs=4, negatives="per_token", learning_rate=5e-3)
    train(cycle_dataset, recipe, tmp_path / "run", progress=False)
    curves = json.loads((tmp_path / "run" / "curves.json").read_text())
    assert curves[-1]["loss"] < curves[0]["loss"]
    assert sum(shape[0] for shape in shapes) == sum(entry["num_targets"] for entry in curves)
    assert {shape[1] for shape in shapes} == {recipe.training.num_negatives}


def test_a_recipe_without_the_negatives_field_loads_with_shared_ones():
    written = tiny("retrieval").to_json()
    del written["training"]["negatives"]
    assert Recipe.from_json(written) == tiny("retrieval")
    assert tiny("retrieval").training.negatives == "shared"
    with pytest.raises(ValueError, match=r"TrainingConfig\.negatives is 'own'"):
        tiny("retrieval").with_training(negatives="own")


def test_a_checkpoint_gives_back_weights_optimiser_and_progress_exactly(tmp_path):
    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    model, optimizer = fresh()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    done = Progress(curves=[{"epoch": 0, "loss": 0.1 + 0.2}], goals=[0.3], seconds=[1.5], best={"x": torch.ones(2)})
    done.cursor = {"epoch": 1, "batch": 0, "plan": "abc"}
    save_checkpoint(tmp_path, model, optimizer, done)
    other, other_optimizer = fresh()
    restored = load_checkpoint(tmp_path, other, other_optimizer)
    assert (restored.curves, restored.goals, restored.seconds) == (done.curves, done.goals, done.seconds)
    assert restored.cursor == done.cursor
    assert torch.equal(restored.best["x"], done.best["x"])
    for a, b in ((model, optimizer), (other, other_optimizer)):
        b.zero_grad()
        a(torch.full((1, 3), 2.0)).sum().backward()
        b.step()
    assert torch.equal(model.weight, other.weight)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_damaged_checkpoint_is_a_clear_error_and_a_missing_one_a_fresh_start(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    assert load_checkpoint(tmp_path, model, optimizer) is None
    (tmp_path / CHECKPOINT).write_bytes(b"half a file")
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(tmp_path, model, optimizer)


def test_a_damaged_run_folder_is_a_clear_error(cycle_dataset, tmp_path):
    train(cycle_dataset, tiny("retrieval").with_training(max_epochs=1), tmp_path / "run", progress=False)
    assert not load_model(tmp_path / "run").training
    (tmp_path / "run" / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match="train the model again"):
        load_model(tmp_path / "run")
    with pytest.raises(UserError, match=r"no recipe\.json"):
        load_model(tmp_path)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(UserError, match="unknown recipe 'huge'"):
        loop.named_recipe("huge", "retrieval")
    with pytest.raises(UserError, match="ranking model was asked for"):
        loop.named_recipe(tiny("retrieval"), "ranking")


def test_every_step_of_a_run_has_a_number_of_its_own_and_so_its_own_negatives(cycle_dataset, tmp_path, monkeypatch):
    steps = []
    real = RetrievalObjective.loss
    monkeypatch.setattr(RetrievalObjective, "loss", lambda self, *a: (steps.append(a[-1]), real(self, *a))[1])
    recipe = tiny("retrieval").with_training(max_epochs=3, patience=3, batch_size=16)
    train(cycle_dataset, recipe, tmp_path / "run", progress=False)
    assert steps == list(range(3 * 4))

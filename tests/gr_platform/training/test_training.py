import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gr_platform.errors import UserError
from gr_platform.evaluation.protocols import evaluate_ranking, evaluate_retrieval, rank_by_popularity, retrieval_facts
from gr_platform.models.build import build_model
from gr_platform.models.hstu import HSTU
from gr_platform.models.recipes import tiny
from gr_platform.models.retrieval import RetrievalModel
from gr_platform.training import loop
from gr_platform.training.batches import training_batch, training_reader
from gr_platform.training.checkpoint import CHECKPOINT, Progress
from gr_platform.training.epoch import BAD_BATCH, Epoch, NonFiniteLoss
from gr_platform.training.load import load_model
from gr_platform.training.loop import train
from gr_platform.training.objectives import RetrievalObjective
from gr_platform.training.phases import finished, training_users

KINDS = ["retrieval", "ranking"]


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


@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_an_item_without_an_embedding_row_is_named_and_nothing_is_left_half_trained(make_dataset, tmp_path, kind):
    users = [[(item % 5, 1 + item % 2, 1000 * item) for item in range(user, user + 6)] for user in range(20)]
    users[7][2] = (5, 1, users[7][2][2])  # of five items, numbered from 0
    with pytest.raises(UserError, match=r"name item 10, but the vocabulary ends at 9, so the item has no embedding"):
        train(make_dataset(users, num_items=5), tiny(kind), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


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
    rows = model._rows(batch, lambda tokens: torch.arange(len(tokens.kinds)))
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
    monkeypatch.setattr(RetrievalObjective, "loss", lambda self, *a: (steps.append(a[2]), real(self, *a))[1])
    recipe = tiny("retrieval").with_training(max_epochs=3, patience=3, batch_size=16)
    train(cycle_dataset, recipe, tmp_path / "run", progress=False)
    assert steps == list(range(3 * 4))


@pytest.mark.parametrize(
    ("goals", "over"), [([], False), ([3], False), ([3, 2], False), ([3, 2, 1], True), ([1, 2, 3, 4], True)]
)
def test_training_is_over_at_the_last_epoch_or_after_patience(goals, over):
    best = goals.index(max(goals)) if goals else 0
    done = Progress(curves=[{"phase": "validation"} for _ in goals], goals=goals, best_epoch=best)
    assert finished(done, max_epochs=4, patience=2) is over


def poison(monkeypatch, *, from_step, mend_loss=False):
    """Let all weights be NaN from a step on; mend_loss: and the loss 0, so that something else must see it."""
    real = Epoch._step

    def step(self, model, optimizer, *rest):
        if optimizer.num_steps >= from_step:
            with torch.no_grad():
                for weight in model.parameters():
                    weight.fill_(float("nan"))
            if mend_loss:
                monkeypatch.setattr(RetrievalObjective, "loss", lambda *_: (torch.zeros((), requires_grad=True), 0))
        return real(self, model, optimizer, *rest)

    monkeypatch.setattr(Epoch, "_step", step)


@pytest.mark.parametrize("where", ["loss", "validation"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(cycle_dataset, tmp_path, monkeypatch, where):
    monkeypatch.setenv("GR_HOME", str(tmp_path))
    poison(monkeypatch, from_step=2, mend_loss=where == "validation")  # two steps an epoch
    with pytest.raises(NonFiniteLoss, match="epoch 1") as caught:
        train(cycle_dataset, tiny("retrieval"), tmp_path / "run", progress=False)
    assert str(tmp_path) not in str(caught.value)
    # A hidden folder, so it is named from the state folder on.
    assert " $GR_HOME/.checkpoint-run" in str(caught.value)
    folder = tmp_path / ".checkpoint-run"
    if where == "loss":
        bad = json.loads((folder / BAD_BATCH).read_text())
        assert (bad["epoch"], bad["step"], bad["loss"]) == (1, 2, "nan")
        assert len(bad["user_ids"]) == 32
        assert set(bad["user_ids"]) <= {str(user) for user in cycle_dataset.user_ids}
    kept = load_file(folder / CHECKPOINT)
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_never_replace_a_checkpoint(cycle_dataset, tmp_path, monkeypatch):
    # A refit has no validation that would see it.
    poison(monkeypatch, from_step=3, mend_loss=True)
    goals = iter([0.1, 0.2])
    monkeypatch.setattr(RetrievalObjective, "validate", lambda self, model: ({}, next(goals)))
    with pytest.raises(NonFiniteLoss, match=r"became NaN or infinite in validation before step 4"):
        train(cycle_dataset, tiny("retrieval"), tmp_path / "run", progress=False)
    kept = load_file(tmp_path / ".checkpoint-run" / CHECKPOINT)
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_precision_is_fp32_on_the_cpu_unless_the_recipe_says_bf16(cycle_dataset, tmp_path, monkeypatch, precision):
    cast = set()
    real = HSTU.forward
    seen = lambda: cast.add(torch.is_autocast_enabled("cpu"))  # noqa: E731
    monkeypatch.setattr(HSTU, "forward", lambda self, *a: (seen(), real(self, *a))[1])
    monkeypatch.setattr(RetrievalObjective, "validate", lambda self, model: ({}, 0.0))
    recipe = tiny("retrieval").with_training(max_epochs=2, precision=precision)
    train(cycle_dataset, recipe, tmp_path / "run", progress=False)
    assert cast == {precision == "bf16"}
    first, second = json.loads((tmp_path / "run" / "curves.json").read_text())
    assert second["loss"] < first["loss"]
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}

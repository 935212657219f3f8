"""Training and evaluation on a device that is not the CPU: no tensor stays behind, and the figures are the CPU's.

Run by test_device.py in a process of its own.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gr_platform import settings
from gr_platform.evaluation.protocols import judge_by_model, rank_by_model
from gr_platform.experiments.experiment import Cell
from gr_platform.experiments.passes import Generative, Pass
from gr_platform.experiments.run import Work
from gr_platform.models.recipes import tiny
from gr_platform.training import checkpoint, ranks
from gr_platform.training.epoch import Epoch
from gr_platform.training.load import WEIGHTS, load_model
from gr_platform.training.loop import CURVES, train
from gr_platform.training.ranks import Ranks
from tests.gr_platform.models.test_features import NAMES, make_batch, make_model
from tests.gr_platform.training.pretended_gpu import NAME, There, pretended_gpu

ENCODERS = {
    "retrieval": ["hstu", "hstu_softmax", "transformer", "sasrec", "gru4rec", "bert4rec"],
    "ranking": ["hstu", "hstu_softmax", "transformer", "sasrec", "gru4rec", "dlrm"],
}
CASES = [(kind, encoder) for kind, encoders in ENCODERS.items() for encoder in encoders]


@pytest.fixture(autouse=True)
def _no_recurrence(monkeypatch):
    """What torch calls for a GRU differs on a GPU; ours is what leads to it and away."""
    monkeypatch.setattr(torch.nn.GRU, "forward", lambda self, steps: (steps, None))


def recipe_of(kind, encoder="hstu", **training):
    recipe = tiny(kind).with_training(**{"max_epochs": 1, "precision": "fp32"} | training)
    # Torch's own dropout draws other masks on a GPU; HSTU's does not.
    dropout = recipe.model.dropout if encoder == "hstu" else 0.0
    return replace(recipe, model=replace(recipe.model, encoder=encoder, dropout=dropout))


def trained(dataset, recipe, folder, device="cpu"):
    """Return the figures of a training on a device."""
    train(dataset, recipe, folder, ranks=Ranks(device=device), progress=False)
    return [value for entry in json.loads((folder / CURVES).read_text()) for value in entry.values()]


def same_weights(tmp_path):
    return (tmp_path / "here" / WEIGHTS).read_bytes() == (tmp_path / "there" / WEIGHTS).read_bytes()


def judged(folder, dataset, device="cpu"):
    """Return what a trained model says of the test targets on a device."""
    model = load_model(folder).to(device)
    assert {weight.device.type for weight in model.state_dict().values()} == {device}
    if model.config.kind == "ranking":
        return judge_by_model(model, dataset, "test").logits
    return rank_by_model(model, dataset, "test").scores


@pytest.mark.parametrize(("kind", "encoder"), CASES)
def test_a_model_trains_and_is_judged_there(cycle_dataset, tmp_path, kind, encoder):
    recipe = recipe_of(kind, encoder)
    figures = trained(cycle_dataset, recipe, tmp_path / "here")
    scores = judged(tmp_path / "here", cycle_dataset)
    with pretended_gpu():
        # Torch takes other steps to some of its operations, which round elsewhere.
        found = trained(cycle_dataset, recipe, tmp_path / "there", NAME)
        assert found[2:] == pytest.approx(figures[2:], rel=1e-5)
        np.testing.assert_allclose(judged(tmp_path / "here", cycle_dataset, NAME), scores, rtol=1e-4, atol=1e-5)


TRAININGS = [
    {"negatives": "per_token", "accumulate": 2, "clip_norm": 0.5},
    {"negatives": "all", "table_optimizer": "rowwise", "weight_decay": 0.1},
    {"refit": True},
]


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("kind", ENCODERS)
def test_every_way_of_training_works_there(cycle_dataset, tmp_path, kind, training):
    recipe = recipe_of(kind, **training)
    figures = trained(cycle_dataset, recipe, tmp_path / "here")
    with pretended_gpu():
        found = trained(cycle_dataset, recipe, tmp_path / "there", NAME)
    assert found[2:6] == pytest.approx(figures[2:6], rel=1e-5)
    assert kind == "ranking" or same_weights(tmp_path)


@pytest.mark.parametrize(("kind", "encoder"), [("retrieval", "hstu"), ("ranking", "hstu"), ("ranking", "dlrm")])
def test_features_reach_the_device(kind, encoder):
    names = NAMES | ({"user_features": ()} if encoder == "dlrm" else {})
    model, batch = make_model(kind, names=names, encoder=encoder), make_batch()
    asked = (torch.tensor([[6, 7], [8, 9], [10, 11]]),) if kind == "ranking" else ()
    answer = model.score if kind == "ranking" else model.user_vectors
    expected = answer(batch, *asked).detach()
    with pretended_gpu():
        model.to(NAME)
        found = answer(batch, *asked).detach()
        assert isinstance(found, There)
        torch.testing.assert_close(found.cpu(), expected)


def test_a_pass_over_examples_works_there(cycle_dataset, tmp_path, monkeypatch):
    cell = Cell(name="pass", label="pass", dataset="cycle", protocol="examples", recipe=recipe_of("retrieval"))

    def losses(place):
        work = Work(cell=cell, dataset=cycle_dataset, folder=tmp_path, checkpoint=tmp_path / place, progress=False)
        model, done = Pass(work, Generative(cycle_dataset, cell.recipe), 2).run(4, lambda model: {})
        return {weight.device.type for weight in model.parameters()}, [entry["loss"] for entry in done.curves]

    here, expected = losses("here")
    with pretended_gpu():
        monkeypatch.setattr(settings, "device", lambda: NAME)
        there, found = losses("there")
    assert (here, there) == ({"cpu"}, {NAME})
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("table_optimizer", ["adamw", "rowwise"])
def test_a_checkpoint_goes_on_there(cycle_dataset, tmp_path, monkeypatch, table_optimizer):
    recipe = recipe_of("retrieval", table_optimizer=table_optimizer, max_epochs=2)
    figures = trained(cycle_dataset, recipe, tmp_path / "here")
    real = Epoch._step

    def killed(self, model, optimizer, *rest):
        if optimizer.num_steps == 3:
            raise KeyboardInterrupt
        return real(self, model, optimizer, *rest)

    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    with pretended_gpu():
        monkeypatch.setattr(Epoch, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(cycle_dataset, recipe, tmp_path / "there", NAME)
        monkeypatch.setattr(Epoch, "_step", real)
        saved = load_file(tmp_path / ".checkpoint-there" / checkpoint.CHECKPOINT)
        assert any(name.endswith(".exp_avg") for name in saved)
        assert trained(cycle_dataset, recipe, tmp_path / "there", NAME) == figures
    assert same_weights(tmp_path)


def test_what_processes_tell_each_other_lies_there(monkeypatch):
    told = []
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda flat: told.append(flat) or flat.mul_(2))
    monkeypatch.setattr(ranks.dist, "broadcast", lambda tensor, _: told.append(tensor))
    monkeypatch.setattr(
        ranks.dist, "all_gather", lambda found, own: told.append(own) or [each.copy_(own) for each in found]
    )
    first = Ranks(num_ranks=2, device=NAME)
    with pretended_gpu():
        weights = [torch.nn.Parameter(torch.ones(3).to(NAME)) for _ in range(2)]
        (weights[0] * 2).sum().backward()
        assert first.add_up(weights, [1.0, 3.0]) == [2.0, 6.0]
        assert [weight.grad.tolist() for weight in weights] == [[4.0] * 3, [0.0] * 3]
        assert first.gather([5, 6]).tolist() == [[5, 5], [6, 6]]
        assert first.hear({"goal": 0.5}) == {"goal": 0.5}
    assert len(told) == 4
    assert all(isinstance(each, There) for each in told)


def test_the_callers_random_numbers_go_on_as_before(cycle_dataset, tmp_path):
    with pretended_gpu() as module:
        torch.manual_seed(7)
        state = torch.get_rng_state()
        trained(cycle_dataset, recipe_of("retrieval"), tmp_path / "there", NAME)
        assert module.generator == 7
        assert torch.equal(torch.get_rng_state(), state)


def test_the_device_refuses_what_a_gpu_refuses():
    model, ids = make_model("retrieval"), torch.tensor([6, 7])
    with pretended_gpu():
        there = model.to(NAME).item_vectors()
        assert torch.equal(there[ids.to(NAME)].cpu(), there.cpu()[ids])
        with pytest.raises(RuntimeError, match=r"\(16,\)\] on the CPU"):
            there + torch.ones(16)
        with pytest.raises(RuntimeError, match=r"\(2,\)\] on the CPU"):
            there[ids]
        with pytest.raises(RuntimeError, match="numpy"):
            there.detach().numpy()

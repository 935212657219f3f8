"""What is trained on: the validation phase, the refit, splits by time, and a start from older weights."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gr_platform.errors import UserError
from gr_platform.models.build import build_model
from gr_platform.models.recipes import tiny
from gr_platform.sequences.reader import Reader
from gr_platform.sequences.splits import by_time, check_no_leak, leave_one_out
from gr_platform.training import phases
from gr_platform.training.load import load_model
from gr_platform.training.loop import train, trained_ends
from gr_platform.training.objectives import RetrievalObjective
from gr_platform.training.optim import Optimizer
from gr_platform.training.phases import training_users
from gr_platform.training.seeds import torch_seed
from gr_platform.training.warm_start import copy_weights


def goals(monkeypatch, values):
    """Let validation find these goals, one an epoch."""
    found = iter(values)
    monkeypatch.setattr(RetrievalObjective, "validate", lambda self, model: ({"ndcg_at_10": 0.5}, next(found)))


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_refit_trains_the_chosen_number_of_epochs_on_everything_but_the_test_exposure(
    cycle_dataset, tmp_path, monkeypatch
):
    recipe = tiny("retrieval").with_training(max_epochs=5, patience=2, batch_size=16, refit=True, schedule="cosine")
    reads = []
    real = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, *a: (reads.append((self.stops.copy(), a[0])), real(self, *a))[1])
    goals(monkeypatch, [0.1, 0.5, 0.2, 0.3])
    facts = train(cycle_dataset, recipe, tmp_path / "run", progress=False)
    assert (facts["best_epoch"], facts["epochs"], facts["refit_epochs"]) == (1, 4, 2)
    assert facts["chosen_by"] == "ndcg_at_10 on validation"
    lengths = cycle_dataset.lengths
    assert [epoch for _, epoch in reads] == [0, 1, 2, 3, 0, 1]
    assert all(np.array_equal(stops, lengths - 2) for stops, _ in reads[:4])
    assert all(np.array_equal(stops, lengths - 1) for stops, _ in reads[4:])
    curves = json.loads((tmp_path / "run" / "curves.json").read_text())
    expected = [("validation", epoch) for epoch in range(4)] + [("refit", 0), ("refit", 1)]
    assert [(entry["phase"], entry["epoch"]) for entry in curves] == expected
    assert "ndcg_at_10" in curves[0]
    assert "ndcg_at_10" not in curves[-1]
    ends = trained_ends(tmp_path / "run", cycle_dataset.num_users)
    assert np.array_equal(ends, lengths - 1)
    assert not check_no_leak(cycle_dataset, ends=ends, holdout=leave_one_out(cycle_dataset, "test", refit=True))
    assert check_no_leak(cycle_dataset, ends=ends)  # on validation, it must not be judged any more


def test_a_refit_is_the_training_that_chose_nothing_on_more_exposures(cycle_dataset, tmp_path, monkeypatch):
    recipe = tiny("retrieval").with_training(max_epochs=3, patience=9, batch_size=16, average=0.5)
    goals(monkeypatch, [0.1, 0.5, 0.2])
    train(cycle_dataset, recipe.with_training(refit=True), tmp_path / "run", progress=False)
    # The first phase on the refit's exposures, with the same limit on epochs, stopped where the refit stops.
    everything = replace(leave_one_out(cycle_dataset, "validation"), ends=cycle_dataset.lengths - 1)
    goals(monkeypatch, [0.1, 0.5, 0.2])
    train(cycle_dataset, recipe, tmp_path / "other", validation=everything, progress=False)
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "other"))


def test_the_saved_weights_are_the_mean_that_was_judged(cycle_dataset, tmp_path, monkeypatch):
    judged, moving = [], []
    monkeypatch.setattr(
        RetrievalObjective, "validate", lambda self, model: (judged.append(phases.copy_state(model)) or {}, 0.5)
    )
    real = Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda self, *a: (real(self, *a), moving.append(self.weights[0].clone())))
    recipe = tiny("retrieval").with_training(max_epochs=1, average=0.9)
    train(cycle_dataset, recipe, tmp_path / "run", progress=False)
    assert same(weights_of(tmp_path / "run"), judged[0])
    assert not torch.equal(judged[0]["embedding.items.weight"], moving[-1])


@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_a_split_by_time_trains_before_its_cut_alone(cycle_dataset, tmp_path, kind):
    cut = 60_000 * 4
    window = by_time(cycle_dataset, cut, cut + 60_000)
    train(cycle_dataset, tiny(kind).with_training(max_epochs=1), tmp_path / "run", validation=window, progress=False)
    ends = trained_ends(tmp_path / "run", cycle_dataset.num_users)
    assert (ends == 4).all()
    assert not check_no_leak(cycle_dataset, ends=ends, holdout=window)
    leaking = replace(window, ends=window.ends + 1)
    with pytest.raises(RuntimeError, match="must be before"):
        training_users(cycle_dataset, leaking)
    test = by_time(cycle_dataset, cut + 60_000)
    recipe = tiny(kind).with_training(max_epochs=1, refit=True)
    with pytest.raises(ValueError, match="test is None"):
        train(cycle_dataset, recipe, tmp_path / "again", validation=window, progress=False)
    train(cycle_dataset, recipe, tmp_path / "again", validation=window, test=test, progress=False)
    assert (trained_ends(tmp_path / "again", cycle_dataset.num_users) == 5).all()


@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_an_empty_validation_split_is_refused_before_anything_is_trained(cycle_dataset, tmp_path, kind):
    window = by_time(cycle_dataset, 10**9)
    with pytest.raises(UserError, match="the window split has no targets"):
        train(cycle_dataset, tiny(kind), tmp_path / "run", validation=window, progress=False)
    assert not list(tmp_path.iterdir())


def test_too_few_users_before_a_window_are_refused(cycle_dataset):
    with pytest.raises(UserError, match="only 0 users have 2 or more exposures before the window"):
        training_users(cycle_dataset, by_time(cycle_dataset, 1))


def grown(make_dataset, num_items=23):
    """Return the cycle's users who met new items at their ends."""
    users = []
    for user in range(60):
        items = [(user * 7 + step) % 20 for step in range(6 + user % 9)] + [20 + user % (num_items - 20)]
        users.append([(item, 0b11 if item % 2 == 0 else 0b01, 60_000 * step) for step, item in enumerate(items)])
    return make_dataset(users, num_items)


@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_a_warm_start_copies_known_rows_and_leaves_new_ones_as_in_a_fresh_model(
    cycle_dataset, make_dataset, tmp_path, kind
):
    recipe = tiny(kind).with_training(max_epochs=1)
    train(cycle_dataset, recipe, tmp_path / "older", progress=False)
    dataset = grown(make_dataset)

    def fresh():
        torch.manual_seed(torch_seed(recipe.training.seed, "weights"))
        return build_model(recipe.model, num_rows=dataset.vocabulary.num_rows, num_actions=2, tasks=["like"])

    model, untouched = fresh(), fresh()
    assert copy_weights(model, tmp_path / "older", dataset) == 3
    older = load_model(tmp_path / "older")
    table, rows = model.embedding.items.weight, len(older.embedding.items.weight)
    assert torch.equal(table[:rows], older.embedding.items.weight)
    assert torch.equal(table[rows:], untouched.embedding.items.weight[rows:])
    assert torch.equal(model.encoder.layers[1].uvqk, older.encoder.layers[1].uvqk)
    train(dataset, recipe, tmp_path / "newer", warm_start=tmp_path / "older", progress=False)
    train(dataset, recipe, tmp_path / "cold", progress=False)
    warm, cold = (json.loads((tmp_path / name / "curves.json").read_text())[0] for name in ("newer", "cold"))
    assert warm["loss"] < cold["loss"]


def test_a_warm_start_from_what_does_not_fit_is_refused(cycle_dataset, make_dataset, tmp_path):
    recipe = tiny("ranking").with_training(max_epochs=1)
    train(cycle_dataset, recipe, tmp_path / "older", progress=False)
    deeper = replace(recipe, model=replace(recipe.model, num_layers=3))
    longer = replace(recipe, model=replace(recipe.model, max_events=41))
    retasked = make_dataset([[(i, 1 + i % 2, i) for i in range(9)]] * 20, 20, tasks={"view": ("like",)})
    for other, dataset, told in (
        (deeper, cycle_dataset, r"encoder\.layers\.2\.\S+ is missing"),
        (longer, cycle_dataset, r"its embedding\.positions is \[83, 16\], this recipe's is \[85, 16\]"),
        (recipe, make_dataset([[(i % 9, 1 + i % 2, i) for i in range(9)]] * 20, 9), "20 items are not the first ones"),
        (recipe, retasked, "its tasks are like, the data set's are view"),
    ):
        with pytest.raises(UserError, match=f"cannot start from older: .*{told}"):
            train(dataset, other, tmp_path / "newer", warm_start=tmp_path / "older", progress=False)
    written = json.loads((tmp_path / "older" / "recipe.json").read_text())
    (tmp_path / "older" / "recipe.json").write_text(json.dumps(written | {"vocabulary": "another"}))
    with pytest.raises(UserError, match="are not the first ones of"):
        train(cycle_dataset, recipe, tmp_path / "newer", warm_start=tmp_path / "older", progress=False)
    shutil.rmtree(tmp_path / "older")
    with pytest.raises(UserError, match=r"older holds no recipe\.json"):
        train(cycle_dataset, recipe, tmp_path / "newer", warm_start=tmp_path / "older", progress=False)


def test_compile_without_a_compiler_is_refused(cycle_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    recipe = tiny("retrieval").with_training(compile=True)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        train(cycle_dataset, recipe, tmp_path / "run", progress=False)


@pytest.mark.slow
def test_a_compiled_encoder_learns_what_a_plain_one_does(cycle_dataset, tmp_path):
    recipe = tiny("retrieval").with_training(max_epochs=2, patience=9)
    recipe = replace(recipe, model=replace(recipe.model, dropout=0.0))
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        train(cycle_dataset, recipe.with_training(compile=compiled), out, progress=False)
    plain, fast = (weights_of(tmp_path / name) for name in ("False", "True"))
    for name, weight in plain.items():
        torch.testing.assert_close(fast[name], weight, rtol=0, atol=1e-3, msg=name)

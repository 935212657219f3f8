"""Checkpoints: a run that was killed anywhere ends as one that was not, and a file that does not fit is refused."""

import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gr_platform.errors import UserError
from gr_platform.models.config import StochasticLength
from gr_platform.models.recipes import tiny
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.training import checkpoint
from gr_platform.training.checkpoint import (
    CHECKPOINT,
    CHECKPOINT_VERSION,
    Progress,
    Sums,
    load_checkpoint,
    save_checkpoint,
)
from gr_platform.training.epoch import Epoch
from gr_platform.training.loop import train
from gr_platform.training.optim import Optimizer
from gr_platform.training.unfinished import unfinished as unfinished_trainings

FILES = ("model.safetensors", "curves.json", "recipe.json", "trained.parquet")


class Killed(BaseException):
    """Stands for a signal: nothing may catch it."""


def kill_before(patched, number):
    """Let a run be killed before its step `number`, with a checkpoint after every step."""
    real, steps = Epoch._step, itertools.count()

    def until(self, *rest):
        if next(steps) == number:
            raise Killed
        return real(self, *rest)

    patched.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    patched.setattr(Epoch, "_step", until)


EVERYTHING = {
    "schedule": "cosine",
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "table_optimizer": "rowwise",
    "clip_norm": 1.0,
    "accumulate": 2,
    "average": 0.9,
    "negatives": "per_token",
}


# Four steps an epoch, three epochs, then those of the refit.
@pytest.mark.parametrize(
    ("kind", "fields", "number"),
    [
        ("retrieval", {}, 5),
        ("ranking", {}, 6),
        ("retrieval", EVERYTHING, 5),
        ("retrieval", EVERYTHING | {"refit": True}, 13),
        ("ranking", {"refit": True, "stochastic_length": StochasticLength(alpha=1.2)}, 12),
    ],
)
def test_a_run_killed_inside_an_epoch_ends_with_the_bytes_of_an_uninterrupted_one(
    cycle_dataset, tmp_path, monkeypatch, kind, fields, number
):
    recipe = tiny(kind).with_training(max_epochs=3, patience=9, batch_size=16, **fields)
    recipe = replace(recipe, model=replace(recipe.model, max_events=10))
    train(cycle_dataset, recipe, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patched:
        kill_before(patched, number)
        with pytest.raises(Killed):
            train(cycle_dataset, recipe, tmp_path / "resumed", progress=False)
    left = json.loads(header(tmp_path / ".checkpoint-resumed"))["progress"]
    assert left["cursor"]["batch"] == number % 4 * recipe.training.accumulate or number == 12
    assert left["phase"] == ("refit" if number > 12 else "validation")
    torch.manual_seed(99)  # what ran before in the process must not matter
    train(cycle_dataset, recipe, tmp_path / "resumed", progress=False)
    for name in FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), name
    assert not list(tmp_path.glob(".checkpoint*"))


SCRIPT = """
import os, signal, sys
from pathlib import Path
from gr_platform.models.recipes import tiny
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.training import checkpoint
from gr_platform.training.epoch import Epoch
from gr_platform.training.loop import train

checkpoint.CHECKPOINT_SECONDS = 0.0
real = Epoch._step

def step(self, model, optimizer, *rest):
    if optimizer.num_steps == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, model, optimizer, *rest)

Epoch._step = step
recipe = tiny("retrieval").with_training(max_epochs=3, patience=9, batch_size=16)
train(SequenceDataset.open(Path(sys.argv[1])), recipe, Path(sys.argv[2]), progress=False)
"""


def test_a_process_killed_by_the_system_is_gone_on_from_bit_for_bit(cycle_dataset, tmp_path, store):
    folder = store(cycle_dataset, tmp_path, "cycle")
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "killed")]
    assert subprocess.run(command, check=False, timeout=120).returncode == -9
    assert not (tmp_path / "killed").exists()
    [left] = tmp_path.glob(".checkpoint*")
    assert [path.name for path in left.iterdir()] == [CHECKPOINT]
    recipe = tiny("retrieval").with_training(max_epochs=3, patience=9, batch_size=16)
    dataset = SequenceDataset.open(folder)
    for name in ("killed", "whole"):
        train(dataset, recipe, tmp_path / name, progress=False)
    for name in FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def header(folder):
    """Return the JSON that a checkpoint's file says of itself."""
    with safe_open(folder / CHECKPOINT, framework="pt") as opened:
        return opened.metadata()["header"]


def fresh():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    return model, Optimizer(model, tiny("retrieval").with_training(average=0.9).training)


def stepped(model, optimizer, value):
    optimizer.zero_grad()
    model(torch.full((1, 3), value)).sum().backward()
    optimizer.step()


def test_a_checkpoint_gives_back_weights_optimiser_and_progress_exactly(tmp_path):
    model, optimizer = fresh()
    stepped(model, optimizer, 1.0)
    done = Progress(
        curves=[{"phase": "validation", "epoch": 0, "loss": 0.1 + 0.2}],
        goals=[0.3],
        seconds=[1.5],
        best={"x": torch.ones(2)},
        cursor={"epoch": 1, "batch": 3, "plan": "abc"},
        sums=Sums(loss=0.1 + 0.7, num_targets=5, tokens=7, seconds=0.25),
    )
    save_checkpoint(tmp_path, model, optimizer, done, {"recipe": {"name": "x"}})
    other, other_optimizer = fresh()
    restored = load_checkpoint(tmp_path, {"recipe": {"name": "x"}}).restore(other, other_optimizer)
    assert torch.equal(restored.best.pop("x"), done.best.pop("x"))
    assert restored == done
    for each in ((model, optimizer), (other, other_optimizer)):
        stepped(*each, 2.0)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(optimizer.average["weight"], other_optimizer.average["weight"])
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_damaged_checkpoint_is_a_clear_error_and_a_missing_one_a_fresh_start(tmp_path):
    assert load_checkpoint(tmp_path) is None
    path = save_checkpoint(tmp_path, *fresh(), Progress())
    whole = path.read_bytes()
    for kept in (len(whole) - 5, 100, 3):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(tmp_path)
        assert path.read_bytes() == whole[:kept]


def _overwritten(path):
    content = bytearray(path.read_bytes())
    content[-200:-100] = b"\xff" * 100
    path.write_bytes(content)


def _with_tensors(change, **texts):
    def damage(path):
        with safe_open(path, framework="pt") as opened:
            said, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        change(tensors)
        save_file(tensors, path, metadata=said | texts)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        _overwritten,
        _with_tensors(lambda tensors: tensors.pop("model.weight")),
        _with_tensors(lambda tensors: tensors.update({"model.other": torch.ones(2)})),
        _with_tensors(lambda tensors: tensors["model.weight"][0].add_(1e-6)),  # finite, so nothing else would see it
        _with_tensors(lambda tensors: None, header='{"version": 4, "of": {}, "progress": {}}'),
        _with_tensors(lambda tensors: None, header="{"),
        _with_tensors(lambda tensors: None, header="[]"),
        _with_tensors(lambda tensors: None, digest=""),
    ],
    ids=["bytes", "missing", "extra", "finite", "header", "half_header", "list_header", "no_digest"],
)
def test_any_change_of_a_checkpoint_is_seen(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("GR_HOME", str(tmp_path))
    folder = tmp_path / "runs" / ".checkpoint-x"
    path = save_checkpoint(folder, *fresh(), Progress(best={"x": torch.ones(300)}))
    assert load_checkpoint(folder) is not None
    damage(path)
    with pytest.raises(UserError, match="damaged") as caught:
        load_checkpoint(folder)
    assert str(caught.value).startswith("$GR_HOME/runs/.checkpoint-x/checkpoint.safetensors is damaged (")
    assert str(caught.value).endswith("; delete $GR_HOME/runs/.checkpoint-x and train again")


def test_a_checkpoint_of_an_older_trainer_says_so(tmp_path):
    path = save_checkpoint(tmp_path, *fresh(), Progress())
    with safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    older = json.loads(header(tmp_path)) | {"version": CHECKPOINT_VERSION - 1}
    save_file(tensors, path, metadata={"header": json.dumps(older)})
    with pytest.raises(UserError, match=r"has version 3, this release reads 4; delete .* and train again"):
        load_checkpoint(tmp_path)


def test_a_file_shows_each_epoch_and_where_a_run_goes_on(cycle_dataset, tmp_path, monkeypatch, capsys):
    recipe = tiny("retrieval").with_training(max_epochs=3, patience=9)
    with monkeypatch.context() as patched:
        kill_before(patched, 3)  # two steps an epoch
        with pytest.raises(Killed):
            train(cycle_dataset, recipe, tmp_path / "run")
    figures = r"loss \d\.\d{{4}}, hr_at_10 .*, ndcg_at_10 \d\.\d{{4}}, [\d,]+ tokens/s, \d+ s"
    line = "retrieval validation epoch {}/3: " + figures
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(line.format(1), shown.err.strip())
    [left] = unfinished_trainings(tmp_path)
    assert (left.recipe, left.kind, left.seed, left.phase, left.num_epochs) == ("tiny", "retrieval", 1, "validation", 1)
    assert left.folder == tmp_path / ".checkpoint-run"
    assert left.age_s < 600
    train(cycle_dataset, recipe, tmp_path / "run")
    first, *rest = capsys.readouterr().err.strip().splitlines()
    assert first == "retrieval validation goes on from epoch 2/3"
    assert [bool(re.fullmatch(line.format(2 + number), each)) for number, each in enumerate(rest)] == [True, True]
    assert list(unfinished_trainings(tmp_path)) == []


def test_a_terminal_has_a_bar_and_no_line_an_epoch(cycle_dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(cycle_dataset, tiny("retrieval").with_training(max_epochs=1), tmp_path / "run")
    shown = capsys.readouterr().err
    assert "retrieval validation epoch 1/1:" in shown
    assert "ndcg_at_10" not in shown


def test_a_checkpoint_that_says_nothing_is_no_unfinished_training(tmp_path):
    save_checkpoint(tmp_path / ".checkpoint-a", *fresh(), Progress())
    (tmp_path / ".checkpoint-b").mkdir()
    (tmp_path / ".checkpoint-b" / CHECKPOINT).write_bytes(b"half a file")
    assert list(unfinished_trainings(tmp_path)) == []


def test_a_checkpoint_of_another_run_is_refused_and_kept(cycle_dataset, make_dataset, tmp_path, monkeypatch):
    recipe = tiny("retrieval").with_training(max_epochs=2)
    with monkeypatch.context() as patched:
        kill_before(patched, 3)
        with pytest.raises(Killed):
            train(cycle_dataset, recipe, tmp_path / "run", progress=False)
    kept = (tmp_path / ".checkpoint-run" / CHECKPOINT).read_bytes()
    larger = make_dataset([[(i % 21, 1, i) for i in range(user, user + 9)] for user in range(60)], 21)
    for dataset, other, told in (
        (
            cycle_dataset,
            recipe.with_training(learning_rate=0.5),
            r"learning_rate is 0\.004, this one's is 0\.5",
        ),
        (cycle_dataset, replace(recipe, model=replace(recipe.model, num_layers=1)), r"recipe\.model\.num_layers is 2"),
        (larger, recipe, r"shape\.num_rows is 25, this one's is 26"),
    ):
        with pytest.raises(UserError, match=f"belongs to another run.*{told}"):
            train(dataset, other, tmp_path / "run", progress=False)
        assert (tmp_path / ".checkpoint-run" / CHECKPOINT).read_bytes() == kept
    # The same shape, but other items.
    renamed = make_dataset([[(i % 20, 1, i) for i in range(user, user + 9)] for user in range(60)], 20)
    renamed.digest = "others"
    with pytest.raises(UserError, match=r"its sequences is made, this one's is others"):
        train(renamed, recipe, tmp_path / "run", progress=False)

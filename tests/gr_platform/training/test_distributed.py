"""A run in two processes over gloo: the same weights as in one, and what is said when a process is lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
import torch.distributed.run
from safetensors import safe_open
from safetensors.torch import load_file

from gr_platform import settings
from gr_platform.errors import UserError
from gr_platform.models.recipes import tiny
from gr_platform.training import launch as launching_module
from gr_platform.training import ranks as ranks_module
from gr_platform.training.batches import training_reader
from gr_platform.training.checkpoint import CHECKPOINT
from gr_platform.training.launch import Job, Launch, launch, launching, tell_failure, torchrun
from gr_platform.training.load import WEIGHTS
from gr_platform.training.loop import CURVES, train_model
from gr_platform.training.phases import training_users
from gr_platform.training.ranks import LostProcess, Ranks, joined, require_room

# Whatever is drawn for a step or a target is in it: shared parts, negatives of each target, clipping, the mean. The
# last step of an epoch has 12 of 60 users.
RECIPE = tiny("retrieval").with_training(
    max_epochs=3, batch_size=48, accumulate=2, negatives="per_token", clip_norm=0.5, average=0.9, learning_rate=1e-3
)
RECIPE = replace(RECIPE, model=replace(RECIPE.model, dropout=0.0))


@pytest.fixture(scope="module")
def home(cycle_dataset, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    store(cycle_dataset, folder, "cycle")
    return folder


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch):
    monkeypatch.setattr(settings, "num_cores", lambda: 2)


def test_two_processes_end_with_the_weights_of_one(home):
    both = train_model(home, "cycle", "retrieval", RECIPE, num_processes=2, progress=False)
    assert not list((home / "runs" / "cycle").glob(".checkpoint*"))
    found = [load_file(both.folder / WEIGHTS), json.loads((both.folder / CURVES).read_text())]
    (both.folder / "manifest.json").unlink()
    alone = train_model(home, "cycle", "retrieval", RECIPE, progress=False)
    assert alone.folder == both.folder
    for name, weight in load_file(alone.folder / WEIGHTS).items():
        # Six steps in fp32 whose sums were made in another order; a weight moves by about 1e-3 a step.
        torch.testing.assert_close(found[0][name], weight, rtol=0, atol=1e-6, msg=name)
    for one, other in zip(found[1], json.loads((alone.folder / CURVES).read_text()), strict=True):
        assert one.pop("phase") == other.pop("phase")
        assert one == pytest.approx(other, rel=1e-5)


DIE = """
import os, signal, sys
from pathlib import Path
from gr_platform.training import checkpoint, distributed
from gr_platform.training.epoch import Epoch

checkpoint.CHECKPOINT_SECONDS = 0.0
real = Epoch._step

def step(self, model, optimizer, *rest):
    if optimizer.num_steps == 3 and self.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, model, optimizer, *rest)

Epoch._step = step
sys.exit(distributed.main())
"""


@pytest.mark.slow
def test_a_lost_process_is_named_and_the_last_checkpoint_stays(home, tmp_path):
    (tmp_path / "die.py").write_text(DIE)
    job = Job(home=home, ds="cycle", recipe=RECIPE.with_training(seed=5), progress=False)
    with launching(job, 2, "die") as started:
        environment = os.environ | started.environment | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            started.command, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode != 0
        assert "Traceback" not in done.stderr, done.stderr
        error = started.failed()
    assert isinstance(error, LostProcess)
    assert "the last checkpoint is kept" in str(error)
    [left] = (home / "runs" / "cycle").glob(".checkpoint*")
    with safe_open(left / CHECKPOINT, framework="pt") as opened:
        assert int(opened.get_tensor("optimizer.num_steps")) == 3
    with pytest.raises(UserError, match="its num_processes is 2, this one's is 1"):
        train_model(home, "cycle", "retrieval", job.recipe, progress=False)
    train_model(home, "cycle", "retrieval", job.recipe, num_processes=2, progress=False)
    assert not left.exists()


def test_what_a_process_has_to_say_reaches_who_started_it(home):
    job = Job(home=home, ds="cycle", recipe=RECIPE, warm_start="older")
    with launching(job, 2) as started:
        assert Job.read(started.folder) == job
        tell_failure(started.folder, LostProcess("the other one is gone"))
        assert isinstance(started.failed(), LostProcess)
        tell_failure(started.folder, UserError("the loss is nan"))
        assert str(started.failed()) == "the loss is nan"
    assert not started.folder.exists()


def test_a_batch_that_processes_cannot_share_is_refused(cycle_dataset):
    uneven = RECIPE.with_training(batch_size=18)
    with pytest.raises(UserError, match="batch_size 18 cannot be shared by 2 processes in 2 parts each"):
        training_reader(cycle_dataset, *training_users(cycle_dataset), uneven, num_ranks=2)


@pytest.mark.parametrize(
    ("num_processes", "told"),
    [
        (64, "batch_size 48 cannot be shared by 64 processes in 2 parts each"),
        (3, "3 processes would share 2 usable cores .*; start at most 2"),
    ],
)
def test_processes_that_cannot_work_are_refused_before_one_starts(home, num_processes, told):
    def start(*_):
        raise AssertionError("started")

    recipe = RECIPE.with_training(seed=11)
    with pytest.raises(UserError, match=told):
        train_model(home, "cycle", "retrieval", recipe, num_processes=num_processes, progress=False, start=start)


def test_there_is_room_for_a_process_on_each_gpu_however_few_the_cores(monkeypatch):
    monkeypatch.setattr(settings, "device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    require_room(8)
    with pytest.raises(UserError, match=r"fewer GPUs \(8\) than there are processes; start at most 8"):
        require_room(9)


def test_a_signal_ends_torchrun_with_a_status_and_no_traceback(monkeypatch):
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def ended(_):
        raise SignalException("told to end", signal.SIGTERM)

    # What it silences is meant for a process of its own.
    monkeypatch.setattr(launching_module.logging, "disable", lambda _: None)
    monkeypatch.setattr(torch.distributed.run, "main", ended)
    assert torchrun(["x"]) == 128 + signal.SIGTERM


STARTS_ANOTHER = """
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_training_that_is_told_to_end_leaves_no_process(home, tmp_path, monkeypatch, number):
    (tmp_path / "start.py").write_text(STARTS_ANOTHER)
    told = tmp_path / "pid"
    command = [sys.executable, str(tmp_path / "start.py"), str(told)]
    monkeypatch.setattr(launching_module, "launching", lambda *_: nullcontext(Launch(command, {}, tmp_path)))
    begun = []

    def tell():
        deadline = time.monotonic() + 60
        while not (told.is_file() and told.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        begun.append(psutil.Process(int(told.read_text())))
        os.kill(os.getpid(), number)

    teller = threading.Thread(target=tell)
    # As they are without nohup, under which the tests may run.
    before = {each: signal.signal(each, signal.SIG_DFL) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        teller.start()
        with pytest.raises(KeyboardInterrupt):
            launch(Job(home=home, ds="cycle", recipe=RECIPE), 2)
        assert {signal.getsignal(each) for each in before} == {signal.SIG_DFL}
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        teller.join()
    assert not begun[0].is_running() or begun[0].status() == psutil.STATUS_ZOMBIE


def test_a_process_by_itself_speaks_to_nobody():
    weight = torch.nn.Parameter(torch.ones(2))
    alone = Ranks()
    assert alone.add_up([weight], [1.5, 2.0]) == [1.5, 2.0]
    assert weight.grad is None
    assert np.array_equal(alone.gather([3, 4]), [[3], [4]])
    assert alone.hear({"goal": 0.1}) == {"goal": 0.1}
    with pytest.raises(UserError, match="run by torchrun"), joined():
        pass


def test_a_broken_connection_is_a_lost_process(monkeypatch):
    def gone(*_):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(ranks_module.dist, "all_reduce", gone)
    with pytest.raises(LostProcess, match=r"is gone \(Connection closed by peer\); the last checkpoint is kept"):
        Ranks(num_ranks=2).add_up([torch.nn.Parameter(torch.ones(2))], [1.0])

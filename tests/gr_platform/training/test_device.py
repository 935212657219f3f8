"""Where a model computes, on the CPU or a GPU, and in which precision.

Invariant: what stands in for a GPU shows that no tensor stays behind on the CPU, and no more (pretended_gpu.py); a GPU
itself is for the last test.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gr_platform import settings
from gr_platform.errors import UserError
from gr_platform.models.batch import EventBatch
from gr_platform.models.build import build_model
from gr_platform.models.config import Recipe
from gr_platform.models.recipes import tiny
from gr_platform.training import ranks as ranks_module
from gr_platform.training.loop import CURVES, train
from gr_platform.training.ranks import Ranks, joined

CASES = Path(__file__).with_name("device_cases.py")
ENCODERS = {
    "retrieval": ["hstu", "hstu_softmax", "transformer", "sasrec", "gru4rec", "bert4rec"],
    "ranking": ["hstu", "hstu_softmax", "transformer", "sasrec", "gru4rec", "dlrm"],
}


def make_batch():
    rng = np.random.default_rng(0)
    histories = [(rng.integers(5, 40, n), rng.integers(1, 8, n), 1000 * np.arange(n)) for n in (7, 0, 12)]
    return EventBatch.of(histories, [20_000] * 3)


@pytest.mark.slow
def test_training_and_evaluation_leave_no_tensor_behind_on_the_cpu():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CASES)],
        cwd=settings.PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    ("configured", "found", "device"),
    [("", False, "cpu"), ("", True, "cuda"), ("auto", True, "cuda"), ("cpu", True, "cpu"), ("cuda", True, "cuda")],
)
def test_the_device_is_the_gpu_that_there_is_unless_the_setting_says_otherwise(monkeypatch, configured, found, device):
    monkeypatch.setenv("GR_DEVICE", configured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    assert settings.device() == Ranks.alone().device == device


@pytest.mark.parametrize(
    ("configured", "message"),
    [("cuda", r"sees no GPU; .* or set GR_DEVICE to cpu"), ("gpu", "must be auto, cpu or cuda")],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, configured, message):
    monkeypatch.setenv("GR_DEVICE", configured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        Ranks.alone()


@pytest.fixture
def torchrun(monkeypatch):
    """Process 1 of a run by torchrun, with as many GPUs as `given` says; yields what it called, in order."""
    given, called = {"gpus": 2}, []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(settings, "device", lambda: "cuda" if given["gpus"] else "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: given["gpus"])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: called.append(device))
    names = {
        "init_process_group": lambda backend, timeout: called.append(backend),
        "destroy_process_group": lambda: called.append("left"),
        "get_rank": lambda: 1,
        "get_world_size": lambda: 2,
    }
    for name, stub in names.items():
        monkeypatch.setattr(ranks_module.dist, name, stub)
    return given, called


@pytest.mark.parametrize(("gpus", "calls"), [(2, ["cuda:1", "nccl", "left"]), (0, ["gloo", "left"])])
def test_processes_take_a_gpu_each_and_talk_over_nccl(torchrun, gpus, calls):
    given, called = torchrun
    given["gpus"] = gpus
    with joined() as ranks:
        assert (ranks.rank, ranks.num_ranks, ranks.device) == (1, 2, "cuda:1" if gpus else "cpu")
    assert called == calls


def test_more_processes_than_gpus_are_refused_before_any_joins(torchrun):
    given, called = torchrun
    given["gpus"] = 1
    with pytest.raises(UserError, match=r"fewer GPUs \(1\) than there are processes"), joined():
        pass
    assert called == []


@pytest.mark.parametrize(("kind", "encoder"), [(kind, each) for kind, every in ENCODERS.items() for each in every])
def test_bf16_trains_to_the_loss_of_fp32(cycle_dataset, tmp_path, kind, encoder):
    base = tiny(kind)
    recipe = replace(base, model=replace(base.model, encoder=encoder, dropout=0.0))
    losses = {}
    for precision in ("fp32", "bf16"):
        recipe = recipe.with_training(precision=precision, max_epochs=3)
        train(cycle_dataset, recipe, tmp_path / precision, progress=False)
        losses[precision] = [entry["loss"] for entry in json.loads((tmp_path / precision / CURVES).read_text())]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"][-1] < losses["bf16"][0]


@pytest.mark.parametrize(("kind", "encoder"), [(kind, each) for kind, every in ENCODERS.items() for each in every])
def test_losses_and_what_they_are_made_of_stay_in_fp32_under_autocast(kind, encoder):
    torch.manual_seed(0)
    config = replace(tiny(kind).model, encoder=encoder)
    model, batch = build_model(config, num_rows=40, num_actions=3, tasks=["a"]), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        if kind == "ranking":
            made = [model.logits(batch), model.loss(batch, task_masks=[1])[0]]
        else:
            loss, _ = model.loss(batch, negatives=torch.tensor([6, 7]), positive_mask=7)
            made = [model.user_vectors(batch), model.item_vectors(), loss]
    assert {tensor.dtype for tensor in made} == {torch.float32}


@pytest.mark.parametrize("encoder", ["hstu", "hstu_softmax"])
def test_the_products_of_hstu_are_short_under_autocast_and_its_sum_over_layers_is_not(encoder):
    config = replace(tiny("retrieval").model, encoder=encoder, dropout=0.0)
    model, batch = build_model(config, num_rows=40, num_actions=3, tasks=[]), make_batch()
    tokens, layer = batch.tokens("retrieval"), model.encoder.layers[0]
    x = torch.randn(len(tokens.kinds), config.embedding_dim)
    wide = model.encoder(x, tokens.jagged)
    with torch.autocast("cpu", torch.bfloat16):
        assert {part.dtype for part in layer._project(x, None)} == {torch.bfloat16}
        short = model.encoder(x, tokens.jagged)
    assert short.dtype == torch.float32
    # A sum in bf16 has no value between two of bf16.
    assert not torch.equal(short, short.bfloat16().float())
    torch.testing.assert_close(short, wide, rtol=0, atol=0.02 * float((wide - x).abs().max()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize("encoder", ["hstu", "hstu_softmax"])
def test_the_kernels_of_a_gpu_take_what_autocast_makes_of_a_step(encoder):
    found = {}
    for backend in ("cpu", "triton"):
        torch.manual_seed(0)
        config = replace(tiny("retrieval").model, encoder=encoder)
        model = build_model(config, num_rows=40, num_actions=3, tasks=[])
        model.encoder.backend = backend
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = model.loss(make_batch(), negatives=torch.arange(6, 30), positive_mask=7)
        loss.backward()
        gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
        found[backend] = float(loss.detach()), torch.cat([each / each.abs().max() for each in gradients])
    assert found["triton"][0] == pytest.approx(found["cpu"][0], rel=2e-3)
    # What is rounded in bf16 at other places differs by some of its last bits, 2**-8 each.
    torch.testing.assert_close(found["triton"][1], found["cpu"][1], rtol=0, atol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["fp32", "auto"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_gpu_trains_to_the_loss_of_the_cpu(cycle_dataset, tmp_path, kind, precision):
    def losses(device: str, recipe: Recipe) -> list[float]:
        train(cycle_dataset, recipe, tmp_path / device, ranks=Ranks(device=device), progress=False)
        return [entry["loss"] for entry in json.loads((tmp_path / device / CURVES).read_text())]

    recipe = tiny(kind).with_training(precision=precision)
    assert losses("cuda", recipe) == pytest.approx(losses("cpu", recipe), rel=0.02)

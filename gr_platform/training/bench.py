"""What one training step of the paper's two ML-1M recipes costs on this machine, part by part and against others.

Invariant: every side trains on one batch, made up with ML-1M's figures, so no data file is needed: 128 users whose
lengths are ML-1M's (median 96, cut to 20..200: 13.9 k tokens), 3,706 items, 128 negatives drawn for each token.

Legend: T tokens that have a target, M negatives of each, d width.
"""

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gr_platform import settings
from gr_platform.models.batch import EventBatch, History
from gr_platform.models.build import build_encoder
from gr_platform.models.config import ModelConfig, TrainingConfig
from gr_platform.models.encoder import Encoder
from gr_platform.models.recipes import ml_1m
from gr_platform.models.retrieval import RetrievalModel
from gr_platform.sequences.vocabulary import NUM_OOV
from gr_platform.training.loop import adamw
from gr_platform.training.memory import KEEP_MEMORY, keep_freed_memory
from gr_platform.training.negatives import uniform_negatives
from gr_platform.training.seeds import generator, torch_seed
from kernels.hstu_attention import cpu as attention_cpu
from kernels.norm_gate import cpu as gate_cpu
from kernels.sampled_softmax import cpu as softmax_cpu
from kernels.uvqk import cpu as uvqk_cpu

Row = dict[str, Any]
SHAPE = ml_1m("retrieval").model
RECIPES: dict[str, ModelConfig] = {
    "HSTU": SHAPE,
    "HSTU-large": replace(SHAPE, num_layers=8, num_heads=2, qk_dim=25, v_dim=25),
}
TRAINING = TrainingConfig(batch_size=128, num_negatives=128, negatives="per_token")
NUM_ITEMS, NUM_ACTIONS, FIRST_ITEM = 3_706, 5, 1 + NUM_OOV
MEDIAN_LENGTH, MIN_LENGTH, MAX_LENGTH = 96, 20, 200
START_MS, GAP_S = 956_703_932_000, 20.0
WARM_UP, REPEATS, SHARE_REPEATS, PLAIN_REPEATS, PEER_REPEATS = 2, 9, 3, 3, 3
PEER_DEADLINE_S = 600
BATCH, ENCODER, LOSS = "batch, negatives, time buckets", "encoder forward", "loss forward"
BACKWARD, OPTIMIZER = "backward", "optimizer"
# Share of a step -> module and functions behind the registered ops. A profiler would slow the ones of many small calls.
SHARES: dict[str, list[tuple[ModuleType, str]]] = {
    "attention forward": [(attention_cpu, "forward")],
    "attention backward": [(attention_cpu, "backward")],
    "uvqk, both ways": [(uvqk_cpu, "uvqk"), (uvqk_cpu, "uvqk_backward")],
    "gate, norm, output, dropout, both ways": [
        (gate_cpu, "norm_gate_linear"),
        (gate_cpu, "norm_gate_linear_backward"),
        (gate_cpu, "hash_dropout"),
    ],
    "sampled softmax, both ways": [(softmax_cpu, "own_forward"), (softmax_cpu, "own_backward")],
}


class PlainRetrieval(RetrievalModel):
    """The same model as one writes it first: attention user by user, every token's negatives gathered [T, M, d]."""

    def __init__(self, config: ModelConfig, encoder: Encoder, **shape: Any) -> None:
        super().__init__(config, encoder, **shape)
        self.encoder.backend = "reference"

    def _losses(self, users: Tensor, items: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
        return gathered_losses(users, items, targets, negatives, self.config.temperature)


def gathered_losses(users: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Return the losses [T] of `kernels.sampled_softmax` through the [T, M, d] tensor of drawn vectors."""
    positive = (users * F.embedding(targets, items)).sum(-1, keepdim=True)
    negative = torch.einsum("td,tmd->tm", users, F.embedding(negatives, items))
    negative = negative.masked_fill(negatives == targets[:, None], float("-inf"))
    logits = torch.cat([positive, negative], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64), reduction="none")


def histories() -> tuple[list[History], np.ndarray]:
    """Return the (items, actions, times) of the users, one token fewer than their lengths, and their request times."""
    rng = generator(TRAINING.seed, "step")
    drawn = np.exp(rng.normal(np.log(MEDIAN_LENGTH), 1.0, TRAINING.batch_size)).astype(np.int64)
    made, requests = [], []
    for length in np.clip(drawn, MIN_LENGTH, MAX_LENGTH).tolist():
        # Some items are met more often than others, and most events follow the one before within a minute.
        items = FIRST_ITEM + (NUM_ITEMS * rng.random(length - 1) ** 2).astype(np.int64)
        actions = 1 << rng.integers(0, NUM_ACTIONS, length - 1)
        gaps_s = np.exp(rng.normal(np.log(GAP_S), 2.0, length)).astype(np.int64)
        times = START_MS + 1_000 * np.cumsum(gaps_s)
        made.append((items, actions, times[:-1]))
        requests.append(int(times[-1]))
    return made, np.array(requests, np.int64)


@dataclass(slots=True)
class Laps:
    """Milliseconds of the parts of a step, one list a part; a part ends where it is named."""

    last: float = 0.0
    ms: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.ms.setdefault(part, []).append(1e3 * (now - self.last))
        self.last = now


class Step:
    """One recipe's training step as `Epoch` does it."""

    def __init__(self, model: RetrievalModel) -> None:
        self.model, self.optimizer, self.laps = model.train(), adamw(model, TRAINING), Laps()
        self.histories, self.request_times = histories()
        self.num_targets = sum(len(items) for items, _, _ in self.histories)
        model.embedding.register_forward_pre_hook(lambda *_: self.laps(BATCH))
        model.encoder.register_forward_hook(lambda *_: self.laps(ENCODER))

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch: the events and a start token for each user."""
        return self.num_targets + len(self.histories)

    def __call__(self, index: int) -> float:
        """Take a step and return its loss."""
        self.laps.last = time.perf_counter()
        batch = EventBatch.of(self.histories, self.request_times)
        negatives = uniform_negatives(
            first_item=FIRST_ITEM,
            num_rows=FIRST_ITEM + NUM_ITEMS,
            num_negatives=TRAINING.num_negatives,
            seed=TRAINING.seed,
            step=index,
            num_targets=self.num_targets,
        )
        total, num_targets = self.model.loss(batch, negatives=negatives, positive_mask=(1 << NUM_ACTIONS) - 1)
        loss = total / num_targets
        value = float(loss.detach())
        self.laps(LOSS)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.laps(BACKWARD)
        self.optimizer.step()
        self.laps(OPTIMIZER)
        return value

    def milliseconds(self, warm_up: int, repeats: int) -> dict[str, float]:
        """Return the median milliseconds of the whole step under "" and of each part."""
        for index in range(warm_up):
            self(index)
        self.laps.ms.clear()
        for index in range(repeats):
            self(index)
        whole = [sum(parts) for parts in zip(*self.laps.ms.values(), strict=True)]
        return {"": statistics.median(whole)} | {part: statistics.median(ms) for part, ms in self.laps.ms.items()}

    def shares(self) -> dict[str, float]:
        """Return what share of a step, in percent, each of SHARES and the rest take."""
        with ExitStack() as stack:
            spent_s = {part: [stack.enter_context(_timed(*at)) for at in places] for part, places in SHARES.items()}
            begin = time.perf_counter()
            for index in range(SHARE_REPEATS):
                self(index)
            whole_s = time.perf_counter() - begin
        shares = {part: 100.0 * sum(map(sum, found)) / whole_s for part, found in spent_s.items()}
        return shares | {"everything else": 100.0 - sum(shares.values())}


@contextmanager
def _timed(module: ModuleType, name: str) -> Iterator[list[float]]:
    """Collect the seconds of every call of a module's function."""
    function, seconds = getattr(module, name), []

    def call(*args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args)
        finally:
            seconds.append(time.perf_counter() - begin)

    setattr(module, name, call)
    try:
        yield seconds
    finally:
        setattr(module, name, function)


def new_step(config: ModelConfig, kind: type[RetrievalModel] = RetrievalModel) -> Step:
    """Return the step of an untrained model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(TRAINING.seed, "weights"))
        shape = {"num_rows": FIRST_ITEM + NUM_ITEMS, "first_item": FIRST_ITEM, "num_actions": NUM_ACTIONS}
        model = kind(config, build_encoder(config), **shape)
        return Step(model)


def run(num_threads: int) -> list[Row]:
    """Return rows {name, value, unit, against, target}: the ratios of this run, then the milliseconds behind them.

    RecTools is timed where `GR_PEERS` names an environment that has it; without one its rows are left out.
    Raises UserError if that folder is none, RuntimeError if the library fails in it.
    """
    torch.set_num_threads(num_threads)
    keep_freed_memory()
    found: list[Row] = []
    for name, config in RECIPES.items():
        step = new_step(config)
        ours = step.milliseconds(WARM_UP, REPEATS)
        plain_ms = new_step(config, PlainRetrieval).milliseconds(WARM_UP, PLAIN_REPEATS)[""]
        sides: list[tuple[str, float, float | None]] = [("plain PyTorch", plain_ms, None)]
        for kept, target in ((False, 4.0), (True, None)):
            peer_ms = rectools_ms(config, num_threads, keep_memory=kept)
            if peer_ms is not None:
                sides.append(("RecTools with freed memory kept" if kept else "RecTools", peer_ms, target))
        for side, ms, target in sides:
            found.append(_row(f"{name} step: {side} / ours", ms / ours[""], "x", "same run") | {"target": target})
        found += [_row(f"{name} step, {side}", ms, "ms") for side, ms, _ in sides]
        found += rows(name, step, ours)
    return found


def rows(name: str, step: Step, ours: dict[str, float]) -> list[Row]:
    """Return the rows of our own step: tokens a second, milliseconds of the parts, shares of the ops."""
    found = [_row(f"{name} step, ours, tokens a second", 1e3 * step.num_tokens / ours[""], "1/s")]
    found += [_row(f"{name} step, ours{_part(part)}", ms, "ms") for part, ms in ours.items()]
    found += [_row(f"{name} step, share of {part}", share, "%", "its step") for part, share in step.shares().items()]
    return found


def _part(name: str) -> str:
    return f": {name}" if name else ""


def _row(name: str, value: float, unit: str, against: str | None = None) -> Row:
    return {"name": name, "value": value, "unit": unit, "against": against, "target": None}


def rectools_ms(config: ModelConfig, num_threads: int, *, keep_memory: bool) -> float | None:
    """Return the median milliseconds of RecTools' HSTU step on the same users, or None without its environment.

    keep_memory: let its process keep freed memory, as ours does. Raises RuntimeError if it fails.
    """
    python = settings.peer_python()
    if python is None:
        return None
    script = Path(__file__).with_name("rectools_step.py")
    shape: dict[str, float] = {
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "embedding_dim": config.embedding_dim,
    }
    shape |= {"dropout": config.dropout, "temperature": config.temperature, "max_length": MAX_LENGTH}
    shape |= {"num_negatives": TRAINING.num_negatives, "learning_rate": TRAINING.learning_rate}
    shape |= {"num_threads": num_threads, "num_steps": 1 + PEER_REPEATS}
    environment = os.environ | (KEEP_MEMORY if keep_memory else {})
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "interactions.npz"
        users, items, times = interactions()
        np.savez(source, users=users, items=items, times=times)
        command = [str(python), str(script), str(source), json.dumps(shape)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=PEER_DEADLINE_S
        )
    if done.returncode:
        raise RuntimeError(f"RecTools' step failed in the environment of GR_PEERS: {done.stderr.strip()[-400:]}")
    seconds: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return 1e3 * statistics.median(seconds[1:])


def interactions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return users, items and times int64 of what a library reads that makes n - 1 targets of n interactions."""
    made, requests = histories()
    users = np.repeat(np.arange(len(made)), [len(items) + 1 for items, _, _ in made])
    items = np.concatenate([np.append(items, items[:1]) for items, _, _ in made])
    times = np.concatenate([np.append(times, at) for (_, _, times), at in zip(made, requests, strict=True)])
    return users, items, times

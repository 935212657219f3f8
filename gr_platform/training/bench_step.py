"""One training step of the paper's two ML-1M shapes as `gr bench train` times it, whole and part by part.

Invariant: every side trains on one batch, made up with ML-1M's figures, so no data file is needed: 128 users whose
lengths are ML-1M's (median 96, cut to 20..200: 13.9 k tokens), 3,706 items, 128 negatives drawn for each token.

Legend: T tokens that have a target, M negatives of each, d width.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gr_platform.models.batch import EventBatch, History
from gr_platform.models.build import build_encoder
from gr_platform.models.config import ModelConfig, TrainingConfig
from gr_platform.models.encoder import Encoder
from gr_platform.models.retrieval import RetrievalModel
from gr_platform.sequences.vocabulary import NUM_OOV
from gr_platform.training.flops import step_flops
from gr_platform.training.negatives import uniform_negatives
from gr_platform.training.optim import Optimizer
from gr_platform.training.seeds import generator, torch_seed
from kernels.hstu_attention import cpu as attention_cpu
from kernels.hstu_attention.bench import peak_gflops
from kernels.norm_gate import cpu as gate_cpu
from kernels.sampled_softmax import cpu as softmax_cpu
from kernels.uvqk import cpu as uvqk_cpu

Row = dict[str, Any]
MEDIAN_LENGTH, MIN_LENGTH, MAX_LENGTH = 96, 20, 200
# The paper's, whatever the recipes of these names become.
HSTU = ModelConfig(
    kind="retrieval", embedding_dim=50, num_layers=2, num_heads=1, qk_dim=50, v_dim=50, max_events=MAX_LENGTH
)
SHAPES = {"HSTU": HSTU, "HSTU-large": replace(HSTU, num_layers=8, num_heads=2, qk_dim=25, v_dim=25)}
TRAINING = TrainingConfig(batch_size=128, num_negatives=128, negatives="per_token")
NUM_ITEMS, NUM_ACTIONS, FIRST_ITEM = 3_706, 5, 1 + NUM_OOV
START_MS, GAP_S = 956_703_932_000, 20.0
WARM_UP, REPEATS, SHARE_REPEATS, PLAIN_REPEATS = 2, 9, 3, 3
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
        self.model, self.optimizer, self.laps = model.train(), Optimizer(model, TRAINING), Laps()
        self.histories, self.request_times = histories()
        self.num_targets = sum(len(items) for items, _, _ in self.histories)
        model.embedding.register_forward_pre_hook(lambda *_: self.laps(BATCH))
        model.encoder.register_forward_hook(lambda *_: self.laps(ENCODER))

    @property
    def flops(self) -> float:
        """FLOPs of a step."""
        lengths = np.array([1 + len(items) for items, _, _ in self.histories])
        num_outputs = 1 + TRAINING.num_negatives
        return step_flops(self.model.config, lengths, num_targets=self.num_targets, num_outputs=num_outputs)

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
        loss, num_targets = self.model.loss(batch, negatives=negatives, positive_mask=(1 << NUM_ACTIONS) - 1)
        value = float(loss.detach()) / num_targets
        self.laps(LOSS)
        self.optimizer.zero_grad()
        loss.backward()
        self.laps(BACKWARD)
        self.optimizer.step(num_targets)
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
        model = kind(
            config,
            build_encoder(config),
            num_rows=FIRST_ITEM + NUM_ITEMS,
            first_item=FIRST_ITEM,
            num_actions=NUM_ACTIONS,
        )
        return Step(model)


def rows(name: str, step: Step, ours: dict[str, float]) -> list[Row]:
    """Return the rows of our own step: tokens a second, share of the peak, milliseconds of parts, shares of ops."""
    found = [row(f"{name} step, ours, tokens a second", 1e3 * step.num_tokens / ours[""], "1/s")]
    utilisation = 100 * step.flops / (ours[""] / 1e3) / (1e9 * peak_gflops())
    found.append(row(f"{name} step, ours, FLOPs utilisation", utilisation, "%", "torch.mm"))
    found += [row(f"{name} step, ours{_part(part)}", ms, "ms") for part, ms in ours.items()]
    found += [row(f"{name} step, share of {part}", share, "%", "its step") for part, share in step.shares().items()]
    return found


def row(name: str, value: float | None, unit: str, against: str | None = None, target: float | None = None) -> Row:
    """Return a row of a benchmark; value None: nothing was measured, `against` says why."""
    return {"name": name, "value": value, "unit": unit, "against": against, "target": target}


def _part(name: str) -> str:
    return f": {name}" if name else ""

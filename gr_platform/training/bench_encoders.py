"""`gr bench encoders`: HSTU against Transformer++ of equal size, time and memory as sequences grow.

Invariant: variants have one width, number of layers and heads, and read the same token vectors; each is measured at
each length in a process of its own, on one thread, so that its peak RSS is its own. Encoders alone: no embedding, no
loss.

Size is meant in both ways: Transformer++ with its usual feed-forward of 8/3 d has 2.4 times the weights of a layer of
HSTU; with one of d/3 it has as many. A step is a forward and a backward pass of all tokens, dropout as in training;
inference is the row of each user's last token. Of time, HSTU's own includes the time buckets of the batch.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import psutil
import torch
from torch import Tensor

from gr_platform import settings
from gr_platform.models.build import build_encoder
from gr_platform.models.config import ModelConfig
from gr_platform.processes import peak_rss_bytes
from gr_platform.training import flops
from gr_platform.training.bench_step import GAP_S, START_MS, Row, row
from gr_platform.training.memory import keep_freed_memory
from gr_platform.training.seeds import generator
from kernels import JaggedTimes
from kernels.hstu_attention.bench import peak_gflops

WIDTH, NUM_HEADS, NUM_LAYERS = 256, 4, 2
LENGTHS = (200, 512, 1024, 2048, 4096)
# A batch holds as many users as fit.
BATCH_TOKENS = 8192
HSTU = ModelConfig(
    kind="retrieval",
    embedding_dim=WIDTH,
    num_layers=NUM_LAYERS,
    num_heads=NUM_HEADS,
    qk_dim=WIDTH // NUM_HEADS,
    v_dim=WIDTH // NUM_HEADS,
    max_events=max(LENGTHS),
)
TRANSFORMER = replace(HSTU, encoder="transformer", position_bias=False, time_bias=False, absolute_position=False)
VARIANTS = {
    "HSTU": HSTU,
    "Transformer++": TRANSFORMER,
    "Transformer++ of as many weights": replace(TRANSFORMER, ffn_dim=WIDTH // 3),
}
NUM_THREADS, REPEATS, DEADLINE_S = 1, 3, 300
FIGURES = {"train_ms": ("training step", "ms"), "infer_ms": ("inference", "ms")} | {
    f"{mode}_mb": (f"{what}, peak memory", "MB") for mode, what in (("train", "training step"), ("infer", "inference"))
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A variant at a length: median milliseconds, and how far RSS rose in MB above the process with the model in it."""

    variant: str
    length: int
    num_users: int
    num_parameters: int
    train_ms: float
    infer_ms: float
    train_mb: float
    infer_mb: float
    train_flops: float
    flops_utilisation: float


def run(_: int) -> list[Row]:
    """Return rows {name, value, unit, against, target, variant, length}: ratios to HSTU, then what was measured."""
    found = list(measurements())
    return [*ratio_rows(found), *(each for one in found for each in figure_rows(one))]


def measurements(lengths: tuple[int, ...] = LENGTHS) -> Iterator[Measured]:
    """Yield every variant at every length, the variants of a length one after the other. Raises RuntimeError."""
    for length in lengths:
        for variant in VARIANTS:
            yield measure_apart(variant, length)


def measure_apart(variant: str, length: int) -> Measured:
    """Return what `measure` does in a process of its own. Raises RuntimeError if that fails."""
    command = [sys.executable, "-m", "gr_platform.training.bench_encoders", variant, str(length)]
    done = subprocess.run(
        command, cwd=settings.PROJECT_ROOT, capture_output=True, text=True, check=False, timeout=DEADLINE_S
    )
    if done.returncode:
        raise RuntimeError(f"{variant} at {length} tokens failed: {done.stderr.strip()[-400:]}")
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


def measure(variant: str, length: int, *, batch_tokens: int = BATCH_TOKENS, repeats: int = REPEATS) -> Measured:
    """Return what a variant takes in this process, inference before training, since the peak only ever rises."""
    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(0)
    keep_freed_memory()
    config = VARIANTS[variant]
    encoder = build_encoder(config)
    lengths = np.full(max(1, batch_tokens // length), length)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    x = torch.randn(int(offsets[-1]), config.embedding_dim, requires_grad=True)
    times = _times(len(x))
    jagged = JaggedTimes.of(offsets, times, times)

    def batch() -> JaggedTimes:
        return JaggedTimes.of(offsets, times, times) if config.time_bias else jagged

    def infer() -> None:
        with torch.no_grad():
            encoder(x, batch(), offsets[1:] - 1)

    def train() -> None:
        encoder.zero_grad(set_to_none=True)
        x.grad = None
        encoder(x, batch()).sum().backward()

    _small_call(encoder, x)
    before_mb = psutil.Process().memory_info().rss / 1e6
    encoder.eval()
    infer_ms = _median_ms(infer, repeats)
    infer_mb = peak_rss_bytes() / 1e6 - before_mb
    encoder.train()
    train_ms = _median_ms(train, repeats)
    train_mb = peak_rss_bytes() / 1e6 - before_mb
    work = flops.work_of(lengths, len(x))
    step = flops.PER_STEP * flops.encoder_flops(config, work)
    return Measured(
        variant=variant,
        length=length,
        num_users=len(lengths),
        num_parameters=sum(weight.numel() for weight in encoder.parameters()),
        train_ms=train_ms,
        infer_ms=infer_ms,
        train_mb=train_mb,
        infer_mb=infer_mb,
        train_flops=step,
        flops_utilisation=step / (train_ms / 1e3) / (1e9 * peak_gflops()),
    )


def _times(num_tokens: int) -> Tensor:
    gaps_s = np.exp(generator(0, "encoders").normal(np.log(GAP_S), 2.0, num_tokens)).astype(np.int64)
    return torch.from_numpy(START_MS + 1_000 * np.cumsum(gaps_s))


def _small_call(encoder: torch.nn.Module, x: Tensor) -> None:
    """Have libraries make what they keep from their first call on, so that it is not taken for the encoder's."""
    few = min(64, len(x))
    times = _times(few)
    encoder(x[:few], JaggedTimes.of(torch.tensor([0, few]), times, times)).sum().backward()


def _median_ms(work: Callable[[], None], repeats: int) -> float:
    """Return the median milliseconds of `work` after a first run that is not counted."""
    seconds = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(seconds[1:])


def figure_rows(one: Measured) -> list[Row]:
    """Return the rows of one variant at one length."""
    at = f"{one.variant}, {one.num_users} users of {one.length}"
    found = [row(f"{what}, {at}", getattr(one, key), unit) for key, (what, unit) in FIGURES.items()]
    found.append(row(f"training step, FLOPs utilisation, {at}", 100 * one.flops_utilisation, "%", "torch.mm"))
    return [each | _place(one, each["name"].removesuffix(f", {at}")) for each in found]


def ratio_rows(found: list[Measured]) -> list[Row]:
    """Return for each length and figure what another variant takes over what HSTU takes."""
    by = {(one.variant, one.length): one for one in found}
    rows = []
    for one in found:
        hstu = by["HSTU", one.length]
        for key, (what, _) in FIGURES.items():
            if one is not hstu:
                name = f"{what}: {one.variant} / HSTU"
                ratio = getattr(one, key) / max(getattr(hstu, key), 1e-9)
                told = row(f"{name}, {one.num_users} users of {one.length}", ratio, "x", "same run")
                rows.append(told | _place(one, f"{what}, / HSTU"))
    return rows


def _place(one: Measured, what: str) -> Row:
    """Return where a row stands in a table by length."""
    return {"variant": one.variant, "length": one.length, "num_parameters": one.num_parameters, "what": what}


def main() -> None:
    """Print what a variant takes at a length as JSON; both are the arguments."""
    print(json.dumps(asdict(measure(sys.argv[1], int(sys.argv[2])))))


if __name__ == "__main__":
    main()

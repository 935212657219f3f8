"""The processes of one run: each has a copy of the model and reads its share of every step.

Invariant: after a step all processes hold the same weights, since they add up the gradients of summed losses in one
all-reduce and start from the same ones. The first process alone writes and validates; the others hear what it found.

DistributedDataParallel is not used: it means over processes, but targets are not spread evenly; it wants a `forward`
whose every weight has a gradient, and a share of a step may hold no target.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gr_platform import settings
from gr_platform.errors import UserError

T = TypeVar("T")
# The others wait while the first process validates; one that dies is noticed at once.
LONGEST_WAIT = timedelta(hours=6)


class LostProcess(UserError):
    """A process of the run ended or cannot be reached; the last checkpoint is untouched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process's place among those of a run; the methods are calls that all of them make together.

    device: where its model is, `cpu`, `cuda` or `cuda:<number>`.
    """

    rank: int = 0
    num_ranks: int = 1
    device: str = "cpu"

    @staticmethod
    def alone() -> "Ranks":
        """Return the place of a process that trains by itself. Raises UserError as `settings.device` does."""
        return Ranks(device=settings.device())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, validates and shows progress."""
        return self.rank == 0

    def add_up(self, weights: Sequence[Tensor], figures: Sequence[float]) -> list[float]:
        """Return the sums of figures over processes, and let the gradients be theirs, zero where none had one.

        Figures travel in fp32 with the gradients, so counts are exact up to 2**24.
        """
        if self.num_ranks == 1:
            return list(figures)
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        extra = torch.tensor(figures, dtype=torch.float32, device=self.device)
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), extra])
        with _or_lost():
            dist.all_reduce(flat)
        parts = flat.split([*(weight.numel() for weight in weights), len(figures)])
        for weight, part in zip(weights, parts, strict=False):
            weight.grad = part.view_as(weight)
        summed: list[float] = parts[-1].tolist()
        return summed

    def gather(self, counts: Sequence[int]) -> np.ndarray:
        """Return the counts of every process, int64 [len(counts), processes]."""
        if self.num_ranks == 1:
            return np.array(counts, np.int64)[:, None]
        own = torch.tensor(counts, dtype=torch.int64, device=self.device)
        found = [torch.empty_like(own) for _ in range(self.num_ranks)]
        with _or_lost():
            dist.all_gather(found, own)
        return torch.stack(found, 1).cpu().numpy()

    def hear(self, said: T | None) -> T:
        """Return what the first process says, a JSON-able value; the others pass None."""
        if self.num_ranks == 1:
            return said  # type: ignore[return-value]
        text = json.dumps(said).encode() if self.first else b""
        length = torch.tensor([len(text)], device=self.device)
        with _or_lost():
            dist.broadcast(length, 0)
            sent = torch.empty(int(length), dtype=torch.uint8, device=self.device)
            if self.first:
                sent.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
            dist.broadcast(sent, 0)
        heard: T = json.loads(bytes(sent.cpu().numpy()))
        return heard


@contextmanager
def joined() -> Iterator[Ranks]:
    """Yield this process's place in the run that torchrun started: over gloo, or over nccl with a GPU of its own.

    Raises UserError outside torchrun, for fewer GPUs than processes, and as `settings.device` does.
    """
    if "LOCAL_RANK" not in os.environ:
        raise UserError("this module is run by torchrun; start it with python -m torch.distributed.run")
    device, backend = settings.device(), "gloo"
    if device == "cuda":
        device, backend = _own_gpu(int(os.environ["LOCAL_RANK"])), "nccl"
        # Before anything is sent: nccl talks from the GPU that is the current one.
        torch.cuda.set_device(device)
    dist.init_process_group(backend=backend, timeout=LONGEST_WAIT)
    try:
        yield Ranks(rank=dist.get_rank(), num_ranks=dist.get_world_size(), device=device)
    finally:
        dist.destroy_process_group()


def require_room(num_ranks: int) -> None:
    """Raise UserError for more processes than there are GPUs or, without one, cores that this process may use."""
    if settings.device() == "cuda":
        _own_gpu(num_ranks - 1)
    elif num_ranks > (cores := settings.num_cores()):
        raise UserError(
            f"{num_ranks} processes would share {cores} usable cores and wait for each other; start at most {cores}"
        )


def _own_gpu(local_rank: int) -> str:
    found = torch.cuda.device_count()
    if local_rank >= found:
        raise UserError(
            f"torch sees fewer GPUs ({found}) than there are processes; start at most {found}, or set GR_DEVICE to cpu"
        )
    return f"cuda:{local_rank}"


@contextmanager
def _or_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(
            f"another process of the run is gone ({str(error).splitlines()[0][:120]}); the last checkpoint is kept: "
            "run the same command again to go on from it"
        ) from error

"""One epoch: steps over the reader's batches, then validation; a checkpoint at its end and every few minutes inside.

Invariant: a step's batches, negatives and dropout masks are functions of (seed, step), never of what ran before in the
process; so are those of its parts and processes.
"""

import itertools
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.evaluation.ranks import NonFiniteScores
from gr_platform.models.batch import EventBatch
from gr_platform.models.build import Model
from gr_platform.models.config import Recipe, TrainingConfig
from gr_platform.sequences.reader import Batch, Reader
from gr_platform.storage import shown
from gr_platform.training import checkpoint
from gr_platform.training.batches import training_batch
from gr_platform.training.checkpoint import Progress, Sums, copy_state
from gr_platform.training.flops import step_flops
from gr_platform.training.objectives import Objective
from gr_platform.training.optim import Optimizer
from gr_platform.training.ranks import Ranks
from gr_platform.training.seeds import torch_seed
from gr_platform.training.shown import bar, say_epoch

logger = logging.getLogger(__name__)

BAD_BATCH = "bad_batch.json"
LOWER = "lower learning_rate in a recipe of your own (docs/models.md)"
T = TypeVar("T")


class NonFiniteLoss(UserError):
    """The loss or a weight became NaN or infinite; the last checkpoint is untouched."""


class Epoch:
    """One pass over the users followed by validation; holds what stays the same from epoch to epoch.

    of: what the run is a function of (checkpoint.py).
    """

    def __init__(
        self,
        reader: Reader,
        recipe: Recipe,
        objective: Objective,
        folder: Path,
        *,
        ranks: Ranks,
        of: dict[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        self.reader, self.recipe, self.objective, self.folder = reader, recipe, objective, folder
        self.ranks, self.of, self.progress = ranks, of, progress and ranks.first

    def __call__(self, model: Model, optimizer: Optimizer, done: Progress) -> None:
        """Train what is left of the epoch at `done.cursor`, validate where the phase does, record both, save."""
        epoch, first = self.reader.position(done.cursor)
        self._pass(model, optimizer, done, epoch, first)
        sums, done.sums = done.sums, Sums()
        entry = {
            "phase": done.phase,
            "epoch": epoch,
            "loss": sums.loss / max(1, sums.num_targets),
            "num_targets": sums.num_targets,
            "tokens": sums.tokens,
        }
        if done.phase == "validation":
            with optimizer.averaged():
                figures, goal = self._verdict(model, epoch)
                if not done.goals or goal > done.goals[done.best_epoch]:
                    done.best_epoch, done.best = epoch, copy_state(model)
            done.goals.append(goal)
            entry |= figures
        done.curves.append(entry)
        done.seconds.append(sums.seconds)
        done.flops.append(sums.flops)
        done.cursor = self.reader.cursor(epoch + 1)
        logger.info("seconds=%.1f %s", sums.seconds, " ".join(f"{name}={value}" for name, value in entry.items()))
        self._save(model, optimizer, done)
        if self.progress:
            say_epoch(self._label(done, epoch), entry, sums.seconds)

    def _label(self, done: Progress, epoch: int) -> str:
        last = self.recipe.training.max_epochs if done.phase == "validation" else done.best_epoch + 1
        return f"{self.recipe.model.kind} {done.phase} epoch {epoch + 1}/{last}"

    def _pass(self, model: Model, optimizer: Optimizer, done: Progress, epoch: int, first: int) -> None:
        """Take the epoch's steps from its batch number `first` on; a step is `accumulate` batches of each process."""
        training = self.recipe.training
        num_steps = math.ceil(self.reader.num_batches(epoch) / training.accumulate)
        steps = bar(self._label(done, epoch), num_steps, wanted=self.progress)
        model.train()
        before, begun = done.sums, time.monotonic()
        saved = begun
        with closing(self.reader.read(epoch, first)) as batches, steps:
            steps.update(first // training.accumulate)
            for number, parts in enumerate(grouped(batches, training.accumulate), first // training.accumulate):
                figures = self._step(model, optimizer, parts, epoch, (epoch + number / num_steps) / training.max_epochs)
                done.sums = Sums(
                    loss=done.sums.loss + figures[0],
                    num_targets=done.sums.num_targets + int(figures[1]),
                    tokens=done.sums.tokens + int(figures[2]),
                    flops=done.sums.flops + figures[3],
                    seconds=before.seconds + time.monotonic() - begun,
                )
                speed = (done.sums.tokens - before.tokens) / (done.sums.seconds - before.seconds)
                loss = done.sums.loss / max(1, done.sums.num_targets)
                steps.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
                steps.update()
                if time.monotonic() - saved >= checkpoint.CHECKPOINT_SECONDS and number + 1 < num_steps:
                    done.cursor = self.reader.cursor(epoch, (number + 1) * training.accumulate)
                    self._save(model, optimizer, done)
                    saved = time.monotonic()

    def _step(self, model: Model, optimizer: Optimizer, parts: list[Batch], epoch: int, share: float) -> list[float]:
        """Take one step on this process's parts of it and return the whole step's loss, targets, tokens and FLOPs."""
        training, ranks, step = self.recipe.training, self.ranks, optimizer.num_steps
        batches = [training_batch(part, self.reader.dataset) for part in parts]
        counts = ranks.gather([self.objective.num_targets(batch) for batch in batches])
        before = (np.cumsum(counts) - counts.ravel()).reshape(counts.shape)[:, ranks.rank].tolist()
        figures = [0.0, 0.0, 0.0, 0.0]
        optimizer.zero_grad()
        for number, batch in enumerate(batches):
            place = number * ranks.num_ranks + ranks.rank
            torch.manual_seed(torch_seed(training.seed, "dropout", step, place))
            with autocast(training, ranks.device):
                loss, num_targets = self.objective.loss(model, batch, step, before[number])
            loss.backward()
            mine = (float(loss.detach()), num_targets, *self._work(batch, num_targets))
            figures = [total + part for total, part in zip(figures, mine, strict=True)]
        figures = ranks.add_up(optimizer.weights, figures)
        if not math.isfinite(figures[0]):
            raise self._broken(figures[0], epoch, step, parts)
        optimizer.step(int(figures[1]), share)
        return figures

    def _verdict(self, model: Model, epoch: int) -> tuple[dict[str, Any], float]:
        """Return the validation figures and the goal, which the first process finds for all of them."""
        said: tuple[Any, float | None] | None = None
        if self.ranks.first:
            try:
                said = self.objective.validate(model)
            except NonFiniteScores as error:
                said = f"validation after epoch {epoch}: {error}", None
        figures, goal = self.ranks.hear(said)
        if goal is None:
            raise NonFiniteLoss(f"{figures}; the last checkpoint is kept in {shown(self.folder)}")
        return figures, goal

    def _save(self, model: Model, optimizer: Optimizer, done: Progress) -> None:
        """Write a checkpoint. Raises NonFiniteLoss instead if a weight is NaN or infinite."""
        if not self.ranks.first:
            return
        for name, weight in model.named_parameters():
            if not bool(torch.isfinite(weight).all()):
                raise NonFiniteLoss(
                    f"{name} became NaN or infinite in {done.phase} before step {optimizer.num_steps}; the last "
                    f"checkpoint is kept in {shown(self.folder)}; {LOWER}"
                )
        checkpoint.save_checkpoint(self.folder, model, optimizer, done, self.of)

    def _work(self, batch: EventBatch, num_targets: int) -> tuple[int, float]:
        """Return the tokens of a batch and the FLOPs of training on it."""
        config, num_outputs = self.recipe.model, self.objective.num_outputs
        lengths = np.diff(batch.layout(config.kind).offsets)
        num_actions = len(self.reader.dataset.declaration.actions)
        flops = step_flops(config, lengths, num_targets=num_targets, num_outputs=num_outputs, num_actions=num_actions)
        return int(lengths.sum()), flops

    def _broken(self, loss: float, epoch: int, step: int, parts: list[Batch]) -> NonFiniteLoss:
        users = [str(user) for part in parts for user in self.reader.dataset.ids_of(part.rows).to_pylist()]
        saved = {"epoch": epoch, "step": step, "loss": str(loss), "user_ids": users}
        name = BAD_BATCH if self.ranks.num_ranks == 1 else f"rank{self.ranks.rank}_{BAD_BATCH}"
        storage.write_text(self.folder / name, json.dumps(saved, indent=1) + "\n")
        return NonFiniteLoss(
            f"the loss is {loss} at epoch {epoch}, step {step}; the batch's users stand in "
            f"{shown(self.folder)}/{name}, the last checkpoint is kept there; {LOWER}"
        )


def autocast(training: TrainingConfig, device: str) -> torch.autocast:
    """Return what a loss is computed inside of: weights, optimiser and validation stay in fp32."""
    wanted = {"auto": device != "cpu", "bf16": True, "fp32": False}[training.precision]
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=wanted)


def forked(device: str) -> AbstractContextManager[None]:
    """Return a context after which torch's generators, the CPU's and the device's, go on as if nothing was drawn."""
    return torch.random.fork_rng([] if device == "cpu" else [device], device_type=torch.device(device).type)


def grouped(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` values, fewer in the last one."""
    iterator = iter(values)
    while group := list(itertools.islice(iterator, size)):
        yield group

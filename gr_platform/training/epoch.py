"""One epoch: a pass over the reader's batches, then validation.

Invariant: an epoch's batches, negatives and dropout masks are functions of (seed, epoch or step), never of what ran
before in the process.
"""

import json
import logging
import math
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gr_platform import storage
from gr_platform.evaluation.ranks import NonFiniteScores
from gr_platform.models.batch import EventBatch
from gr_platform.models.build import Model
from gr_platform.models.config import Recipe
from gr_platform.sequences.reader import Batch, Reader
from gr_platform.training.batches import training_batch
from gr_platform.training.checkpoint import Progress, copy_state
from gr_platform.training.objectives import Objective
from gr_platform.training.seeds import torch_seed

logger = logging.getLogger(__name__)

BAD_BATCH = "bad_batch.json"


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the checkpoint of the last whole epoch is untouched."""


class Epoch:
    """One pass over the users followed by validation; holds what stays the same from epoch to epoch."""

    def __init__(
        self,
        reader: Reader,
        recipe: Recipe,
        objective: Objective,
        checkpoint: Path,
        progress: bool,
    ) -> None:
        self.reader, self.recipe, self.objective = reader, recipe, objective
        self.checkpoint, self.progress = checkpoint, progress
        self.num_steps = reader.num_batches(0)

    def __call__(self, model: Model, optimizer: torch.optim.Optimizer, done: Progress) -> None:
        """Train one epoch, validate, and record both in `done`."""
        epoch, started = done.num_epochs, time.monotonic()
        entry = self._pass(model, optimizer, epoch)
        seconds = time.monotonic() - started
        try:
            figures, goal = self.objective.validate(model)
        except NonFiniteScores as error:
            raise NonFiniteLoss(
                f"validation after epoch {epoch}: {error}; the state after {epoch} whole epochs is kept in "
                f"{self.checkpoint.name}"
            ) from None
        done.curves.append({"epoch": epoch, **entry, **figures})
        done.goals.append(goal)
        done.seconds.append(seconds)
        done.cursor = self.reader.cursor(epoch + 1)
        if epoch == 0 or goal > done.goals[done.best_epoch]:
            done.best_epoch, done.best = epoch, copy_state(model)
        logger.info(
            "epoch=%d seconds=%.1f %s", epoch, seconds, " ".join(f"{k}={v}" for k, v in (entry | figures).items())
        )

    def _pass(self, model: Model, optimizer: torch.optim.Optimizer, epoch: int) -> dict[str, Any]:
        training = self.recipe.training
        torch.manual_seed(torch_seed(training.seed, "dropout", epoch))
        model.train()
        total, num_targets, num_tokens, started = 0.0, 0, 0, time.monotonic()
        label = f"{self.recipe.model.kind} epoch {epoch + 1}/{training.max_epochs}"
        disable = None if self.progress else True
        with (
            closing(self.reader.read(epoch)) as batches,
            tqdm(batches, total=self.num_steps, desc=label, disable=disable, leave=False) as bar,
        ):
            for index, read in enumerate(bar):
                batch = training_batch(read)
                loss, targets = self.objective.loss(model, batch, epoch * self.num_steps + index)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise self._broken(epoch, index, value, read)
                if targets:
                    optimizer.zero_grad(set_to_none=True)
                    (loss / targets).backward()
                    optimizer.step()
                total, num_targets = total + value, num_targets + targets
                num_tokens += self._tokens(batch)
                speed = num_tokens / (time.monotonic() - started)
                bar.set_postfix_str(f"loss {total / max(1, num_targets):.4f}, {speed:,.0f} tokens/s", refresh=False)
        return {"loss": total / max(1, num_targets), "num_targets": num_targets, "tokens": num_tokens}

    def _tokens(self, batch: EventBatch) -> int:
        per_event = 2 if self.recipe.model.kind == "ranking" else 1
        return len(batch) + per_event * len(batch.items)

    def _broken(self, epoch: int, step: int, value: float, read: Batch) -> NonFiniteLoss:
        users = [str(user) for user in self.reader.dataset.ids_of(read.rows).to_pylist()]
        saved = {"epoch": epoch, "step": step, "loss": str(value), "user_ids": users}
        storage.write_text(self.checkpoint / BAD_BATCH, json.dumps(saved, indent=1) + "\n")
        return NonFiniteLoss(
            f"the loss is {value} at epoch {epoch}, step {step}; the batch's users stand in {self.checkpoint.name}/"
            f"{BAD_BATCH}, the state after {epoch} whole epochs is kept there; lower the recipe's learning_rate"
        )

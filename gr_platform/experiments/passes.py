"""Training over batches that an experiment forms itself: a stream read once, or one example a target.

Invariant: batch number s is a function of (cell, s) alone and a segment's dropout of (seed, segment), so a killed pass
goes on from its last segment to the same weights.

Legend: R records or examples of a batch, s steps.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from gr_platform import settings
from gr_platform.evaluation.protocols import rank_by_model, retrieval_facts
from gr_platform.experiments import drifting_stream
from gr_platform.experiments.data import STREAMS
from gr_platform.experiments.run import Work
from gr_platform.models.build import build_model
from gr_platform.models.config import Recipe
from gr_platform.models.retrieval import RetrievalModel
from gr_platform.sequences.dataset import Jagged, SequenceDataset
from gr_platform.sequences.reader import Batch
from gr_platform.sequences.window import window_starts
from gr_platform.training.batches import training_batch, training_reader
from gr_platform.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from gr_platform.training.epoch import autocast, forked
from gr_platform.training.flops import PFLOPS_DAY, step_flops
from gr_platform.training.memory import keep_freed_memory
from gr_platform.training.objectives import RetrievalObjective
from gr_platform.training.optim import Optimizer
from gr_platform.training.phases import training_users
from gr_platform.training.seeds import generator, torch_seed


class Batches(ABC):
    """The batches of a pass, by number."""

    def __init__(self, dataset: SequenceDataset, recipe: Recipe) -> None:
        self.dataset, self.recipe = dataset, recipe

    @abstractmethod
    def __call__(self, step: int) -> Batch:
        """Return batch number `step`."""


class InOrder(Batches):
    """The first records of a stream, batch_size a step, whole and in order."""

    def __call__(self, step: int) -> Batch:
        size = self.recipe.training.batch_size
        rows = np.arange(step * size, (step + 1) * size)
        span = self.dataset.gather(rows, np.zeros(size, np.int64), self.dataset.lengths[rows])
        return Batch(rows=rows, events=span, targets=span)


class Generative(Batches):
    """Whole users, each of whose events is a target: what training does, epoch after epoch."""

    def __init__(self, dataset: SequenceDataset, recipe: Recipe) -> None:
        super().__init__(dataset, recipe)
        self.reader = training_reader(dataset, *training_users(dataset), recipe)
        self.a_epoch = self.reader.num_batches(0)

    def __call__(self, step: int) -> Batch:
        epoch, index = divmod(step, self.a_epoch)
        plan = self.reader.plan(epoch)
        return self.reader.form(plan.order[plan.begins[index] : plan.ends[index]], epoch)


class Impressions(Batches):
    """Examples of one target each, drawn evenly from all training events: the history before it, then the target."""

    def __init__(self, dataset: SequenceDataset, recipe: Recipe) -> None:
        super().__init__(dataset, recipe)
        self.rows, ends = training_users(dataset)
        self.totals = np.cumsum(ends)

    def __call__(self, step: int) -> Batch:
        training, model = self.recipe.training, self.recipe.model
        drawn = generator(training.seed, "impressions", step).integers(self.totals[-1], size=training.batch_size)
        at = np.searchsorted(self.totals, drawn, side="right")
        rows, positions = self.rows[at], drawn - np.concatenate([[0], self.totals])[at]
        span = self.dataset.gather(rows, window_starts(positions, model.max_events, model.chunk), positions + 1)
        return Batch(rows=rows, events=span, targets=last_alone(span))


EXAMPLES: dict[str, type[Batches]] = {"generative": Generative, "impressions": Impressions}


def last_alone(span: Jagged) -> Jagged:
    """Return the span with the actions of all but each row's last exposure taken away: what is no target then."""
    actions = np.zeros_like(span.actions)
    last = span.offsets[1:] - 1
    actions[last] = span.actions[last]
    return Jagged(span.offsets, span.items, actions, span.times, context=span.context)


def stream(work: Work) -> dict[str, Any]:
    """Return the test figures of a model that read the first records of a stream once, in order.

    options: segment, steps between checkpoints. Nothing is chosen, so there is no validation.
    """
    recipe, config = _recipe(work), STREAMS[work.cell.dataset]
    split = drifting_stream.holdout(config)
    num_steps = int(np.count_nonzero(split.ends)) // recipe.training.batch_size
    one_pass = Pass(work, InOrder(work.sequences, recipe), work.cell.options["segment"])
    model, done = one_pass.run(num_steps, lambda _: {})
    ranked = rank_by_model(model, work.sequences, split, chunk=1)
    figures = {name: v for name, v in retrieval_facts(ranked).items() if isinstance(v, int | float)}
    return {"figures": figures | one_pass.spent(done), "curve": done.curves}


def examples(work: Work) -> dict[str, Any]:
    """Return the cost of a training and its validation figures segment by segment.

    options: examples (generative or impressions), num_steps, segment, max_users of each validation. The quality is the
    best validation figure: this experiment compares costs and reads no test event.
    """
    recipe, options = _recipe(work), work.cell.options
    batches = EXAMPLES[options["examples"]](work.sequences, recipe)

    def validate(model: RetrievalModel) -> dict[str, float]:
        facts = retrieval_facts(rank_by_model(model, work.sequences, "validation", max_users=options["max_users"]))
        return {name: facts[name] for name in ("hr_at_10", "ndcg_at_10")}

    one_pass = Pass(work, batches, options["segment"])
    _, done = one_pass.run(options["num_steps"], validate)
    best = max(done.curves, key=lambda entry: entry["ndcg_at_10"])
    figures = {f"validation_{name}": best[name] for name in ("hr_at_10", "ndcg_at_10")}
    return {"figures": figures | one_pass.spent(done), "curve": done.curves}


class Pass:
    """A training over given batches, validated and checkpointed every `segment` steps."""

    def __init__(self, work: Work, batches: Batches, segment: int) -> None:
        self.work, self.batches, self.segment = work, batches, segment
        self.dataset, self.recipe = batches.dataset, batches.recipe
        self.device = settings.device()
        self.objective = RetrievalObjective(self.dataset, self.recipe)
        training = self.recipe.training
        catalogue = self.dataset.vocabulary.num_items
        self.num_outputs = catalogue if training.negatives == "all" else training.num_negatives + 1

    def run(
        self, num_steps: int, validate: Callable[[RetrievalModel], dict[str, float]]
    ) -> tuple[RetrievalModel, Progress]:
        """Return the model after the last step, in eval mode, and the figures of every segment.

        An entry of the curve: step, loss, and what was spent so far: seconds, tokens, num_targets, train_flops.
        """
        torch.set_num_threads(settings.num_threads())
        keep_freed_memory()
        with forked(self.device):
            model = self._model().to(self.device)
            optimizer = Optimizer(model, self.recipe.training)
            saved = load_checkpoint(self.work.checkpoint)
            done = saved.restore(model, optimizer) if saved else Progress()
            while (first := done.curves[-1]["step"] if done.curves else 0) < num_steps:
                steps = range(first, min(first + self.segment, num_steps))
                entry = self._segment(model, optimizer, steps, num_steps, done)
                with optimizer.averaged():
                    done.curves.append(entry | validate(model.eval()))
                save_checkpoint(self.work.checkpoint, model, optimizer, done)
        return model.eval(), done

    def spent(self, done: Progress) -> dict[str, Any]:
        """Return the cost of the whole pass as figures."""
        last = done.curves[-1]
        named = {"train_seconds": "seconds", "train_tokens": "tokens", "num_targets": "num_targets"}
        figures = {name: last[key] for name, key in named.items()} | {"steps": last["step"]}
        return figures | {"train_flops": last["train_flops"], "pflops_days": last["train_flops"] / PFLOPS_DAY}

    def _model(self) -> RetrievalModel:
        torch.manual_seed(torch_seed(self.recipe.training.seed, "weights"))
        declaration = self.dataset.declaration
        model = build_model(
            self.recipe.model,
            num_rows=self.dataset.vocabulary.num_rows,
            num_actions=len(declaration.actions),
            tasks=list(declaration.tasks),
        )
        assert isinstance(model, RetrievalModel)
        return model

    def _segment(
        self, model: RetrievalModel, optimizer: Optimizer, steps: range, num_steps: int, done: Progress
    ) -> dict[str, Any]:
        torch.manual_seed(torch_seed(self.recipe.training.seed, "dropout", steps.start))
        model.train()
        before = done.curves[-1] if done.curves else {"seconds": 0.0, "tokens": 0, "num_targets": 0, "train_flops": 0.0}
        total, num_targets, num_tokens, flops, started = 0.0, 0, 0, 0.0, time.monotonic()
        label, disable = f"{self.work.cell.name} to step {steps.stop}/{num_steps}", None if self.work.progress else True
        for step in tqdm(steps, desc=label, disable=disable, leave=False):
            batch = training_batch(self.batches(step))
            with autocast(self.recipe.training, self.device):
                loss, targets = self.objective.loss(model, batch, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(max(1, targets), step / num_steps)
            total, num_targets = total + float(loss.detach()), num_targets + targets
            lengths = np.diff(batch.layout("retrieval").offsets)
            num_tokens += int(lengths.sum())
            flops += step_flops(self.recipe.model, lengths, num_targets=targets, num_outputs=self.num_outputs)
        return {
            "step": steps.stop,
            "loss": total / max(1, num_targets),
            "seconds": before["seconds"] + time.monotonic() - started,
            "tokens": before["tokens"] + num_tokens,
            "num_targets": before["num_targets"] + num_targets,
            "train_flops": before["train_flops"] + flops,
        }


def _recipe(work: Work) -> Recipe:
    if work.cell.recipe is None:
        raise ValueError(f"cell {work.cell.name} has no recipe to train")
    return work.cell.recipe

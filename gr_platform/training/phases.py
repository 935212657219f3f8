"""The one or two trainings of a run: for a choice of the number of epochs, and again on all that may be trained on.

Invariant: the second one reads no more than the test exposures leave, starts from the weights that the first started
from, and takes as many epochs as the first took up to its best: the same schedule, the same draws.
"""

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from gr_platform.errors import UserError
from gr_platform.models.build import Model, build_model
from gr_platform.models.config import Recipe
from gr_platform.models.hstu import HSTU
from gr_platform.models.ranking import RankingModel
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.featured import FeaturedDataset
from gr_platform.sequences.splits import MIN_LENGTH, Holdout, leave_one_out, newest_time, require_trained_before
from gr_platform.training.batches import training_reader
from gr_platform.training.calibration import calibrate
from gr_platform.training.checkpoint import PhaseName, Progress, Saved, State, copy_state, load_checkpoint
from gr_platform.training.epoch import Epoch
from gr_platform.training.objectives import objective_of
from gr_platform.training.optim import Optimizer
from gr_platform.training.ranks import Ranks
from gr_platform.training.seeds import torch_seed
from gr_platform.training.shown import say
from gr_platform.training.warm_start import copy_weights

logger = logging.getLogger(__name__)

MIN_USERS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run ends with: its weights, and which exposures they are of: users' first ends, both int64 [U]."""

    done: Progress
    weights: State
    rows: np.ndarray
    ends: np.ndarray
    num_parameters: int


class Run:
    """A training of a recipe on a data set; of: what it is a function of, for its checkpoint."""

    def __init__(
        self,
        dataset: SequenceDataset,
        recipe: Recipe,
        folder: Path,
        *,
        validation: Holdout | None = None,
        test: Holdout | None = None,
        warm_start: Path | None = None,
        ranks: Ranks,
        progress: bool = True,
    ) -> None:
        if recipe.training.refit and validation is not None and test is None:
            raise ValueError("test is None, must be given with validation for a recipe with refit")
        self.dataset, self.recipe, self.folder, self.warm_start = dataset, recipe, folder, warm_start
        self.ranks, self.progress = ranks, progress
        self.validation = validation or leave_one_out(dataset, "validation")
        self.test = test or leave_one_out(dataset, "test", refit=True)
        self.rows, self.ends = training_users(dataset, self.validation)
        self.objective = objective_of(dataset, recipe, self.validation)
        self.shape: dict[str, Any] = {
            "num_rows": dataset.vocabulary.num_rows,
            "num_actions": len(dataset.declaration.actions),
            "tasks": list(dataset.declaration.tasks),
        }
        self.of: dict[str, Any] = {
            "recipe": recipe.to_json(),
            "sequences": dataset.digest,
            "vocabulary": dataset.vocabulary.digest,
            "shape": self.shape,
            "num_processes": ranks.num_ranks,
            "features": dataset.features_digest if isinstance(dataset, FeaturedDataset) else "",
            "warm_start": None if warm_start is None else warm_start.name,
        }

    def __call__(self) -> Outcome:
        """Train, from the checkpoint on if there is one, and return what came of it."""
        saved = load_checkpoint(self.folder, self.of)
        done = Progress() if saved is None else saved.progress
        training = self.recipe.training
        if done.phase == "validation":
            self._train("validation", self.rows, self.ends, done, saved, training.max_epochs)
            saved = None
        chosen = self._chosen(done)
        if not training.refit:
            return self._outcome(done, chosen, self.rows, self.ends)
        rows, ends = training_users(self.dataset, self.test)
        model, optimizer = self._train("refit", rows, ends, done, saved, done.best_epoch + 1)
        if isinstance(model, RankingModel) and isinstance(chosen, RankingModel):
            # Fitted where nothing was trained on: a refit leaves no such place.
            model.calibration.load_state_dict(chosen.calibration.state_dict())
        with optimizer.averaged():
            return self._outcome(done, model, rows, ends)

    def _train(
        self, phase: PhaseName, rows: np.ndarray, ends: np.ndarray, done: Progress, saved: Saved | None, epochs: int
    ) -> tuple[Model, Optimizer]:
        """Train users' first `ends` exposures for at most so many epochs; go on from `saved` where there is one."""
        ranks, training = self.ranks, self.recipe.training
        place = {"rank": ranks.rank, "num_ranks": ranks.num_ranks}
        reader = training_reader(self.dataset, rows, ends, self.recipe, **place)
        model = self._model().to(ranks.device)
        optimizer = Optimizer(model, training)
        if saved is not None:
            saved.restore(model, optimizer)
            if self.progress and ranks.first and not finished(done, epochs, training.patience):
                say(f"{model.config.kind} {phase} goes on from epoch {done.cursor['epoch'] + 1}/{epochs}")
        else:
            done.phase, done.cursor = phase, reader.cursor(0)
        if training.compile:
            compile_encoder(model, ranks.device)
        epoch = Epoch(
            reader,
            self.recipe,
            self.objective,
            self.folder,
            ranks=ranks,
            of=self.of,
            progress=self.progress,
        )
        logger.info(
            "train kind=%s phase=%s users=%d epochs_done=%d", model.config.kind, phase, len(rows), done.num_epochs
        )
        while not finished(done, epochs, training.patience):
            epoch(model, optimizer, done)
        return model, optimizer

    def _model(self) -> Model:
        """Return the model that both phases start from; of items it knows what was said before the held-out part."""
        torch.manual_seed(torch_seed(self.recipe.training.seed, "weights"))
        config, dataset, features = self.recipe.model, self.dataset, None
        if isinstance(dataset, FeaturedDataset):
            features = dataset.feature_tables(config, newest_time(dataset, self.validation.ends))
        model = build_model(config, **self.shape, features=features)
        if self.recipe.training.start == "matching":
            cast(HSTU, model.encoder).start_matching()
        if self.warm_start is not None:
            copy_weights(model, self.warm_start, dataset)
        return model

    def _chosen(self, done: Progress) -> Model:
        """Return the best model of the validation phase, its probabilities calibrated on the validation split."""
        model = self._model().to(self.ranks.device)
        model.load_state_dict(done.best)
        if isinstance(model, RankingModel) and self.ranks.first:
            calibrate(model, self.dataset, self.validation)
        return model

    def _outcome(self, done: Progress, model: Model, rows: np.ndarray, ends: np.ndarray) -> Outcome:
        num_parameters = sum(weight.numel() for weight in model.parameters())
        return Outcome(done=done, weights=copy_state(model), rows=rows, ends=ends, num_parameters=num_parameters)


def training_users(dataset: SequenceDataset, holdout: Holdout | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of users with 2 or more training exposures and their number of training exposures, int64 [U].

    holdout: what says how many those are; leave-one-out's for validation where None.
    Raises UserError if fewer than MIN_USERS users have the 3 exposures that leave-one-out needs (2 before the window
    of a split by time), RuntimeError if a split by time would train on its window.
    """
    holdout = holdout or leave_one_out(dataset, "validation")
    rows = np.flatnonzero(holdout.ends >= 2)
    if holdout.window is not None:
        require_trained_before(dataset, holdout.ends, holdout.window[0])
        usable, needed = len(rows), "2 or more exposures before the window that is held out"
    else:
        usable, needed = int(np.count_nonzero(dataset.lengths >= MIN_LENGTH)), f"{MIN_LENGTH} or more exposures"
    if usable < MIN_USERS:
        raise UserError(f"only {usable} users have {needed}, training needs {MIN_USERS}; import a longer log")
    if len(rows) == 0:
        raise UserError("no user has 4 or more exposures, so there is nothing to learn from; import a longer log")
    return rows, holdout.ends[rows]


def finished(done: Progress, max_epochs: int, patience: int) -> bool:
    """Return whether the phase's last epoch was reached or, on validation, `patience` epochs brought no better one."""
    if done.num_epochs >= max_epochs:
        return True
    waited = done.num_epochs - done.best_epoch - 1
    return done.phase == "validation" and done.num_epochs > 0 and waited >= patience


def compile_encoder(model: Model, device: str) -> None:
    """Let the model's encoder run through torch.compile; device: as that of `Ranks`.

    On two cores nothing is gained: the ops that take the time are kernels of ours, which it calls as they are. HSTU on
    ML-1M took 209 ms a step instead of 197 after 9 s of compiling; Transformer++, which groups users by length, is
    compiled again and again for a minute or two and then takes its 268 ms.
    Raises UserError where there is no C++ compiler to write code for the CPU with.
    """
    if device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            "the recipe's compile needs a C++ compiler and there is no g++; install one, name it in CXX, or set "
            "compile to false"
        )
    from torch._dynamo import config

    # Else what encoders plan with numpy is traced as if it were torch's, and fails at arrays whose size is data.
    config.trace_numpy = False
    model.encoder.compile(dynamic=True)

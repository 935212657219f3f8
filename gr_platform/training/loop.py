"""Training from sequences to a chosen set of weights, resumable at every epoch.

Invariant: a run that was killed and started again ends with weights bit-equal to those of an uninterrupted one, because
every draw is a function of (seed, epoch or step) and an epoch's whole state is one file.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gr_platform import settings, storage
from gr_platform.errors import UserError
from gr_platform.models.build import MODEL_VERSION, Model, build_model
from gr_platform.models.config import Kind, Recipe, TrainingConfig
from gr_platform.models.recipes import RECIPES, require_recipe
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.splits import train_ends
from gr_platform.training.batches import training_reader
from gr_platform.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from gr_platform.training.epoch import Epoch
from gr_platform.training.load import save_model
from gr_platform.training.memory import keep_freed_memory
from gr_platform.training.objectives import objective_of
from gr_platform.training.seeds import torch_seed

logger = logging.getLogger(__name__)

TRAINER_VERSION = 3
MIN_USERS = 10
ADAM_BETAS = (0.9, 0.98)
CURVES = "curves.json"
TRAINED = "trained.parquet"


def train(
    dataset: SequenceDataset, recipe: Recipe, out: Path, *, checkpoint: Path | None = None, progress: bool = True
) -> dict[str, Any]:
    """Train, write model.safetensors, recipe.json, curves.json and trained.parquet into `out`, and return the facts.

    Resumes from the folder `checkpoint`, which the caller removes once the result is safe; without one,
    `.checkpoint-<name of out>` beside `out` is used and removed at the end.
    Raises UserError if the data set is too small or has nothing to learn, or if the checkpoint belongs to other
    sequences or settings; NonFiniteLoss if training breaks.
    """
    torch.set_num_threads(settings.num_threads())
    keep_freed_memory()
    folder = checkpoint or out.parent / f".checkpoint-{out.name}"
    rows, ends = training_users(dataset)
    reader, objective = training_reader(dataset, rows, ends, recipe), objective_of(dataset, recipe)
    shape = _shape(dataset)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(recipe.training.seed, "weights"))
        model = build_model(recipe.model, **shape)
        optimizer = adamw(model, recipe.training)
        done = load_checkpoint(folder, model, optimizer) or Progress(cursor=reader.cursor(0))
        epoch, _ = reader.position(done.cursor)
        logger.info("train kind=%s users=%d epochs_done=%d", recipe.model.kind, len(rows), epoch)
        epoch_run = Epoch(reader, recipe, objective, folder, progress)
        while not finished(done, recipe.training):
            epoch_run(model, optimizer, done)
            save_checkpoint(folder, model, optimizer, done)
    out.mkdir(parents=True, exist_ok=True)
    save_model(out, recipe, done.best, **shape)
    storage.write_text(out / CURVES, json.dumps(done.curves, indent=1, allow_nan=False) + "\n")
    pq.write_table(pa.table({"row": rows, "num_exposures": ends}), out / TRAINED, compression="zstd")
    if checkpoint is None:
        shutil.rmtree(folder, ignore_errors=True)
    return _facts(dataset, model, done, len(rows))


def adamw(model: Model, training: TrainingConfig) -> torch.optim.AdamW:
    """Return the optimizer of a run."""
    parameters = model.parameters()
    return torch.optim.AdamW(parameters, lr=training.learning_rate, betas=ADAM_BETAS, weight_decay=0.0, fused=True)


def trained_ends(folder: Path, num_users: int) -> np.ndarray:
    """Return how many exposures of each user a run trained on, int64 [U], as its folder records."""
    table = pq.read_table(folder / TRAINED)
    ends = np.zeros(num_users, np.int64)
    ends[table["row"].to_numpy()] = table["num_exposures"].to_numpy()
    return ends


def training_users(dataset: SequenceDataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of users with 2 or more training exposures and their number of training exposures, int64 [U].

    Raises UserError if fewer than MIN_USERS users have the 3 exposures that a held-out target needs.
    """
    lengths = dataset.lengths
    num_usable = int(np.count_nonzero(lengths >= 3))
    if num_usable < MIN_USERS:
        raise UserError(
            f"only {num_usable} users have 3 or more exposures, training needs {MIN_USERS}; import a longer log"
        )
    ends = train_ends(lengths)
    rows = np.flatnonzero(ends >= 2)
    if len(rows) == 0:
        raise UserError("no user has 4 or more exposures, so there is nothing to learn from; import a longer log")
    return rows, ends[rows]


def finished(done: Progress, training: TrainingConfig) -> bool:
    """Return whether the last epoch was reached or `patience` epochs brought no better one."""
    waited = done.num_epochs - done.best_epoch - 1
    return done.num_epochs >= training.max_epochs or (done.num_epochs > 0 and waited >= training.patience)


def train_model(
    home: Path, ds: str, kind: Kind, recipe: Recipe | str = "small", *, progress: bool = True
) -> storage.Result:
    """Return the trained model of the data set's current sequences, training it unless that was done already.

    `recipe` is a recipe or the name of one. The result becomes `runs/<ds>/<kind>_model.current`. A killed run resumes.
    Raises UserError (unknown recipe, too little data) and NonFiniteLoss.
    """
    recipe = named_recipe(recipe, kind)
    dataset = SequenceDataset.open(storage.current(home / "sequences" / ds, "sequences"))
    spec = {
        "recipe": recipe.to_json(),
        "sequences": dataset.digest,
        "model_version": MODEL_VERSION,
        "trainer_version": TRAINER_VERSION,
    }
    runs, name = home / "runs" / ds, f"{kind}_model"
    checkpoint = runs / f".checkpoint-{storage.digest_of(spec)[:16]}"
    result = storage.ensure(
        runs, name, spec, lambda folder: train(dataset, recipe, folder, checkpoint=checkpoint, progress=progress)
    )
    storage.point(runs, name, result.folder)
    shutil.rmtree(checkpoint, ignore_errors=True)
    return result


def named_recipe(recipe: Recipe | str, kind: Kind) -> Recipe:
    """Return the recipe of that name and kind. Raises UserError for an unknown name or another kind."""
    if isinstance(recipe, str):
        require_recipe(recipe)
        recipe = RECIPES[recipe](kind)
    if recipe.model.kind != kind:
        raise UserError(f"recipe {recipe.name!r} is for a {recipe.model.kind} model, a {kind} model was asked for")
    return recipe


def _shape(dataset: SequenceDataset) -> dict[str, Any]:
    return {
        "num_rows": dataset.vocabulary.num_rows,
        "num_actions": len(dataset.declaration.actions),
        "tasks": list(dataset.declaration.tasks),
    }


def _facts(dataset: SequenceDataset, model: Model, done: Progress, num_users: int) -> dict[str, Any]:
    best = done.curves[done.best_epoch]
    seconds = sum(done.seconds)
    return {
        "best": {name: value for name, value in best.items() if name not in ("tokens", "num_targets")},
        "best_epoch": done.best_epoch,
        "epochs": done.num_epochs,
        "seconds": seconds,
        "tokens_per_s": sum(entry["tokens"] for entry in done.curves) / max(seconds, 1e-9),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_users": num_users,
        "dataset_digest": dataset.digest,
    }

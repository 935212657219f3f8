"""Training from sequences to a chosen set of weights, resumable in the middle of an epoch.

Invariant: a run that was killed and started again ends on the CPU with weights bit-equal to those of an uninterrupted
one, because every draw is a function of (seed, epoch or step) and the state between two steps is one file; a GPU adds
up gradients in any order. The number of epochs is chosen on the validation split; what a model is tested on is never
read.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gr_platform import settings, storage
from gr_platform.errors import UserError
from gr_platform.models.build import MODEL_VERSION
from gr_platform.models.config import Kind, Recipe
from gr_platform.models.recipe_files import chosen
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.featured import FeaturedDataset, with_features
from gr_platform.sequences.splits import Holdout, newest_time
from gr_platform.sequences.time_split import TimeSplit
from gr_platform.training.batches import require_shared
from gr_platform.training.checkpoint import Progress
from gr_platform.training.epoch import forked
from gr_platform.training.flops import run_facts
from gr_platform.training.launch import Job, launch
from gr_platform.training.load import save_model
from gr_platform.training.memory import keep_freed_memory
from gr_platform.training.phases import Outcome, Run
from gr_platform.training.ranks import Ranks, require_room
from kernels.hstu_attention.bench import peak_gflops

logger = logging.getLogger(__name__)

TRAINER_VERSION = 5
CURVES = "curves.json"
TRAINED = "trained.parquet"


def train(
    dataset: SequenceDataset,
    recipe: Recipe,
    out: Path,
    *,
    checkpoint: Path | None = None,
    validation: Holdout | None = None,
    test: Holdout | None = None,
    warm_start: Path | None = None,
    ranks: Ranks | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, write model.safetensors, recipe.json, curves.json and trained.parquet into `out`, and return the facts.

    Resumes from the folder `checkpoint`, which the caller removes once the result is safe; without one,
    `.checkpoint-<name of out>` beside `out` is used and removed at the end. validation: what is trained on while the
    number of epochs is chosen, and judged on; test: what a refit leaves out; both leave-one-out's where None.
    warm_start: a run's folder whose weights are started from. Of several processes (ranks) the first alone writes.
    Raises UserError if the data set is too small or has nothing to learn, or if the checkpoint belongs to other
    sequences or settings; its subclasses NonFiniteLoss if training breaks, LostProcess if another process does.
    """
    torch.set_num_threads(settings.num_threads())
    keep_freed_memory()
    ranks = ranks or Ranks.alone()
    folder = checkpoint or out.parent / f".checkpoint-{out.name}"
    run = Run(
        dataset, recipe, folder, validation=validation, test=test, warm_start=warm_start, ranks=ranks, progress=progress
    )
    run.of |= {"model_version": MODEL_VERSION, "trainer_version": TRAINER_VERSION}
    with forked(ranks.device):
        outcome = run()
    if ranks.first:
        _write(out, run, outcome)
        if checkpoint is None:
            shutil.rmtree(folder, ignore_errors=True)
    return _facts(run, outcome)


def trained_ends(folder: Path, num_users: int) -> np.ndarray:
    """Return how many exposures of each user a run trained on, int64 [U], as its folder records."""
    table = pq.read_table(folder / TRAINED)
    ends = np.zeros(num_users, np.int64)
    ends[table["row"].to_numpy()] = table["num_exposures"].to_numpy()
    return ends


def train_model(
    home: Path,
    ds: str,
    kind: Kind,
    recipe: Recipe | str = "small",
    *,
    num_processes: int = 1,
    warm_start: str | None = None,
    split: TimeSplit | None = None,
    progress: bool = True,
    start: Callable[[Job, int], None] = launch,
) -> storage.Result:
    """Return the trained model of the data set's current sequences, training it unless that was done already.

    `recipe` is a recipe, the name of one or the path of its TOML file; warm_start: the name of a run's folder to start
    from; split: where the log is cut (None: leave-one-out); start: what runs a job in several processes.
    The result becomes `runs/<ds>/<kind>_model.current`. A killed run resumes. Raises UserError (unknown recipe, too
    little data, too many processes, and as `train` does).
    """
    recipe = named_recipe(recipe, kind)
    job = Job(home=home, ds=ds, recipe=recipe, warm_start=warm_start, split=split, progress=progress)
    launched = num_processes > 1 and _Task.of(job).found is None
    if launched:
        # Asked before anything starts: many processes take minutes until the first of them can say so.
        require_shared(job.recipe.training, num_processes)
        require_room(num_processes)
        start(job, num_processes)
    result = train_share(job, Ranks.alone())
    assert result is not None
    return replace(result, reused=result.reused and not launched)


def train_share(job: Job, ranks: Ranks) -> storage.Result | None:
    """Do this process's part of a job and return the result, or None from all but the first process."""
    task = _Task.of(job)
    if not ranks.first:
        if not ranks.hear(None):
            task.build(task.checkpoint, ranks)
        return None
    # The others must know whether there is anything to do before the first one starts.
    ranks.hear(task.found is not None)
    result = storage.ensure(task.runs, task.name, task.spec, lambda folder: task.build(folder, ranks))
    storage.point(task.runs, task.name, result.folder)
    shutil.rmtree(task.checkpoint, ignore_errors=True)
    return result


def named_recipe(recipe: Recipe | str, kind: Kind) -> Recipe:
    """Return the recipe of that name, or in that TOML file. Raises UserError as `chosen` does, or for another kind."""
    if isinstance(recipe, str):
        recipe = chosen(recipe, kind)
    if recipe.model.kind != kind:
        raise UserError(f"recipe {recipe.name!r} is for a {recipe.model.kind} model, a {kind} model was asked for")
    return recipe


@dataclass(frozen=True, slots=True)
class _Task:
    """A job with what it reads and where its result goes."""

    job: Job
    dataset: SequenceDataset
    spec: dict[str, Any]

    @staticmethod
    def of(job: Job) -> "_Task":
        dataset = SequenceDataset.open(storage.current(job.home / "sequences" / job.ds, "sequences"))
        dataset = with_features(job.home, job.ds, dataset, job.recipe.model)
        spec = {
            "recipe": job.recipe.to_json(),
            "sequences": dataset.digest,
            "model_version": MODEL_VERSION,
            "trainer_version": TRAINER_VERSION,
        }
        if isinstance(dataset, FeaturedDataset) and dataset.features_digest:
            spec["features"] = dataset.features_digest
        if job.split is not None:
            spec["split"] = job.split.to_json()
        if job.warm_start is not None:
            spec["warm_start"] = storage.read_manifest(job.home / "runs" / job.ds / job.warm_start).digest
        return _Task(job, dataset, spec)

    @property
    def runs(self) -> Path:
        return self.job.home / "runs" / self.job.ds

    @property
    def name(self) -> str:
        return f"{self.job.recipe.model.kind}_model"

    @property
    def checkpoint(self) -> Path:
        return self.runs / f".checkpoint-{storage.digest_of(self.spec)[:16]}"

    @property
    def found(self) -> storage.Result | None:
        return storage.find(self.runs, self.name, self.spec)

    def build(self, folder: Path, ranks: Ranks) -> dict[str, Any]:
        job = self.job
        start = None if job.warm_start is None else self.runs / job.warm_start
        return train(
            self.dataset,
            job.recipe,
            folder,
            checkpoint=self.checkpoint,
            validation=None if job.split is None else job.split.validation(self.dataset),
            test=None if job.split is None else job.split.window(self.dataset),
            warm_start=start,
            ranks=ranks,
            progress=job.progress,
        )


def _write(out: Path, run: Run, outcome: Outcome) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_model(out, run.recipe, outcome.weights, vocabulary=run.dataset.vocabulary.digest, **run.shape)
    storage.write_text(out / CURVES, json.dumps(outcome.done.curves, indent=1, allow_nan=False) + "\n")
    trained = pa.table({"row": outcome.rows, "num_exposures": outcome.ends})
    pq.write_table(trained, out / TRAINED, compression="zstd")


def _facts(run: Run, outcome: Outcome) -> dict[str, Any]:
    done: Progress = outcome.done
    chosen_on = [entry for entry in done.curves if entry["phase"] == "validation"]
    best = chosen_on[done.best_epoch]
    seconds = sum(done.seconds)
    # What `torch.mm` reaches on the CPU says nothing of a GPU.
    peak = peak_gflops() if run.ranks.device == "cpu" else None
    return {
        "best": {name: v for name, v in best.items() if name not in ("phase", "tokens", "num_targets")},
        "best_epoch": done.best_epoch,
        "epochs": len(chosen_on),
        "chosen_by": f"{run.objective.goal} on {run.validation.name}",
        "refit_epochs": len(done.curves) - len(chosen_on),
        "seconds": seconds,
        "tokens_per_s": sum(entry["tokens"] for entry in done.curves) / max(seconds, 1e-9),
        **run_facts(sum(done.flops), seconds, peak),
        "num_parameters": outcome.num_parameters,
        "num_users": len(outcome.rows),
        "dataset_digest": run.dataset.digest,
        "trained_until_ms": _trained_until(run, outcome),
    }


def _trained_until(run: Run, outcome: Outcome) -> int:
    """Return the time of the newest exposure that was trained on, ms UTC."""
    ends = np.zeros(run.dataset.num_users, np.int64)
    ends[outcome.rows] = outcome.ends
    return newest_time(run.dataset, ends)

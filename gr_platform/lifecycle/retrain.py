"""One retraining of a model: on what it learns, from which weights, and whether there is anything to learn at all.

Invariant: it learns from nothing in the window that it will be judged on, and a warm start begins with weights that
have not seen the days its epochs are chosen by.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.evaluation.evaluate import split_of, trained_until
from gr_platform.lifecycle import options
from gr_platform.models.config import Kind, Recipe
from gr_platform.registry import promotion
from gr_platform.registry.tracking import attempt
from gr_platform.registry.versions import CHAMPION, by_alias
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.time_split import TimeSplit, newest_split
from gr_platform.training.launch import Job, launch
from gr_platform.training.loop import train_model

log = logging.getLogger(__name__)

Start = Literal["warm", "scratch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """recipe: as trained; split: where the log is cut; parent: the run whose weights are started from, None for none.

    why: what decided on the start. fresh: a run of this recipe on these sequences that is there already.
    """

    recipe: Recipe
    split: TimeSplit
    parent: str | None
    why: str
    fresh: Path | None = None


def plan(home: Path, ds: str, recipe: Recipe, start: Start) -> Plan:
    """Return how a recipe is retrained on the current sequences. Raises UserError if the log is too short."""
    chosen = options.read(home).retraining
    dataset = SequenceDataset.current(home, ds)
    split = newest_split(dataset, days=chosen.window_days, min_users=chosen.min_targets)
    # On all but the window: what is served should know the newest days that it may know.
    recipe = recipe.with_training(refit=True)
    if start == "scratch":
        return Plan(recipe=recipe, split=split, parent=None, why="from scratch was asked for")
    kind = recipe.model.kind
    if fresh := _trained_already(home / "runs" / ds, recipe, dataset, split):
        return Plan(recipe=recipe, split=split, parent=None, why="nothing new to learn", fresh=fresh)
    parent, why = _parent(home, ds, kind, recipe, dataset, split)
    if parent is not None:
        recipe = recipe.with_training(max_epochs=min(chosen.warm_epochs, recipe.training.max_epochs))
    return Plan(recipe=recipe, split=split, parent=parent, why=why)


def retrain(
    home: Path,
    ds: str,
    recipe: Recipe,
    *,
    start: Start = "warm",
    num_processes: int = 1,
    launching: Callable[[Job, int], None] = launch,
) -> tuple[storage.Result, Plan]:
    """Return the model of a recipe by time, trained unless there is nothing new to learn, and how that came about.

    start: "warm" begins with the champion's weights where that is sound, else from scratch. It becomes the data set's
    current one. Raises UserError as `train_model` does.
    """
    found = plan(home, ds, recipe, start)
    kind = recipe.model.kind
    log.info("event=retraining dataset=%s kind=%s parent=%s why=%r", ds, kind, found.parent, found.why)
    if found.fresh is not None:
        storage.point(home / "runs" / ds, f"{kind}_model", found.fresh)
        return storage.Result(folder=found.fresh, manifest=storage.read_manifest(found.fresh), reused=True), found
    result = train_model(
        home,
        ds,
        kind,
        found.recipe,
        num_processes=num_processes,
        warm_start=found.parent,
        split=found.split,
        start=launching,
    )
    return result, found


def _trained_already(runs: Path, recipe: Recipe, dataset: SequenceDataset, split: TimeSplit) -> Path | None:
    """Return the current run if it is of this model on this split of these very sequences."""
    try:
        folder = storage.current(runs, f"{recipe.model.kind}_model")
        spec = storage.read_manifest(folder, verify=True).spec
    except UserError:
        return None
    same = spec["sequences"] == dataset.digest and split_of(folder) == split
    return folder if same and Recipe.from_json(spec["recipe"]).model == recipe.model else None


def _parent(
    home: Path, ds: str, kind: Kind, recipe: Recipe, dataset: SequenceDataset, split: TimeSplit
) -> tuple[str | None, str]:
    """Return the champion's run if its weights may be started from, and what decided."""
    # Without MLflow a training takes longer, but it need not fail.
    champion = attempt(f"champion_unknown dataset={ds}", lambda: by_alias(home, ds, kind, CHAMPION))
    if champion is None:
        return None, "from scratch: no champion is known to start from"
    folder = home / "runs" / ds / champion.tags.get("gr.run_folder", "-")
    try:
        manifest = storage.read_manifest(folder)
        until = trained_until(dataset, folder)
    except (UserError, FileNotFoundError):
        return None, f"from scratch: the champion's run {folder.name} is gone"
    if promotion.is_retreating(champion):
        return None, "from scratch: the champion is being rolled back"
    if Recipe.from_json(manifest.spec["recipe"]).model != recipe.model:
        return None, "from scratch: the champion is of another recipe"
    if until >= split.validation_cut:
        return None, "from scratch: the champion has seen the days that the epochs are chosen by"
    return folder.name, f"warm: from {folder.name}, the champion"

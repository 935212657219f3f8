"""What `gr train` and `gr recipes` say; training itself is the library's, the same that the pipeline runs.

Invariant: a model trained here is the one that `gr materialize` with the same recipe finds and reuses.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gr_platform import settings, storage
from gr_platform.commands import display
from gr_platform.models.baselines import VARIANTS
from gr_platform.models.config import Kind
from gr_platform.models.recipes import RECIPES

KINDS: dict[str, tuple[Kind, ...]] = {
    "retrieval": ("retrieval",),
    "ranking": ("ranking",),
    "both": ("retrieval", "ranking"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One call of `gr train`: a recipe's name or file, a key of KINDS, and what overrides the recipe."""

    recipe: str = "auto"
    kind: str = "both"
    seed: int | None = None
    epochs: int | None = None
    num_processes: int = 1
    warm_start: str | None = None

    @property
    def overrides(self) -> dict[str, int]:
        """The fields of TrainingConfig that are given."""
        given = {"seed": self.seed, "max_epochs": self.epochs}
        return {name: value for name, value in given.items() if value is not None}


def list_recipes() -> Iterator[str]:
    """Yield a line for each recipe: its name and the first sentence of what it returns."""
    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        sentence = (recipe.__doc__ or "").split("\n\n")[0].strip().removeprefix("Return ").rstrip(".")
        yield f"{name:<{width}}  {' '.join(sentence.split())}"
    yield f"each also with one of -{', -'.join(VARIANTS)}, for example ml_1m-sasrec"
    yield "train one with: gr train --recipe NAME; one of your own is a TOML file (docs/models.md)"


def report(home: Path, dataset: str | None, wanted: Wanted) -> Iterator[str]:
    """Train what is wanted and yield a line as each model is there. Raises UserError and NonFiniteLoss."""
    from gr_platform.events.landing import active_dataset
    from gr_platform.models.recipe_files import chosen
    from gr_platform.models.recipes import settled
    from gr_platform.registry.names import run_folder
    from gr_platform.registry.tracking import try_log_run
    from gr_platform.training.loop import train_model

    ds = dataset or settings.dataset() or active_dataset(home)
    recipes = {kind: chosen(settled(wanted.recipe, ds), kind) for kind in KINDS[wanted.kind]}
    start = None if wanted.warm_start is None else run_folder(home, ds, wanted.warm_start).name
    with storage.exclusive(home, "stages"):
        for kind, recipe in recipes.items():
            recipe = recipe.with_training(**wanted.overrides)
            result = train_model(home, ds, kind, recipe, num_processes=wanted.num_processes, warm_start=start)
            yield f"{result.folder.name} {'was trained before' if result.reused else 'trained'}: {recipe.name} on {ds}"
            logged = display.tracked(try_log_run(home, ds, result.folder))
            yield from (f"  {line}" for line in (*_figures(result.manifest.facts), logged))
    yield f"next: gr evaluate {result.folder.name}"


def _figures(facts: dict[str, Any]) -> Iterator[str]:
    """Yield what a training took and what chose its weights."""
    spent = f"{facts['seconds']:,.0f} s, {facts['epochs']} epochs, {facts['tokens_per_s']:,.0f} tokens/s"
    if "pflops_days" in facts:
        spent += f", {facts['pflops_days']:.3g} PFLOP/s-days"
    if "flops_utilisation" in facts:
        spent += f", {facts['flops_utilisation']:.0%} of the peak"
    yield f"{facts['num_parameters']:,} parameters, {facts['num_users']:,} users; {spent}"
    best = {name: value for name, value in facts["best"].items() if isinstance(value, float) and name != "loss"}
    shown = ", ".join(f"{name} {value:.4f}" for name, value in best.items())
    yield f"epoch {facts['best_epoch'] + 1} chosen by {facts['chosen_by']}: {shown}"

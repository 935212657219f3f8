"""What an experiment is: a question, the cells that answer it, and how their figures are shown.

Invariant: plain frozen values. Importing this loads neither torch nor a data set, so a Dagster definition and
`gr experiment --list` can name every cell at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gr_platform.errors import UserError
from gr_platform.models.config import Recipe

Scale = Literal["full", "smoke"]
PlotKind = Literal["bars", "points", "curves"]
SMOKE_MAX_EVENTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One training and evaluation: a model, or a baseline that is counted, on a data set.

    name: unique in its experiment, a Dagster partition key. label: the row it shares with its other seeds. group: the
    table it stands in. protocol: a key of `run.PROTOCOLS`. minutes: expected on two cores, None where nobody knows.
    """

    name: str
    label: str
    dataset: str
    protocol: str = "last_item"
    recipe: Recipe | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    group: str = "main"
    minutes: float | None = None

    @property
    def seed(self) -> int | None:
        """The seed of its training, None for what is counted."""
        return None if self.recipe is None else self.recipe.training.seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A row that others published: name of a column's figure -> value."""

    label: str
    figures: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The cells of a group as rows; columns: name of a figure -> heading."""

    columns: Mapping[str, str]
    group: str = "main"
    title: str = ""
    published: tuple[Published, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """bars: the figures `y` of each row; points: figures y against figure x, one a cell; curves: the same names
    in the entries of each cell's curve."""

    kind: PlotKind
    y: tuple[str, ...]
    x: str = ""
    group: str = "main"
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the mean over seeds of a row's figure should reach at least, up to a tolerance `within`."""

    label: str
    figure: str
    value: float
    within: float = 0.0
    group: str = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A question and its cells, the most valuable first. derived: a key of `derived.DERIVED`, more lines to report."""

    name: str
    title: str
    question: str
    protocol: str
    cells: tuple[Cell, ...]
    tables: tuple[Table, ...]
    plot: Plot
    targets: tuple[Target, ...] = ()
    derived: str = ""
    scale: Scale = "full"

    def __post_init__(self) -> None:
        names = [cell.name for cell in self.cells]
        if len(set(names)) != len(names):
            raise ValueError(f"experiment {self.name} has two cells of one name among {', '.join(names)}")
        groups = {table.group for table in self.tables}
        if astray := [cell.name for cell in self.cells if cell.group not in groups]:
            raise ValueError(f"experiment {self.name} shows {', '.join(astray)} in no table; groups are {groups}")

    def cell(self, name: str) -> Cell:
        """Return the cell of that name. Raises UserError if there is none."""
        found = next((cell for cell in self.cells if cell.name == name), None)
        if found is None:
            known = ", ".join(cell.name for cell in self.cells)
            raise UserError(f"experiment {self.name} has no cell {name!r}; choose among {known}")
        return found


def at_scale(experiment: Experiment, scale: Scale) -> Experiment:
    """Return the experiment itself, or at scale `smoke` the same cells on small simulated data with tiny models."""
    if scale == "full":
        return experiment
    return replace(experiment, scale=scale, cells=tuple(_smoke(cell) for cell in experiment.cells), targets=())


def _smoke(cell: Cell) -> Cell:
    dataset = {"": "", "drifting": "drifting-smoke"}.get(cell.dataset, "smoke")
    options = dict(cell.options) | dict(cell.options.get("smoke", {}))
    recipe = None if cell.recipe is None else shrunk(cell.recipe)
    return replace(cell, dataset=dataset, options=options, recipe=recipe, minutes=None)


def shrunk(recipe: Recipe) -> Recipe:
    """Return the recipe with a model and a training of seconds; larger models stay larger."""
    dim = max(4, recipe.model.embedding_dim // 8)
    model = replace(
        recipe.model,
        embedding_dim=dim,
        num_layers=min(recipe.model.num_layers, 2),
        num_heads=1,
        qk_dim=dim,
        v_dim=dim,
        ffn_dim=0,
        max_events=SMOKE_MAX_EVENTS,
        chunk=4,
        item_features=(),
        context_features=(),
        user_features=(),
    )
    changed = replace(recipe, name=f"{recipe.name}-smoke", model=model)
    return changed.with_training(max_epochs=1, patience=1, batch_size=64, accumulate=1, num_negatives=16)

"""Running one cell: its data, its protocol, its result as a folder that is reused by digest.

Invariant: what a cell is made of (recipe, options, sequences, versions of the code) names its folder, not the
experiment that asks for it, so two experiments share a cell; a killed cell goes on from its checkpoint, and no two
processes work on one.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from gr_platform import provenance, settings, storage
from gr_platform.errors import UserError
from gr_platform.experiments import data
from gr_platform.experiments.experiment import Cell, Experiment
from gr_platform.sequences.dataset import SequenceDataset

logger = logging.getLogger(__name__)

CELL_VERSION = 1
KIND = "cell"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a protocol gets: the cell, its sequences (None where it names no data set), where its files and its
    checkpoint go, and whether a terminal shows how far it is."""

    cell: Cell
    dataset: SequenceDataset | None
    folder: Path
    checkpoint: Path
    progress: bool

    @property
    def sequences(self) -> SequenceDataset:
        """The cell's sequences. Raises ValueError for a cell without a data set."""
        if self.dataset is None:
            raise ValueError(f"cell {self.cell.name} of protocol {self.cell.protocol} names no data set")
        return self.dataset


# A protocol returns facts: "figures", name -> number or None; and, where there is one, "curve", a list of such.
Protocol = Callable[[Work], dict[str, Any]]
PROTOCOLS = {
    "last_item": "gr_platform.experiments.protocols:last_item",
    "popularity": "gr_platform.experiments.protocols:popularity",
    "cooccurrence": "gr_platform.experiments.protocols:cooccurrence",
    "stream": "gr_platform.experiments.passes:stream",
    "examples": "gr_platform.experiments.passes:examples",
    "sparsity": "gr_platform.experiments.sparsity:sparsity",
    "encoders": "gr_platform.experiments.efficiency:encoders",
}


class Busy(UserError):
    """Another process works on the cell."""


def results(home: Path) -> Path:
    """Return the folder that holds the results of all cells."""
    return home / "experiments"


def run_cell(
    home: Path, experiment: Experiment, cell: Cell, *, folder: Path | None = None, progress: bool = True
) -> storage.Result:
    """Return the result of a cell, made unless it is there; facts: figures, curve, seconds, machine, commit, date.

    folder: where real data sets lie that are not imported yet. Raises Busy if another process works on the cell,
    UserError for data or a recipe that the user can mend.
    """
    digest = data.prepare(home, cell.dataset, folder, cell.recipe)
    spec = _spec(cell, digest, data.features_digest(home, cell.dataset, cell.recipe))
    parent = results(home)
    name = _key(spec)
    with ExitStack() as held:
        try:
            held.enter_context(storage.exclusive(parent, f"cell-{name}"))
        except UserError:
            raise Busy(
                f"another process works on cell {cell.name} of {experiment.name}; run this again later"
            ) from None
        checkpoint = parent / f".checkpoint-{name}"

        def build(building: Path) -> dict[str, Any]:
            dataset = data.load(home, cell.dataset, cell.recipe) if cell.dataset else None
            work = Work(cell=cell, dataset=dataset, folder=building, checkpoint=checkpoint, progress=progress)
            started = time.monotonic()
            logger.info("event=cell_started experiment=%s cell=%s", experiment.name, cell.name)
            facts = protocol_of(cell)(work)
            return facts | {"seconds": time.monotonic() - started} | _provenance()

        result = storage.ensure(parent, KIND, spec, build)
        shutil.rmtree(checkpoint, ignore_errors=True)
    logger.info("event=cell_finished experiment=%s cell=%s reused=%s", experiment.name, cell.name, result.reused)
    return result


def run_cells(
    home: Path, experiment: Experiment, *, folder: Path | None = None, progress: bool = True
) -> Iterator[tuple[Cell, storage.Result | None]]:
    """Yield each cell with its result, as they are made in order; None for one that another process works on."""
    for cell in experiment.cells:
        try:
            yield cell, run_cell(home, experiment, cell, folder=folder, progress=progress)
        except Busy:
            yield cell, None


def find_cell(home: Path, cell: Cell) -> storage.Result | None:
    """Return the result of a cell if it is there."""
    spec = _spec_of(home, cell)
    return None if spec is None else storage.find(results(home), KIND, spec)


def cell_key(home: Path, cell: Cell) -> str | None:
    """Return the digest of what a cell is made of, equal on every machine; None while its data is not there."""
    spec = _spec_of(home, cell)
    return None if spec is None else _key(spec)


def protocol_of(cell: Cell) -> Protocol:
    """Return the function that makes a cell's facts."""
    module, name = PROTOCOLS[cell.protocol].split(":")
    found: Protocol = getattr(import_module(module), name)
    return found


def _spec_of(home: Path, cell: Cell) -> dict[str, Any] | None:
    digest = data.digest(home, cell.dataset)
    if digest is None:
        return None
    try:
        return _spec(cell, digest, data.features_digest(home, cell.dataset, cell.recipe))
    except UserError:  # side information that nobody imported: no result can be of it
        return None


def _key(spec: dict[str, Any]) -> str:
    return storage.digest_of(spec)[:16]


def _spec(cell: Cell, sequences: str, features: str = "") -> dict[str, Any]:
    """Return what the result is a function of; the names of cell and label are not."""
    from gr_platform.models.build import MODEL_VERSION
    from gr_platform.training.loop import TRAINER_VERSION

    spec: dict[str, Any] = {
        "protocol": cell.protocol,
        "options": {name: value for name, value in cell.options.items() if name != "smoke"},
        "sequences": sequences,
        "features": features,
        "cell_version": CELL_VERSION,
    }
    if cell.recipe is not None:
        recipe = cell.recipe.to_json()
        spec |= {"recipe": {name: value for name, value in recipe.items() if name != "name"}}
        spec |= {"model_version": MODEL_VERSION, "trainer_version": TRAINER_VERSION}
    return spec


def _provenance() -> dict[str, Any]:
    return {
        "machine": provenance.machine(settings.device()),
        "commit": provenance.git_commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }

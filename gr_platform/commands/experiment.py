"""What `gr experiment` says while cells run one after the other; the work itself is the library's.

Invariant: a cell that is done is reused, one that another process works on is passed over, so the same command goes on
where it stopped and a second one beside it takes the cells that are free. A report file is written as each cell ends.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gr_platform.experiments import render
from gr_platform.experiments.catalogue import experiments, named
from gr_platform.experiments.data import prepare
from gr_platform.experiments.experiment import Cell, Experiment, Scale
from gr_platform.experiments.report import Report, recorded_rows, report, write
from gr_platform.experiments.run import cell_key, find_cell, run_cells

KEY_FIGURES = ("hr_at_10", "ndcg_at_10", "mean_ne", "validation_ndcg_at_10", "train_seconds")


def overview(scale: Scale = "full") -> Iterator[str]:
    """Yield one line for each experiment."""
    for name, experiment in experiments(scale).items():
        yield f"{name:<20} {len(experiment.cells):>3} cells  {experiment.question}"
    yield "run one with: gr experiment NAME --data FOLDER; its cells: gr experiment NAME --list"


def listing(home: Path, name: str, *, json: Path | None = None, scale: Scale = "full") -> Iterator[str]:
    """Yield one line for each cell of an experiment: done here or in the report `json`, what it took or may take."""
    experiment = named(name, scale)
    recorded = {} if json is None else recorded_rows(json)
    found = {row["cell"]: row for row in report(home, experiment, recorded)["rows"]}
    for cell in experiment.cells:
        yield f"{cell.name:<22} {_state(cell, found.get(cell.name))}"
    left = [cell for cell in experiment.cells if cell.name not in found]
    known = [cell.minutes for cell in left if cell.minutes is not None]
    unknown = f", besides {len(left) - len(known)} of unknown cost" if len(left) > len(known) else ""
    yield f"{len(left)} cells to run, about {sum(known):.0f} min{unknown}"


def run(
    home: Path,
    name: str,
    *,
    cells: Sequence[str] = (),
    data: Path | None = None,
    json: Path | None = None,
    scale: Scale = "full",
) -> Iterator[str]:
    """Yield a line as each cell ends (all of the experiment, or the named ones), then the tables.

    Every cell is logged to the registry. json: where the report goes; a cell that it holds already, of the same recipe,
    data and code, is not run. Raises UserError as the cells do.
    """
    from gr_platform.registry.experiments import log_cell, log_report

    experiment = named(name, scale)
    chosen = _chosen(experiment, cells)
    recorded = {} if json is None else recorded_rows(json)
    for cell in chosen.cells:
        prepare(home, cell.dataset, data, cell.recipe)
    kept = {cell.name: recorded[key] for cell in chosen.cells if (key := cell_key(home, cell)) in recorded}
    for cell_name, row in kept.items():
        yield f"{cell_name:<22} found on {row['date']}{_figures(row['figures'])}"
    chosen = replace(chosen, cells=tuple(cell for cell in chosen.cells if cell.name not in kept))
    yield from _announced(home, chosen)
    busy = []
    for cell, result in run_cells(home, chosen, folder=data):
        if result is None:
            busy.append(cell.name)
            yield f"{cell.name:<22} another process works on it"
            continue
        log_cell(home, experiment, cell, result)
        if json is not None:
            write(report(home, experiment, recorded), json)
        figures = _figures(result.manifest.facts["figures"])
        yield f"{cell.name:<22} {_state(cell, result.manifest.facts)}{', reused' if result.reused else ''}{figures}"
    found: Report = report(home, experiment, recorded)
    log_report(home, experiment, found)
    yield from ("", *"\n\n".join([*render.tables(found), *found["derived"].get("lines", [])]).splitlines(), "")
    yield from render.shortfall(found).replace("**", "").splitlines()
    if json is not None:
        write(found, json)
        yield f"wrote {json.name}"
    if busy:
        yield f"run the same command again when {', '.join(busy)} has ended"


def _chosen(experiment: Experiment, names: Sequence[str]) -> Experiment:
    if not names:
        return experiment
    return replace(experiment, cells=tuple(experiment.cell(name) for name in names))


def _announced(home: Path, experiment: Experiment) -> Iterator[str]:
    left = [cell for cell in experiment.cells if find_cell(home, cell) is None]
    costs = ", ".join(f"{cell.name} {_expected(cell)}" for cell in left)
    yield f"{experiment.name}: {len(experiment.cells) - len(left)} of {len(experiment.cells)} cells are there"
    if left:
        yield f"to run: {costs}"


def _expected(cell: Cell) -> str:
    return "(cost unknown)" if cell.minutes is None else f"(about {cell.minutes:g} min)"


def _state(cell: Cell, facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return f"to run {_expected(cell)}"
    return f"done in {facts['seconds'] / 60:.1f} min"


def _figures(figures: Mapping[str, float | None]) -> str:
    shown = [f"{name} {render.number(value)}" for name in KEY_FIGURES if (value := figures.get(name)) is not None]
    return f": {', '.join(shown)}" if shown else ""

"""What an experiment found, as one JSON object: its question, its rows, where each comes from, and what is missing.

Invariant: every figure is that of a cell's result folder, or of a row of an earlier report that was made of the same
recipe, data and code; a cell without either has no row and is named as missing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.experiments.derived import DERIVED
from gr_platform.experiments.experiment import Cell, Experiment, Target
from gr_platform.experiments.run import cell_key, find_cell

Report = dict[str, Any]
Row = dict[str, Any]


def report(home: Path, experiment: Experiment, recorded: Mapping[str, Row] | None = None) -> Report:
    """Return the experiment's report of the cells whose results are there, or are `recorded` (key -> row)."""
    found = {cell.name: _found(home, experiment, cell, recorded or {}) for cell in experiment.cells}
    rows = [row for row in found.values() if row is not None]
    told = {
        "name": experiment.name,
        "title": experiment.title,
        "question": experiment.question,
        "protocol": experiment.protocol,
        "scale": experiment.scale,
        "tables": [asdict(table) for table in experiment.tables],
        "plot": asdict(experiment.plot),
        "rows": rows,
        "missing": [name for name, row in found.items() if row is None],
        "targets": [asdict(target) | {"reached": _reached(target, rows)} for target in experiment.targets],
        "derived": DERIVED[experiment.derived](rows),
    }
    return dict(json.loads(json.dumps(told, allow_nan=False)))


def write(found: Report, path: Path) -> None:
    """Write a report as indented JSON."""
    storage.write_text(path, json.dumps(found, indent=1, allow_nan=False) + "\n")


def recorded_rows(path: Path) -> dict[str, Row]:
    """Return the rows of a report file by their key (`cell_key`), {} where there is no file.

    So an experiment may be run in parts, here and elsewhere: what another machine found need not be found again.
    Raises UserError for a file that is no report.
    """
    try:
        rows = storage.read_object(path)["rows"]
        return {row["key"]: row for row in rows if isinstance(row["figures"], dict)}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path.name} is no report of gr experiment; move it away or name another file") from None


def means(rows: Sequence[Mapping[str, Any]], figure: str) -> tuple[float, float | None, int] | None:
    """Return mean, standard deviation (None of one seed) and number of seeds of a row's figure; None if undefined."""
    values = [row["figures"][figure] for row in rows if row["figures"].get(figure) is not None]
    if not values:
        return None
    mean = sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
    return mean, deviation, len(values)


def by_label(rows: Sequence[Mapping[str, Any]], group: str) -> dict[str, list[Mapping[str, Any]]]:
    """Return the rows of a group by label, in their order: the seeds of one model together."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["group"] == group:
            found.setdefault(row["label"], []).append(row)
    return found


def _found(home: Path, experiment: Experiment, cell: Cell, recorded: Mapping[str, Row]) -> Row | None:
    named = {"cell": cell.name, "label": cell.label, "group": cell.group, "key": cell_key(home, cell)}
    if (made := find_cell(home, cell)) is not None:
        return named | _row(experiment, cell, made)
    row = recorded.get(named["key"] or "")
    return None if row is None else row | named


def _row(experiment: Experiment, cell: Cell, made: storage.Result) -> Row:
    facts = made.manifest.facts
    figures = dict(facts["figures"])
    if cell.recipe is not None:
        figures["alpha"] = cell.recipe.training.stochastic_length.alpha
    told: Row = {
        "dataset": cell.dataset,
        "seed": cell.seed,
        "recipe": None if cell.recipe is None else cell.recipe.to_json(),
        "figures": figures,
        "digest": made.manifest.digest,
        "sequences": made.manifest.spec["sequences"],
        "command": f"gr experiment {experiment.name} --cell {cell.name}",
    }
    told |= {name: facts[name] for name in ("machine", "commit", "date", "seconds")}
    return told | {"curve": facts.get("curve", [])}


def _reached(target: Target, rows: Sequence[Mapping[str, Any]]) -> bool | None:
    """Return whether the mean over seeds reaches a target, None where there is no figure yet."""
    found = means(by_label(rows, target.group).get(target.label, []), target.figure)
    if found is None:
        return None
    return found[0] >= target.value - target.within

"""Writes the results page, its plots and the table in the project's README from the JSON files beside it:

    python docs/results/make.py

Invariant: every figure comes from a file that `gr experiment NAME --json docs/results/NAME.json` wrote; an experiment
without one has no table. Prose that stands between the blocks is left as it is.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gr_platform.experiments import render
from gr_platform.experiments.catalogue import experiments

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
# The project's README shows the first table of an experiment, with these columns.
FRONT = HERE.parents[1] / "README.md"
FRONT_FIGURES = ("hr_at_10", "hr_at_50", "hr_at_200", "ndcg_at_10", "ndcg_at_200")
# A section's made part stands between the name of its file and an end mark, both as comments that nobody sees.
BLOCK = re.compile(r"(<!-- (\w+)\.json -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = """# Results

The experiments of the paper, run by us. Each section is made by [make.py](make.py) from the JSON file beside
this page that `gr experiment NAME --json docs/results/NAME.json` writes; an experiment that did not run has no table.
Rows in italics are published figures, quoted. Figures with +- are mean and standard deviation over seeds.
"""


def skeleton() -> str:
    """Return the page without any result: a heading and an empty block for each experiment."""
    blocks = [f"## {each.title}\n\n<!-- {name}.json -->\n<!-- end -->\n" for name, each in experiments().items()]
    return "\n".join([HEAD, *blocks])


def found(name: str) -> dict[str, Any] | None:
    """Return the report of an experiment, or None if there is no file."""
    path = HERE / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def block(name: str) -> str:
    """Return the made part of an experiment's section."""
    report = found(name)
    if report is not None:
        return render.section(report, f"{name}.png") + "\n"
    experiment = experiments()[name]
    asked = f"**Question.** {experiment.question}\n\n**Protocol.** {experiment.protocol}\n\n"
    return f"{asked}Not run yet: `gr experiment {name} --json docs/results/{name}.json`\n"


def front_block(name: str) -> str:
    """Return the made part of the project's README: a table, when and on what it was measured."""
    report = found(name)
    if report is None:
        return f"Not run yet: `gr experiment {name} --json docs/results/{name}.json`\n"
    return f"{render.table_of(report, report['tables'][0], FRONT_FIGURES)}\n\n{render.provenance(report)}\n"


def make(page: str, made: Callable[[str], str] = block) -> str:
    """Return the page with every block made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{made(match[2])}{match[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(make(PAGE.read_text(encoding="utf-8") if PAGE.is_file() else skeleton()), encoding="utf-8")
    FRONT.write_text(make(FRONT.read_text(encoding="utf-8"), front_block), encoding="utf-8")
    for name in experiments():
        if (report := found(name)) is not None and report["rows"]:
            (HERE / f"{name}.png").write_bytes(render.plot(report))

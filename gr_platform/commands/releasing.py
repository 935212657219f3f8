"""What `gr retrain`, `gates`, `promote` and `rollback` show; what they do is the library's and the pipeline's.

Invariant: the served pair changes by `lifecycle.release` alone, whoever asks.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gr_platform import settings
from gr_platform.commands import display
from gr_platform.commands.messages import say

if TYPE_CHECKING:
    from gr_platform.lifecycle.release import Release


def retrain(home: Path, dagster_home: Path, dataset: str | None, start: Literal["warm", "scratch"]) -> None:
    """Run the job `retraining` and show its stages. Raises UserError as the stages do."""
    from gr_platform.commands import pipeline

    stages = display.StageLines(Console())
    done = pipeline.retrain(home, dagster_home, dataset=dataset or "", start=start, on_stage=stages)
    say(f"finished in {stages.seconds:.0f} s: {done['deployment']['figures']['outcome']}")


def explain(home: Path, dataset: str | None) -> bool:
    """Print the last judgement; return whether every gate was open. Raises UserError if there is none."""
    from gr_platform.lifecycle import judgement

    facts = judgement.last(home, _dataset(home, dataset)).manifest.facts
    console = Console()
    console.print(_gate_table(facts))
    window = facts["window"]
    if window["kind"] == "time":
        say(f"judged on the events from {_day(window['cut'])} to {_day(window['end'])}, {_bounds(home)}")
    else:
        say(f"judged on each user's last event, {_bounds(home)}")
    say("every gate is open" if facts["passed"] else "a closed gate keeps the challenger from serving")
    return bool(facts["passed"])


def promote(home: Path, dataset: str | None, *, force: bool) -> bool:
    """Judge and release; return whether the challengers serve now."""
    from gr_platform.lifecycle.release import release

    began = time.monotonic()
    done = release(home, _dataset(home, dataset), force=force)
    _tell(done, began)
    return done.outcome in ("promoted", "already champion")


def rollback(home: Path, dataset: str | None) -> None:
    """Go back to the pair before and say so. Raises UserError if there is none."""
    from gr_platform.lifecycle.release import rollback as go_back

    began = time.monotonic()
    _tell(go_back(home, _dataset(home, dataset)), began)


def _dataset(home: Path, dataset: str | None) -> str:
    from gr_platform.events.landing import active_dataset

    return dataset or settings.dataset() or active_dataset(home)


def _tell(done: "Release", began: float) -> None:
    serving = ", ".join(f"{version.name} version {version.version}" for version in done.champions.values())
    where = "by the model server" if done.server_loaded else "once a model server runs (gr serve)"
    say(f"{done.sentence}; served {where}: {serving} ({time.monotonic() - began:.1f} s)")


def _gate_table(facts: Mapping[str, Any]) -> Table:
    from gr_platform.lifecycle.gates import MEANINGS

    grid = Table(title=escape(_title(facts)), title_justify="left")
    for column in ("", "gate", "found", "bound", "why"):
        grid.add_column(column, justify="right" if column in ("found", "bound") else "left")
    for gate in facts["gates"]:
        mark = "[green]open[/]" if gate["ok"] else "[red]closed[/]"
        found, bound = (_number(gate[name]) for name in ("value", "bound"))
        why = gate["why"] if gate["ok"] else f"{gate['why']} (it asks whether {MEANINGS.get(gate['gate'], 'it may')})"
        grid.add_row(mark, gate["gate"], found, bound, escape(why))
    return grid


def _title(facts: Mapping[str, Any]) -> str:
    sides = [
        ", ".join(f"{version['name']} {version['version']}" for version in facts[side].values()) or "no champion"
        for side in ("challenger", "champion")
    ]
    return f"{sides[0]} against {sides[1]}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _bounds(home: Path) -> str:
    from gr_platform.lifecycle.options import FILE

    return (
        f"bounds: {FILE}"
        if (home / FILE).is_file()
        else f"bounds: the defaults, {FILE} in the state folder changes them"
    )


def _day(ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(ms / 1000))

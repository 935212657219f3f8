"""What `gr replay` shows while it runs, and what it says of the report.

Invariant: it works in a folder of its own; the person's data sets, models and model server stay as they are.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from gr_platform.commands import display
from gr_platform.commands.messages import pasteable, say
from gr_platform.errors import UserError

if TYPE_CHECKING:
    from gr_platform.replay.stream import Day


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One call of `gr replay`. faults: name -> number of the day, 0 for none."""

    days: int
    dataset: str
    events: int
    faults: Mapping[str, int]
    rate: float
    shadow: int
    recipe: str
    seed: int


def run(home: Path, wanted: Wanted, out: Path | None, *, keep: bool) -> bool:
    """Replay and print the verdicts; return whether all of them hold. Raises UserError as `replay` does."""
    from gr_platform.replay import replay as replaying
    from gr_platform.replay import report
    from gr_platform.replay.stream import StreamOptions

    folder = (out or home / "replays" / datetime.now(UTC).strftime("%Y-%m-%dT%H%M%S")).absolute()
    if folder.exists():
        raise UserError(f"{pasteable(folder)} is there already; name another folder for the report")
    console = Console()
    stages = display.StageLines(console)
    try:
        options = replaying.ReplayOptions(
            stream=StreamOptions(
                days=wanted.days,
                num_events=wanted.events,
                seed=wanted.seed,
                faults={day: name for name, day in wanted.faults.items() if day},  # type: ignore[misc]
            ),
            dataset=wanted.dataset,
            rate=wanted.rate,
            shadow=wanted.shadow,
            recipe=wanted.recipe,
            command=" ".join(["gr", *sys.argv[1:]]),
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    listener = replaying.Listener(day=lambda day: say(_headline(day, wanted.days)), stage=stages, said=say)
    page = replaying.replay(folder, options, listener, source=home)
    facts = json.loads((folder / report.FACTS).read_text(encoding="utf-8"))
    verdicts = report.verdicts(facts)
    for verdict in verdicts:
        console.print({True: "[green]yes[/]", False: "[red]no [/]", None: "--- "}[verdict.ok].ljust(4), end=" ")
        say(verdict.sentence)
    if not keep:
        replaying.remove_state(folder)
    say(f"report: {pasteable(page)}")
    return all(verdict.ok is not False for verdict in verdicts)


def _headline(day: "Day | None", num_days: int) -> str:
    if day is None:
        return "the history, and a first model of it"
    what = f", {day.fault}" if day.fault else ""
    return f"day {day.number} of {num_days}: {day.date}, {day.num_events:,} events{what}"

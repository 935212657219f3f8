"""What `gr drift` shows: every measure of drift and freshness with its bound.

Invariant: nothing is computed here.
"""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gr_platform import settings
from gr_platform.commands import display


def show(home: Path, dataset: str | None, console: Console) -> bool:
    """Print the report of a data set; return whether no bound is crossed. Raises UserError if it has no events yet."""
    from gr_platform.events.landing import active_dataset
    from gr_platform.lifecycle.drift import report

    ds = dataset or settings.dataset() or active_dataset(home)
    found = report(home, ds)
    grid = Table(title=escape(f"Drift of {ds}, {found.day or 'no day with enough events'}"), title_justify="left")
    for column in ("measure", "value", "bound", ""):
        grid.add_column(column, justify="right" if column in ("value", "bound") else "left")
    for each in found.measures:
        value, bound = ("-" if number is None else f"{number:.4g}" for number in (each.value, each.bound))
        state = "not judged" if each.value is None else ("ok" if each.ok else "[red]crossed[/]")
        grid.add_row(each.name, value, bound, "" if each.bound is None and each.value is not None else state)
    console.print(grid)
    display.lines(console, [f"{each.name}: {each.why}" for each in found.measures])
    if found.alarms:
        asked = "a reason to train again" if found.asks else "no reason to train again: look at the data first"
        display.lines(console, [f"crossed: {', '.join(each.name for each in found.measures if not each.ok)}; {asked}"])
    return not found.alarms

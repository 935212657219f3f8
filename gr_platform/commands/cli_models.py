"""The commands of `gr` about models: recipes, training, judging, comparing, experiments, benchmarks.

Invariant: only light modules are imported here; what a command needs it imports when it is called.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gr_platform import settings
from gr_platform.commands import options
from gr_platform.commands.messages import say_each


def recipes() -> None:
    """List the recipes: what models there are to train, a line each.

    Example: gr recipes
    """
    from gr_platform.commands.training import list_recipes

    say_each(list_recipes())


def train(
    recipe: options.Recipe = "auto",
    kind: options.Kind = "both",
    dataset: options.Dataset = None,
    seed: options.TrainingSeed = None,
    epochs: options.Epochs = None,
    processes: options.Processes = 1,
    warm_start: options.WarmStart = None,
) -> None:
    """Train models alone, without the rest of the pipeline; what is trained is reused, what was stopped goes on.

    A recipe of yours is a TOML file: base = "ml_1m", then tables model and training with what differs (docs/models.md).

    Examples: gr train --recipe ml_1m --kind retrieval | gr train --recipe mine.toml --epochs 3 | gr train --processes 2
    """
    from gr_platform.commands.training import Wanted, report

    wanted = Wanted(recipe=recipe, kind=kind, seed=seed, epochs=epochs, num_processes=processes, warm_start=warm_start)
    say_each(report(settings.home(), dataset, wanted))


def evaluate(run: options.OneRun = None, dataset: options.Dataset = None) -> None:
    """Judge a run on users' last events beside popularity and co-occurrence; without one, the current models.

    Examples: gr evaluate | gr evaluate 1f3a09 | gr evaluate retrieval-ml_1m-s1-1f3a09c2
    """
    from gr_platform.commands import judging

    judging.evaluate(settings.home(), dataset, run, Console())


def compare(first: options.FirstRun, second: options.SecondRun, dataset: options.Dataset = None) -> None:
    """Compare two runs user by user: each figure, the difference, its interval and p value by paired bootstrap.

    Intervals cover the choice of users, not of training seeds: train several seeds to see what those do.

    Examples: gr compare 1f3a 77c0 | gr compare retrieval_model 77c0
    """
    from gr_platform.commands import judging

    judging.compare(settings.home(), dataset, first, second, Console())


def experiment(
    name: options.ExperimentName = None,
    cell: options.Cells = None,
    list_cells: options.ListCells = False,
    data: options.DataFolder = None,
    scale: options.Scale = "full",
    json: options.ReportFile = None,
) -> None:
    """Run an experiment, cell by cell; what is done is reused, what was stopped goes on. Without a name: list them.

    Examples: gr experiment | gr experiment ml_1m --list | gr experiment ml_1m --data data --json ml_1m.json
    """
    from gr_platform.commands import experiment as experiments

    home = settings.home()
    if name is None:
        say_each(experiments.overview(scale))
    elif list_cells:
        say_each(experiments.listing(home, name, json=json, scale=scale))
    else:
        say_each(experiments.run(home, name, cells=cell or (), data=data, json=json, scale=scale))


def bench(
    name: Annotated[str, typer.Argument(help="Benchmark; all if not given.")] = "all",
    aot: Annotated[bool, typer.Option("--aot", help="With kernels: compile them for each GPU.")] = False,
    events: Annotated[int | None, typer.Option(help="With ingest: size of the log; default 10 million.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the rows to this file.")] = None,
) -> None:
    """Measure against the alternatives, in one run on this machine.

    Examples: gr bench attention --json attention.json | gr bench kernels --aot | gr bench ingest --events 30_000_000
    """
    from gr_platform.commands import bench as benches
    from gr_platform.commands import display

    rows = benches.run(name, aot=aot, num_events=events)
    Console().print(display.bench_table(benches.worst(rows) if aot else rows))
    if json is not None:
        benches.write(rows, json)
    if any(row["ok"] is False for row in rows):
        raise typer.Exit(1)

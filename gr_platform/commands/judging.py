"""What `gr evaluate` and `gr compare` show; the judging itself is the library's, the same that the pipeline runs.

Invariant: nothing is computed here; a figure that does not exist is a dash.
"""

from pathlib import Path

from rich.console import Console

from gr_platform import settings, storage
from gr_platform.commands import display


def evaluate(home: Path, dataset: str | None, run: str | None, console: Console) -> None:
    """Print the figures of a run, or of the current models, evaluating them first unless that is done.

    Raises UserError if there is no such run, or it was trained on other sequences.
    """
    from gr_platform.evaluation.evaluate import evaluate_current, evaluate_run
    from gr_platform.events.landing import active_dataset
    from gr_platform.registry.names import run_folder
    from gr_platform.registry.tracking import try_log_run
    from gr_platform.registry.versions import trained_kinds

    ds = dataset or settings.dataset() or active_dataset(home)
    runs = home / "runs" / ds
    if run is None:
        with storage.exclusive(home, "stages"):
            facts, judged = evaluate_current(home, ds).manifest.facts, f"the current models of {ds}"
        folders = [storage.current(runs, f"{kind}_model") for kind in trained_kinds(home, ds)]
    else:
        folders = [run_folder(home, ds, run)]
        facts, judged = evaluate_run(home, ds, folders[0]).manifest.facts, folders[0].name
    if "retrieval" in facts:
        console.print(display.ranks_table(f"Retrieval, {judged}, on users' last events", facts))
        console.print(display.slices_table(facts["slices"]))
        console.print(f"{facts['num_users']:,} users, {facts['catalogue_size']:,} items ranked for each")
    if "ranking" in facts:
        console.print(display.tasks_table(f"Ranking, {judged}, on users' last events", facts["ranking"]))
    display.lines(console, [display.tracked(try_log_run(home, ds, folder, facts)) for folder in folders])


def compare(home: Path, dataset: str | None, first: str, second: str, console: Console) -> None:
    """Print two runs beside each other, evaluating them first unless that is done. Raises UserError as the library."""
    from gr_platform.evaluation.compare import compare_runs
    from gr_platform.evaluation.significance import MEANING
    from gr_platform.events.landing import active_dataset
    from gr_platform.registry.tracking import try_log_run

    ds = dataset or settings.dataset() or active_dataset(home)
    found = compare_runs(home, ds, first, second)
    console.print(display.comparison_table(found))
    runs = home / "runs" / ds
    tracked = [display.tracked(try_log_run(home, ds, runs / found[run], found[f"facts_{run}"])) for run in ("a", "b")]
    display.lines(console, [f"{found['num_targets']:,} targets; {MEANING}", *tracked])

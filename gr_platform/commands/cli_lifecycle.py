"""The commands of `gr` about the life of the platform: what it did, whether it is well.

Invariant: only light modules are imported here; what a command needs it imports when it is called.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from gr_platform import settings
from gr_platform.commands import options
from gr_platform.commands.messages import say_each


def retrain(
    start: Annotated[
        Literal["warm", "scratch"], typer.Option(help="From the champion's weights, or from none.")
    ] = "warm",
    dataset: options.Dataset = None,
) -> None:
    """Run the scheduled job: new data in, both models trained, judged beside the champion, the better served.

    Examples: gr retrain | gr retrain --start scratch
    """
    from gr_platform.commands import releasing

    releasing.retrain(settings.home(), settings.dagster_home(), dataset, start)


def gates(dataset: options.Dataset = None) -> None:
    """Explain the last judgement: each gate between challenger and server, what was measured, and its bound.

    Status 1 if a gate is closed. Example: gr gates
    """
    from gr_platform.commands import releasing

    if not releasing.explain(settings.home(), dataset):
        raise typer.Exit(1)


def promote(
    force: Annotated[bool, typer.Option("--force", help="Whatever the gates say, but for broken scores.")] = False,
    dataset: options.Dataset = None,
) -> None:
    """Judge the challengers again and let them serve if every gate is open.

    Examples: gr promote | gr promote --force
    """
    from gr_platform.commands import releasing

    if not releasing.promote(settings.home(), dataset, force=force):
        raise typer.Exit(1)


def rollback(dataset: options.Dataset = None) -> None:
    """Let the pair serve again that served before the present one; the present one is not promoted again by itself.

    Example: gr rollback
    """
    from gr_platform.commands import releasing

    releasing.rollback(settings.home(), dataset)


def replay(
    days: Annotated[int, typer.Option(help="How many.", min=1, max=60)] = 7,
    dataset: Annotated[str | None, typer.Option(help="An ingested data set; default: simulated events.")] = None,
    events: Annotated[int, typer.Option(help="About how many, of the whole log.", min=1_000)] = 100_000,
    poisoned: Annotated[
        int | None, typer.Option(help="Day on which one item gets 80 % of the events; 0: none.")
    ] = None,
    empty: Annotated[int, typer.Option(help="Day without events; 0: none.")] = 0,
    tenfold: Annotated[int, typer.Option(help="Day with ten times the events; 0: none.")] = 0,
    rate: Annotated[float, typer.Option(help="Requests a second, the whole time.", min=0.1)] = 5.0,
    shadow: Annotated[int, typer.Option(help="Live requests that a challenger scores before it may serve.")] = 0,
    recipe: Annotated[str, typer.Option(help="Recipe; default: one for logs of this size.")] = "",
    out: Annotated[Path | None, typer.Option(help="New folder for the report; default: replays/ in GR_HOME.")] = None,
    seed: options.Seed = 7,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the replay's own state folder beside the report.")] = False,
) -> None:
    """Live through days in minutes: data in, models trained, judged and deployed, under live requests; write a report.

    The middle day is poisoned (of two the last, of one none) unless --poisoned says otherwise. Status 1 if a promise
    was broken.

    Examples: gr replay --days 7 | gr replay --days 2 --poisoned 0 | gr replay --dataset ml-1m --days 5
    """
    from gr_platform.commands.replaying import Wanted, run

    middle = (days + 1) // 2 if days > 2 else days if days == 2 else 0
    faults = {"poisoned": middle if poisoned is None else poisoned, "empty": empty, "tenfold": tenfold}
    wanted = Wanted(
        days=days,
        dataset=dataset or "",
        events=events,
        faults=faults,
        rate=rate,
        shadow=shadow,
        recipe=recipe,
        seed=seed,
    )
    if not run(settings.home(), wanted, out, keep=keep):
        raise typer.Exit(1)


def metrics(port: options.PlatformMetricsPort = 8003) -> None:
    """Serve the platform's figures to Prometheus on 127.0.0.1 until Ctrl-C; gr up does it too.

    Example: gr metrics --port 9003
    """
    from gr_platform.commands.observing import serve_metrics

    say_each(serve_metrics(settings.home(), settings.dagster_home(), port))


def alerts(last: Annotated[int, typer.Option(help="How many.", min=1)] = 20) -> None:
    """Show what was wrong lately, and what the alert hooks did not do.

    Example: gr alerts --last 5
    """
    from gr_platform.commands.observing import alerts_report

    say_each(alerts_report(settings.home(), last))


def land(first: options.FirstDay = None, last: options.LastDay = None, dataset: options.InboxDataset = None) -> None:
    """Land what waits in the inbox, inbox/NAME/ in the state folder, by the day in a file's path or of its arrival.

    Examples: gr land | gr land --from 2026-06-01 --to 2026-06-30
    """
    from gr_platform.commands.landing import report

    say_each(report(settings.home(), settings.dagster_home(), first, last, dataset))


def drift(dataset: options.Dataset = None) -> None:
    """Show whether the newest data or the served models have drifted, each measure against its bound in lifecycle.toml.

    Status 1 if a bound is crossed. Example: gr drift
    """
    from rich.console import Console

    from gr_platform.commands.drifting import show

    if not show(settings.home(), dataset, Console()):
        raise typer.Exit(1)


def clean(
    dataset: options.Dataset = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; delete nothing.")] = False,
) -> None:
    """Delete old trainings that nothing refers to: runs, evaluations, bundles, sequences and their MLflow entries.

    Examples: gr clean --dry-run | gr clean --dataset shop
    """
    from gr_platform.commands.cleaning import report

    say_each(report(settings.home(), dataset, dry_run=dry_run))


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="New archive: .tar.zst or .tar.gz.")],
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Those of unfinished trainings too.")] = False,
) -> None:
    """Copy the state folder into one file while the platform runs; a training at work is waited for.

    Example: gr backup /backups/gr-2026-11-28.tar.zst
    """
    from gr_platform.commands.backups import backup_report

    say_each(backup_report(settings.home(), file, checkpoints=checkpoints))


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Archive of gr backup.")],
    registry: Annotated[bool, typer.Option("--registry", help="Also move the addresses in GR_MLFLOW_DB.")] = False,
) -> None:
    """Bring a backup back into an empty GR_HOME, which may be another folder than it was made of.

    Example: GR_HOME=/srv/gr gr restore /backups/gr-2026-11-28.tar.zst
    """
    from gr_platform.commands.backups import restore_report

    say_each(restore_report(settings.home(), file, registry=registry))


def migrate() -> None:
    """Bring a state folder of an earlier release to what this one reads; a backup first is wise.

    Example: gr migrate
    """
    from gr_platform.commands.backups import migrate_report

    say_each(migrate_report(settings.home()))

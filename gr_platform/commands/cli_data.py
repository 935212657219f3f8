"""The commands of `gr` about data: logs and side information in, pictures out, people erased.

Invariant: only light modules are imported here; what a command needs it imports when it is called.
"""

from pathlib import Path
from typing import Annotated

import typer

from gr_platform import settings
from gr_platform.commands import options
from gr_platform.commands.messages import say, say_each


def import_(
    source: Annotated[Path, typer.Argument(help="A CSV, JSON Lines or Parquet file, MovieLens ratings, or a folder.")],
    declaration: options.DeclarationOption = None,
    format: options.Format = "auto",
    dataset: options.NewDataset = None,
    user_column: options.UserColumn = None,
    item_column: options.ItemColumn = None,
    action_column: options.ActionColumn = None,
    time_column: options.TimeColumn = None,
    value_column: options.ValueColumn = None,
    event_id_column: options.EventIdColumn = None,
    time_unit: options.TimeUnit = "auto",
    exclude_seen: options.ExcludeSeen = None,
    ingest_date: options.IngestDate = None,
    dry_run: options.DryRun = False,
    kind: options.ImportAs = "log",
) -> None:
    """Import a log, or all logs of a folder; what is neither declared nor named is guessed and shown.

    Examples: gr import shop.csv --dry-run | gr import day.csv --time-unit s | gr import items.csv --as item-features |
    gr import ml-1m/users.dat --as user-features --dataset ml-1m
    """
    from gr_platform.commands.importing import Import, report

    say_each(report(Import.of(settings.home(), locals())))


def fetch(name: options.PublicDataset = None, out: options.FetchFolder = None) -> None:
    """Download a public data set, or say how to get it by hand; without a name: list them.

    Examples: gr fetch | gr fetch ml-1m
    """
    from gr_platform.commands.fetching import report

    say_each(report(name, out or settings.home() / "downloads"))


def simulate(
    out: Annotated[Path, typer.Option(help="A .parquet file, or a folder for parts of ten million rows each.")],
    events: Annotated[int, typer.Option(help="About how many events.")] = 200_000,
    seed: options.Seed = 7,
) -> None:
    """Write a synthetic log of any size: views, likes and purchases of drifting tastes.

    Examples: gr simulate --out log.parquet | gr simulate --events 100_000_000 --out log
    """
    from gr_platform.events.simulator import simulate as write

    facts = write(out, num_events=events, seed=seed, progress=True)
    say(f"{out.name}: {facts['num_rows']:,} rows, {facts['num_users']:,} users, {facts['num_items']:,} items")
    say(f"next: gr import {out}")


def card(out: options.CardFile = Path("data_card.html"), dataset: options.Dataset = None) -> None:
    """Copy the data card, an HTML page with figures and pictures of the events, to a file.

    Examples: gr card | gr card --out shop.html
    """
    from gr_platform.events.card_html import copy_card

    say(f"{out.name}: the data card of {copy_card(settings.home(), dataset, out)}; open it in a browser")


def forget(user: options.Forgotten, dataset: options.Dataset = None, yes: options.Yes = False) -> None:
    """Erase a person's events from the landed logs, the events and the sequences, and record that it was done.

    Example: gr forget --user 42
    """
    from gr_platform.commands.forgetting import report

    say_each(report(settings.home(), dataset or settings.dataset(), user, sure=yes))


def withdraw(
    date: Annotated[str, typer.Option(help="The date its files were landed under, YYYY-MM-DD.")],
    dataset: options.Dataset = None,
    yes: options.Yes = False,
) -> None:
    """Take a day that should not be learned from out of the landed logs; land a mended file in its place.

    Example: gr withdraw --date 2026-06-23
    """
    from gr_platform.commands.forgetting import withdrawal

    say_each(withdrawal(settings.home(), dataset or settings.dataset(), date, sure=yes))

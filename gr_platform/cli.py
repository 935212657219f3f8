"""The command line `gr`: one short function a command, each of which calls one library function.

Invariant: a UserError ends in one red sentence on stderr and status 2; libraries are imported inside commands, so that
`gr --help` answers at once.
"""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gr_platform import settings
from gr_platform.commands import logs, options
from gr_platform.commands.messages import complain as _complain
from gr_platform.commands.messages import say as _say
from gr_platform.commands.messages import say_each as _say_each
from gr_platform.errors import sentence_for

app = typer.Typer(
    help="Generative recommenders from interaction log to served model. Start with: gr demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Run `gr`; exit with status 2 and one sentence for what the user can mend."""
    try:
        logs.to_file(settings.home())
        app()
    except SystemExit as end:
        if end.code == options.INTERRUPTED:
            _complain("stopped", "what was finished is kept, and the same command goes on from there")
        raise
    except Exception as error:
        if (sentence := sentence_for(error)) is None:
            raise
        logging.getLogger(__name__).info("event=refused", exc_info=error)
        _complain("error", sentence)
        sys.exit(2)


@app.callback()
def global_options(show_version: options.ShowVersion = False) -> None:
    """Take what stands before a command."""


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="Your log; default: simulated data.")] = None,
    format: options.Format = "auto",
    recipe: options.Recipe = "auto",
    num_events: Annotated[int, typer.Option(help="Size of the simulated log.")] = 200_000,
) -> None:
    """Do the whole main job: import, train, evaluate, register, export, serve, ask.

    Examples: gr demo | gr demo --data ml-1m/ratings.parquet --format movielens
    """
    from gr_platform.commands.demo import DemoOptions, run

    wanted = DemoOptions(data=data, format=format, recipe=recipe, num_events=num_events)
    run(settings.home(), settings.dagster_home(), wanted, Console())


@app.command("import")
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

    Examples: gr import shop.csv --dry-run | gr import day.csv --time-unit s | gr import items.csv --as item-features
    """
    from gr_platform.commands.importing import Import, report

    _say_each(report(Import.of(settings.home(), locals())))


@app.command()
def fetch(name: options.PublicDataset = None, out: options.FetchFolder = None) -> None:
    """Download a public data set, or say how to get it by hand; without a name: list them.

    Examples: gr fetch | gr fetch ml-1m
    """
    from gr_platform.commands.fetching import report

    _say_each(report(name, out or settings.home() / "downloads"))


@app.command()
def forget(user: options.Forgotten, dataset: options.Dataset = None, yes: options.Yes = False) -> None:
    """Erase a person's events from the landed logs, the events and the sequences, and record that it was done.

    Example: gr forget --user 42
    """
    from gr_platform.commands.forgetting import report

    _say_each(report(settings.home(), dataset or settings.dataset(), user, sure=yes))


@app.command()
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
    _say(f"{out.name}: {facts['num_rows']:,} rows, {facts['num_users']:,} users, {facts['num_items']:,} items")
    _say(f"next: gr import {out}")


@app.command()
def materialize(
    select: Annotated[list[str] | None, typer.Option(help="Asset to run (repeat for more); default: all.")] = None,
    dataset: options.Dataset = None,
    recipe: options.Recipe = "auto",
) -> None:
    """Run the asset graph, or single assets of it; what is up to date is reused.

    Examples: gr materialize | gr materialize --select retrieval_model --select evaluation --recipe small
    """
    from gr_platform.commands import display, pipeline

    stages = display.StageLines(Console())
    home, dagster_home = settings.home(), settings.dagster_home()
    pipeline.materialize(home, dagster_home, dataset=dataset or "", recipe=recipe, select=select or (), on_stage=stages)
    _say(f"finished in {stages.seconds:.0f} s")


@app.command()
def card(out: options.CardFile = Path("data_card.html"), dataset: options.Dataset = None) -> None:
    """Copy the data card, an HTML page with figures and pictures of the events, to a file.

    Examples: gr card | gr card --out shop.html
    """
    from gr_platform.events.card_html import copy_card

    _say(f"{out.name}: the data card of {copy_card(settings.home(), dataset, out)}; open it in a browser")


@app.command()
def serve(
    grpc_port: options.GrpcPort = 8001, http_port: options.HttpPort = 8000, metrics_port: options.MetricsPort = 8002
) -> None:
    """Run the model server with the deployed pair until Ctrl-C; prints its addresses.

    Example: gr serve --grpc-port 9001
    """
    from gr_platform.commands.foreground import serve_until_signal
    from serving.server import Ports

    serve_until_signal(settings.home(), Ports(grpc=grpc_port, http=http_port, metrics=metrics_port), _say)


@app.command()
def up(
    dagster_port: options.DagsterPort = 3000,
    mlflow_port: options.MlflowPort = 5000,
    grpc_port: options.GrpcPort = 8001,
    http_port: options.HttpPort = 8000,
    metrics_port: options.MetricsPort = 8002,
) -> None:
    """Start Dagster (UI and daemon), the MLflow UI and the model server, all on 127.0.0.1, and print their addresses.

    Examples: gr up | gr up --dagster-port 3001
    """
    from gr_platform.commands import services

    home = settings.home()
    ports = services.Ports(
        dagster=dagster_port, mlflow=mlflow_port, grpc=grpc_port, http=http_port, metrics=metrics_port
    )
    for running in services.up(home, services.platform_services(home, settings.dagster_home(), ports)):
        _say(f"{running.name:<18} {running.address or 'running'}{services.PAGES.get(running.name, '')}")
    if served := services.foreign_server(home):
        _say(f"{services.MODEL_SERVER:<18} grpc://{served.grpc_address}  (runs already, gr down leaves it running)")
    elif not services.has_models(home):
        _say(f"{services.MODEL_SERVER:<18} not started: no model is deployed yet; run gr materialize, then gr up again")
    _say("stop them with: gr down")


@app.command()
def down() -> None:
    """Stop exactly what `gr up` started."""
    from gr_platform.commands import services

    stopped = services.down(settings.home())
    _say(f"stopped {', '.join(stopped)}" if stopped else "nothing was running that gr up started")
    if served := services.foreign_server(settings.home()):
        _say(f"the model server at {served.grpc_address} goes on: Ctrl-C where gr serve runs stops it")


@app.command()
def status() -> None:
    """Show the data sets, the current models, who is champion, and what runs."""
    from gr_platform.commands.status import report

    _say_each(report(settings.home()))


@app.command()
def doctor() -> None:
    """Check every prerequisite and say what to do about each fault; status 1 if something needed is missing."""
    from gr_platform.commands.doctor import examine

    checks = examine(settings.home())
    for check in checks:
        mark = "ok  " if check.ok else ("FAIL" if check.needed else "warn")
        _say(f"{mark}  {check.name:<26} {check.found}" + (f"  ->  {check.advice}" if check.advice else ""))
    if any(check.needed and not check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def recommend(
    user: options.User,
    k: Annotated[int, typer.Option("-k", help="How many items.")] = 10,
    at: options.RequestTime = None,
) -> None:
    """Ask the running model server for the best items for a user.

    Example: gr recommend --user 42 -k 10
    """
    from gr_platform.commands import display
    from gr_platform.commands.query import Asker

    with Asker(settings.home()) as asker:
        answer = asker.recommend(user, k, at)
        Console().print(display.answer_table(f"Top {k} for user {user}", answer, asker.tasks))
    _say(f"{answer.milliseconds:.1f} ms, {answer.cached_tokens} tokens cached; {display.ORDER}")


@app.command()
def score(
    user: options.User,
    items: options.Items,
    at: options.RequestTime = None,
) -> None:
    """Ask the running model server how likely each action of a user on given items is.

    Example: gr score --user 42 --items 17,4,99
    """
    from gr_platform.commands import display
    from gr_platform.commands.query import Asker, split_ids

    with Asker(settings.home()) as asker:
        answer = asker.score(user, split_ids(items), at)
        Console().print(display.answer_table(f"Probabilities for user {user}", answer, asker.tasks))
    _say(f"{answer.milliseconds:.1f} ms, {answer.cached_tokens} tokens cached")


@app.command()
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


if __name__ == "__main__":
    main()

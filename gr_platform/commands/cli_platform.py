"""The commands of `gr` about the whole platform: the pipeline, the services, their state.

Invariant: only light modules are imported here; what a command needs it imports when it is called.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gr_platform import settings
from gr_platform.commands import options
from gr_platform.commands.messages import say, say_each


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
    say(f"finished in {stages.seconds:.0f} s")


def up(
    dagster_port: options.DagsterPort = 3000,
    mlflow_port: options.MlflowPort = 5000,
    grpc_port: options.GrpcPort = 8001,
    http_port: options.HttpPort = 8000,
    metrics_port: options.MetricsPort = 8002,
    platform_metrics_port: options.PlatformMetricsPort = 8003,
) -> None:
    """Start Dagster (UI and daemon), the MLflow UI, the platform's metrics and the model server, all on 127.0.0.1.

    Prints their addresses.

    Examples: gr up | gr up --dagster-port 3001
    """
    from gr_platform import databases
    from gr_platform.commands import pipeline, services
    from gr_platform.lifecycle import options as lifecycle_options

    home = settings.home()
    databases.require()
    # Said here, where a person sees it: the services themselves would go on with the defaults.
    lifecycle_options.read(home)
    pipeline.make_instance(settings.dagster_home())
    ports = services.Ports(
        dagster=dagster_port,
        mlflow=mlflow_port,
        grpc=grpc_port,
        http=http_port,
        metrics=metrics_port,
        platform_metrics=platform_metrics_port,
    )
    for running in services.up(home, services.platform_services(home, settings.dagster_home(), ports)):
        say(f"{running.name:<18} {running.address or 'running'}{services.PAGES.get(running.name, '')}")
    if (served := services.foreign_server(home)) and not served.orphaned:
        say(f"{services.MODEL_SERVER:<18} grpc://{served.grpc_address}  (runs already, gr down leaves it running)")
    elif not services.has_models(home):
        say(f"{services.MODEL_SERVER:<18} not started: no model is deployed yet; run gr materialize, then gr up again")
    say("stop them with: gr down")


def down() -> None:
    """Stop exactly what `gr up` started."""
    from gr_platform.commands import services

    stopped = services.down(settings.home())
    say(f"stopped {', '.join(stopped)}" if stopped else "nothing was running that gr up started")
    if served := services.foreign_server(settings.home()):
        say(f"the model server at {served.grpc_address} goes on: Ctrl-C where gr serve runs stops it")


def status() -> None:
    """Show the data sets, the current models, who is champion, and what runs."""
    from gr_platform.commands.status import report

    say_each(report(settings.home()))


def doctor() -> None:
    """Check every prerequisite and say what to do about each fault; status 1 if something needed is missing."""
    from gr_platform.commands.doctor import examine

    checks = examine(settings.home())
    for check in checks:
        mark = "ok  " if check.ok else ("FAIL" if check.needed else "warn")
        say(f"{mark}  {check.name:<26} {check.found}" + (f"  ->  {check.advice}" if check.advice else ""))
    if any(check.needed and not check.ok for check in checks):
        raise typer.Exit(1)

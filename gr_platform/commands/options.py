"""The options that `gr` takes, as types: one name, one help text, wherever an option appears.

Invariant: only typer is imported, since every command begins here.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

MAX_PORT = 65535
MAX_SEED = 2**63 - 1
INTERRUPTED = 130
ACTIVE = "Data set; default: GR_DATASET, else the one imported last."
GIVEN = "Data set to add to; default: the name the file gives itself, else the file's."
DECLARATION = "Declaration of the data set: ml-1m, ml-20m, retailrocket, amazon-sports, amazon-books, or a TOML file."
EVENT_ID = "Column that identifies an event: rows with equal ids count once; none: no such."
TIME = "Column of the event's time; none, with item-features or user-features: there is none."
SEEN = "all: never recommend what the user has seen; none: items may repeat."
AS = (
    "log: events; item-features: what holds of items from a time on (item, time, properties); user-features: slow "
    "series of users (user, time, properties). The last two go to a data set that is there; without a time the "
    "properties hold at all times."
)
RUN = "A trained model: its folder, name in MLflow or first digits; retrieval_model: the current one"
TRAINING_SEED = "Seed of weights and draws; default: the recipe's."
SCALES = "smoke: the same on small simulated data, in minutes."
RECIPE = "One of gr recipes, or a TOML file of yours (docs/models.md); auto picks one for the data set."
ATTACH = "Watch the server at this gRPC address instead, which somebody else runs; its key: GR_SERVER_ADMIN_KEY."
SERVER_HISTORY = "Ask by the user's id alone, for the history that the server has, at the time now."
ITEMS = "Item ids, separated by commas (one with a comma in double quotes)."


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gr-platform {version('gr-platform')}")
        raise typer.Exit


ShowVersion = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
]
Dataset = Annotated[str | None, typer.Option(help=ACTIVE)]
ImportAs = Annotated[str, typer.Option("--as", help=AS)]
NewDataset = Annotated[str | None, typer.Option(help=GIVEN)]
Recipe = Annotated[str, typer.Option(help=RECIPE)]
Format = Annotated[str, typer.Option(help="auto, csv, jsonl, parquet or movielens.")]
UserColumn = Annotated[str | None, typer.Option(help="Column of the user's id.")]
ItemColumn = Annotated[str | None, typer.Option(help="Column of the item's id.")]
ActionColumn = Annotated[str | None, typer.Option(help="Column of the action's name.")]
TimeColumn = Annotated[str | None, typer.Option(help=TIME)]
ValueColumn = Annotated[str | None, typer.Option(help="Column of a rating or another number.")]
EventIdColumn = Annotated[str | None, typer.Option(help=EVENT_ID)]
TimeUnit = Annotated[str, typer.Option(help="auto, s, ms, us, ns or iso.")]
ExcludeSeen = Annotated[str | None, typer.Option(help=SEEN)]
DeclarationOption = Annotated[str | None, typer.Option("--declaration", help=DECLARATION)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be read and quarantined; write nothing.")]
IngestDate = Annotated[str | None, typer.Option(help="Partition YYYY-MM-DD; default: today.")]
FirstDay = Annotated[str | None, typer.Option("--from", help="First day, YYYY-MM-DD; default: all that waits.")]
LastDay = Annotated[str | None, typer.Option("--to", help="Last day, YYYY-MM-DD; default: today.")]
InboxDataset = Annotated[str | None, typer.Option("--dataset", help="Data set; default: all that have an inbox.")]
PublicDataset = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Public data set; default: list them.")]
FetchFolder = Annotated[Path | None, typer.Option(help="Folder of downloads; default: downloads/ in the state folder.")]
CardFile = Annotated[Path, typer.Option(help="HTML file to write.")]
Seed = Annotated[int, typer.Option(help="Same seed, same log.", min=0, max=MAX_SEED)]
Forgotten = Annotated[str, typer.Option("--user", help="The user to erase.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
User = Annotated[str, typer.Option(help="A user of the served data set.")]
ServerHistory = Annotated[bool, typer.Option("--server-history", help=SERVER_HISTORY)]
Items = Annotated[str, typer.Option(help=ITEMS)]
RequestTime = Annotated[int | None, typer.Option(help="Time of the request, ms UTC; default: that of the last event.")]
Kind = Annotated[Literal["retrieval", "ranking", "both"], typer.Option(help="Which model.")]
TrainingSeed = Annotated[int | None, typer.Option(help=TRAINING_SEED, min=0, max=MAX_SEED)]
Epochs = Annotated[int | None, typer.Option(help="Epochs at the most; default: the recipe's max_epochs.", min=1)]
Processes = Annotated[int, typer.Option(help="Processes that share each step (torchrun).", min=1)]
WarmStart = Annotated[str | None, typer.Option(help="Run whose weights to start from; items may be added since.")]
OneRun = Annotated[str | None, typer.Argument(metavar="[RUN]", help=f"{RUN}; default: the current models.")]
FirstRun = Annotated[str, typer.Argument(metavar="RUN", help=f"{RUN}.")]
SecondRun = Annotated[str, typer.Argument(metavar="RUN", help="The run to compare it with.")]
ExperimentName = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Experiment; default: list them.")]
Cells = Annotated[list[str] | None, typer.Option(help="Cell to run (repeat for more); default: all.")]
ListCells = Annotated[bool, typer.Option("--list", help="List the cells and what they cost; run nothing.")]
DataFolder = Annotated[Path | None, typer.Option(help="Folder of the public data sets, for those not imported yet.")]
Scale = Annotated[Literal["full", "smoke"], typer.Option(help=SCALES)]
ReportFile = Annotated[Path | None, typer.Option(help="Also write the report here; cells in it are not run again.")]
GrpcPort = Annotated[int, typer.Option(help="Model server: gRPC.", min=1, max=MAX_PORT)]
HttpPort = Annotated[int, typer.Option(help="Model server: HTTP.", min=1, max=MAX_PORT)]
MetricsPort = Annotated[int, typer.Option(help="Model server: metrics.", min=1, max=MAX_PORT)]
Attach = Annotated[str | None, typer.Option(metavar="HOST:PORT", help=ATTACH)]
PlatformMetricsPort = Annotated[int, typer.Option(help="Metrics of the platform.", min=1, max=MAX_PORT)]
DagsterPort = Annotated[int, typer.Option(help="Dagster's UI.", min=1, max=MAX_PORT)]
MlflowPort = Annotated[int, typer.Option(help="MLflow's UI.", min=1, max=MAX_PORT)]

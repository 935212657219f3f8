"""The whole main job as one function: log -> models -> registry -> bundle -> model server -> gRPC answers.

Invariant: nothing is scripted around: the stages are the Dagster job, the answers come over gRPC from the real server.
"""

import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from gr_platform import storage
from gr_platform.commands import display, pipeline
from gr_platform.commands.query import Asker
from gr_platform.errors import UserError
from gr_platform.models.recipe_files import require_known

SIMULATED = "simulated"
NUM_EVENTS = 200_000
SEED = 7
NUM_REPEATS = 5
# Of the users by length of history: long, above the middle, median. A long history shows what the cache saves.
USER_QUANTILES = (0.9, 0.75, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What `gr demo` takes: a log and its format (None: simulated data), a recipe, the number of simulated events."""

    data: Path | None = None
    format: str = "auto"
    recipe: str = "auto"
    num_events: int = NUM_EVENTS


def run(home: Path, dagster_home: Path, options: DemoOptions, console: Console) -> None:
    """Run everything and print stages, figures, answers and the next commands. Raises UserError."""
    require_known(options.recipe)
    console.print("[bold]From interaction log to gRPC answer[/]")
    stages = display.StageLines(console)
    ds = import_log(home, options, stages)
    pipeline.materialize(home, dagster_home, dataset=ds, recipe=options.recipe, on_stage=stages)
    facts = storage.read_manifest(storage.current(home / "runs" / ds, "evaluation")).facts
    with serving(home, stages), Asker(home) as asker:
        console.print()
        console.print(display.quality_table(facts))
        users = typical_users(asker)
        show_answers(asker, users, console)
    console.print(f"\nEverything took {stages.seconds:.0f} s. Next:")
    display.lines(console, next_commands(options, users[0]))


def import_log(home: Path, options: DemoOptions, stages: display.StageLines) -> str:
    """Import the user's log, or the simulated one, and return its data set's name."""
    from gr_platform.events.landing import import_file

    started = time.monotonic()
    source, name = options.data, None
    if source is None:
        source = simulated(home, options.num_events)
        # Logs of other sizes are other data sets: importing both into one would mix two simulated worlds.
        name = SIMULATED if options.num_events == NUM_EVENTS else f"{SIMULATED}-{options.num_events}"
    try:
        landed = import_file(source, home=home, dataset=name, format=options.format)
    except UserError as error:
        if "-column" not in str(error) and "--time-unit" not in str(error):
            raise
        raise UserError(f"{error}; gr import takes that option, and gr materialize goes on from there") from None
    figures = {"dataset": landed.dataset, "rows": landed.num_rows, "actions": landed.guesses["actions"]}
    stages.line("import", time.monotonic() - started, figures, reused=landed.reused)
    return landed.dataset


def simulated(home: Path, num_events: int, seed: int = SEED) -> Path:
    """Return the simulated log of that size and seed, written once to `home/simulated`."""
    from gr_platform.events.simulator import simulate

    made = storage.ensure(
        home / "simulated",
        "events",
        {"num_events": num_events, "seed": seed, "simulator": 2},
        lambda folder: simulate(folder / "events.parquet", num_events=num_events, seed=seed),
    )
    return made.folder / "events.parquet"


@contextmanager
def serving(home: Path, stages: display.StageLines) -> Iterator[None]:
    """Have the model server run for the block: the one that runs already, else one that is stopped afterwards."""
    from serving.server import EmbeddedServer, attach

    started = time.monotonic()
    running = attach(home)
    if running is not None:
        stages.line("model server", 0.0, {"gRPC": running.grpc_address}, reused=True)
        yield
        return
    with EmbeddedServer(home) as handle:
        stages.line("model server", time.monotonic() - started, {"gRPC": handle.grpc_address})
        yield


def typical_users(asker: Asker) -> list[int | str]:
    """Return a user with a long history, one above the middle and a median one."""
    order = asker.dataset.lengths.argsort(kind="stable")
    places = [int(quantile * (len(order) - 1)) for quantile in USER_QUANTILES]
    chosen: list[int | str] = asker.dataset.user_ids[order[places]].tolist()
    return chosen


def show_answers(asker: Asker, users: list[int | str], console: Console) -> None:
    """Print each user's top 10, then what the first user's first and repeated request cost."""
    first = asker.recommend(users[0], 10)
    again = [asker.recommend(users[0], 10) for _ in range(NUM_REPEATS)]
    answers = [first, *(asker.recommend(user, 10) for user in users[1:])]
    for user, answer in zip(users, answers, strict=True):
        console.print()
        console.print(display.answer_table(f"Top 10 for user {user}", answer, asker.tasks))
    repeated = statistics.median(answer.milliseconds for answer in again)
    display.lines(
        console,
        [
            f"({display.ORDER})",
            "",
            f"First request of user {users[0]}: {first.milliseconds:.1f} ms with {first.cached_tokens} tokens cached; "
            f"repeated: {repeated:.1f} ms with {again[-1].cached_tokens} tokens cached (both models together).",
        ],
    )


def next_commands(options: DemoOptions, user: int | str) -> list[str]:
    """Return what to try next, one command a line."""
    commands = [
        ("up", "# Dagster, MLflow and the model server with their addresses; gr down stops them"),
        (f"recommend --user {user} -k 10", ""),
        ("status", ""),
    ]
    if options.data is None:
        commands.append(
            ("demo --data my_log.csv", "# a log of your own: user, item, action, time; see gr import --help")
        )
    # `make demo` runs where the environment's programs are not on the PATH.
    program = "gr" if shutil.which("gr") else os.path.relpath(Path(sys.executable).with_name("gr"))
    return [f"  {program} {command:<26}{remark}".rstrip() for command, remark in commands]

"""The command line `gr`: which commands there are, and how it ends.

Invariant: a UserError ends in one red sentence on stderr and status 2; libraries are imported inside commands, so that
`gr --help` answers at once. A command is one short function of commands/cli_*.py that calls one library function.
"""

import logging
import sys
from collections.abc import Callable

import typer

from gr_platform import settings
from gr_platform.commands import cli_data, cli_lifecycle, cli_models, cli_platform, cli_serving, logs, options
from gr_platform.commands.messages import complain
from gr_platform.errors import sentence_for
from gr_platform.lifecycle import migration

# Panel of `gr --help` -> its commands; a command's name is its function's.
COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Platform": (
        cli_platform.demo,
        cli_platform.materialize,
        cli_platform.up,
        cli_platform.down,
        cli_platform.status,
        cli_platform.doctor,
    ),
    "Data": (cli_data.import_, cli_data.fetch, cli_data.simulate, cli_data.card, cli_data.forget, cli_data.withdraw),
    "Models": (
        cli_models.recipes,
        cli_models.train,
        cli_models.evaluate,
        cli_models.compare,
        cli_models.experiment,
        cli_models.bench,
    ),
    "Serving": (cli_serving.serve, cli_serving.recommend, cli_serving.score),
    "Lifecycle": (
        cli_lifecycle.land,
        cli_lifecycle.retrain,
        cli_lifecycle.gates,
        cli_lifecycle.promote,
        cli_lifecycle.rollback,
        cli_lifecycle.replay,
        cli_lifecycle.drift,
        cli_lifecycle.metrics,
        cli_lifecycle.alerts,
        cli_lifecycle.clean,
        cli_lifecycle.backup,
        cli_lifecycle.restore,
        cli_lifecycle.migrate,
    ),
}

app = typer.Typer(
    help="Generative recommenders from interaction log to served model. Start with: gr demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(command.__name__.rstrip("_"), rich_help_panel=panel)(command)


@app.callback()
def global_options(show_version: options.ShowVersion = False) -> None:
    """Take what stands before a command."""


def main() -> None:
    """Run `gr`; exit with status 2 and one sentence for what the user can mend."""
    try:
        logs.to_file(settings.home())
        # A restore is what mends a half-restored folder.
        if sys.argv[1:] and sys.argv[1] != "restore" and "--help" not in sys.argv:
            migration.require_readable(settings.home())
            migration.begin(settings.home())
        app()
    except SystemExit as end:
        if end.code == options.INTERRUPTED:
            complain("stopped", "what was finished is kept, and the same command goes on from there")
        raise
    except Exception as error:
        if (sentence := sentence_for(error)) is None:
            raise
        logging.getLogger(__name__).info("event=refused", exc_info=error)
        complain("error", sentence)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""What `gr` promises to scripts: its commands and their options. A change here is a change for every user."""

import typer
from typer.testing import CliRunner

from gr_platform import cli

SURFACE = {
    "demo": "--data --format --recipe --num-events",
    "materialize": "--select --dataset --recipe",
    "up": "--dagster-port --mlflow-port --grpc-port --http-port --metrics-port --platform-metrics-port",
    "down": "",
    "status": "",
    "doctor": "",
    "import": (
        "SOURCE --declaration --format --dataset --user-column --item-column --action-column --time-column "
        "--value-column --event-id-column --time-unit --exclude-seen --ingest-date --dry-run --as"
    ),
    "fetch": "NAME --out",
    "simulate": "--out --events --seed",
    "card": "--out --dataset",
    "forget": "--user --dataset --yes",
    "withdraw": "--date --dataset --yes",
    "recipes": "",
    "train": "--recipe --kind --dataset --seed --epochs --processes --warm-start",
    "evaluate": "RUN --dataset",
    "compare": "FIRST SECOND --dataset",
    "experiment": "NAME --cell --list --data --scale --json",
    "bench": "NAME --aot --events --json",
    "serve": "--grpc-port --http-port --metrics-port --attach",
    "recommend": "--user -k --at --server-history",
    "score": "--user --items --at",
    "land": "--from --to --dataset",
    "retrain": "--start --dataset",
    "gates": "--dataset",
    "promote": "--force --dataset",
    "rollback": "--dataset",
    "drift": "--dataset",
    "metrics": "--port",
    "alerts": "--last",
    "clean": "--dataset --dry-run",
    "backup": "FILE --checkpoints",
    "restore": "FILE --registry",
    "migrate": "",
    "replay": ("--days --dataset --events --poisoned --empty --tenfold --rate --shadow --recipe --out --seed --keep"),
}
WITHOUT_EXAMPLE = {"down", "status", "doctor"}


def _named(parameter):
    return [parameter.name.upper()] if parameter.param_type_name == "argument" else parameter.opts


def test_the_commands_and_their_options_are_these():
    commands = typer.main.get_command(cli.app).commands
    found = {
        name: " ".join(option for parameter in command.params for option in _named(parameter))
        for name, command in commands.items()
    }
    assert found == SURFACE


def test_every_command_says_what_it_does_and_shows_an_example():
    for name in SURFACE:
        shown = CliRunner().invoke(cli.app, [name, "--help"])
        assert shown.exit_code == 0
        assert ("Example" in shown.output) == (name not in WITHOUT_EXAMPLE), name


def test_every_option_says_what_it_is():
    for name, command in typer.main.get_command(cli.app).commands.items():
        for parameter in command.params:
            assert parameter.help, (name, parameter.name)


def test_commands_are_shown_by_what_they_are_about():
    shown = CliRunner().invoke(cli.app, ["--help"]).output
    places = [shown.index(f" {panel} ─") for panel in cli.COMMANDS]
    assert places == sorted(places)
    assert places[0] > 0

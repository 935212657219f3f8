"""`lifecycle.toml`: what does not fit is refused by name, what is not said is the default."""

from dataclasses import fields

import pytest
from typer.testing import CliRunner

from gr_platform import cli
from gr_platform.errors import UserError
from gr_platform.lifecycle import options
from gr_platform.lifecycle.options import LifecycleOptions


def write(home, text):
    (home / options.FILE).write_text(text)
    return home


def test_without_a_file_every_option_is_its_default(tmp_path):
    assert options.read(tmp_path) == LifecycleOptions()


def test_what_is_said_counts_and_whole_numbers_pass_for_numbers(tmp_path):
    found = options.read(
        write(tmp_path, "[gates]\nmax_item_share = 1\n[shadow]\nrequests = 30\n[schedule]\ndaily = ''")
    )
    assert (found.gates.max_item_share, found.shadow.requests, found.schedule.daily) == (1.0, 30, "")
    assert found.drift == LifecycleOptions().drift


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[gates]\nmax_share = 1", "sets gates.max_share, which is no option; there are confidence, "),
        ("[gate]\nmax_item_share = 1", "sets gate, which is no option; there are schedule, retraining, gates"),
        ("gates = 3", r"sets gates to 3, it must be a table: \[gates\]"),
        ("[gates]\nmax_item_share = '1'", "sets gates.max_item_share to '1', it must be of type float"),
        ("[gates]\nmax_item_share = 1.5", "gates.max_item_share is 1.5, must be from 0.0 to 1.0"),
        ("[gates]\nmax_score_drift = nan", "gates.max_score_drift is nan, must be at least 0"),
        ("[retraining]\nwarm_epochs = 0", "retraining.warm_epochs is 0, must be at least 1"),
        ("[retraining]\nwarm_epochs = true", "sets retraining.warm_epochs to True, it must be of type int"),
        ("[schedule]\ndaily = '0 2 * *'", "schedule.daily is '0 2 \\* \\*', must be five fields of cron"),
        ("[schedule", "is no valid TOML"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, text, why):
    with pytest.raises(UserError, match=why) as error:
        options.read(write(tmp_path, text))
    assert str(error.value).startswith("$GR_HOME/lifecycle.toml")


def test_a_recipe_that_is_a_file_lies_in_the_state_folder_or_where_it_says(tmp_path):
    assert options.read(write(tmp_path, "[retraining]\nrecipe = 'mine.toml'")).retraining.recipe == str(
        tmp_path / "mine.toml"
    )
    assert (
        options.read(write(tmp_path, "[retraining]\nrecipe = '/srv/mine.toml'")).retraining.recipe == "/srv/mine.toml"
    )
    assert options.read(write(tmp_path, "[retraining]\nrecipe = 'ml_1m'")).retraining.recipe == "ml_1m"


def test_every_table_of_the_file_is_documented_in_its_class():
    for table in fields(LifecycleOptions):
        described = type(getattr(LifecycleOptions(), table.name))
        missing = [each.name for each in fields(described) if each.name not in (described.__doc__ or "")]
        assert missing == [], table.name


def test_a_file_that_does_not_fit_stops_what_it_decides_and_nothing_else(tmp_path, monkeypatch):
    write(tmp_path, "[gates]\nmax_slice_los = 0.05\n")
    assert options.loadable(tmp_path) == LifecycleOptions()
    monkeypatch.setenv("GR_HOME", str(tmp_path))
    told = CliRunner().invoke(cli.app, ["status"])
    assert "lifecycle.toml sets gates.max_slice_los, which is no option" in told.output.replace("\n", " ")
    told = CliRunner().invoke(cli.app, ["up"])
    assert isinstance(told.exception, UserError)
    assert "gates.max_slice_los" in str(told.exception)

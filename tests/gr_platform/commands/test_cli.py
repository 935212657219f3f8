"""The command line: every command explains itself, every mistake ends in one sentence and status 2."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gr_platform import cli, settings, storage
from gr_platform.commands import demo, display, options, pipeline, services
from gr_platform.commands.query import Listed, UserAnswer, split_ids
from gr_platform.errors import UserError, sentence_for

HEAVY = ("torch", "mlflow", "dagster", "duckdb", "numpy")


def _gr(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "gr_platform.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"GR_HOME": str(home), "COLUMNS": "200"},
    )


def _one_sentence(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_help_loads_no_library() -> None:
    code = f"import sys, gr_platform.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("materialize",), "nothing was imported yet"),
        (("import", "no_such_file.csv"), "no_such_file.csv"),
        (("recommend", "--user", "1"), "no model server runs"),
        (("score", "--user", "1", "--items", "1,2"), "no model server runs"),
        (("bench", "nonsense"), "there is no benchmark 'nonsense'"),
        (("train",), "nothing was imported yet"),
        (("train", "--dataset", "d", "--recipe", "huge"), "unknown recipe 'huge'"),
        (("train", "--dataset", "d", "--recipe", "none.toml"), "cannot read the recipe file none.toml"),
        (("train", "--dataset", "d", "--recipe", "tiny-dlrm"), "train dlrm for ranking alone: gr train --kind ranking"),
        (("materialize", "--recipe", "none.toml"), "cannot read the recipe file none.toml"),
        (("train", "--dataset", "d", "--warm-start", "1234"), "has no run '1234'"),
        (("evaluate", "--dataset", "d"), "no retrieval_model yet"),
        (("evaluate", "1234", "--dataset", "d"), "has no run '1234'"),
        (("compare", "1234", "5678", "--dataset", "d"), "has no run '1234'"),
        (("simulate", "--out", "log.parquet", "--events", "5"), "at least 2000 events"),
        (("simulate", "--out", "tests"), "the folder tests holds other files"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    assert expected in _one_sentence(_gr(tmp_path / "home", *arguments))


@pytest.mark.parametrize("arguments", [("train",), ("simulate", "--out", "log.parquet")])
def test_a_seed_that_no_generator_takes_is_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = _gr(tmp_path / "home", *arguments, "--seed", "99999999999999999999")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Invalid value for '--seed'" in done.stderr


@pytest.mark.parametrize("option", ["--grpc-port", "--dagster-port"])
def test_a_port_that_is_none_is_refused(tmp_path: Path, option: str) -> None:
    done = _gr(tmp_path / "home", "up", option, "99999")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "65535" in done.stderr


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/somewhere/private/file"),
            "disk of the state folder is full",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/somewhere/private/file"), "file cannot be opened or written"),
        (RuntimeError("sqlite3: database or disk is full"), "disk of the state folder is full"),
    ],
)
def test_what_the_system_refuses_is_one_sentence_without_paths(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    expected: str,
) -> None:
    def fail() -> None:
        raise RuntimeError("a stage failed") from error

    monkeypatch.setenv("GR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr().err
    assert end.value.code == 2
    assert expected in shown
    assert "/somewhere" not in shown
    assert len(shown.strip().splitlines()) == 1


def test_errors_that_name_each_other_as_causes_end() -> None:
    first, second = RuntimeError("first"), KeyError("second")
    first.__cause__, second.__cause__ = second, first
    assert sentence_for(first) is None
    second.__cause__ = UserError("what to do")
    assert sentence_for(first) == "what to do"


def test_a_defect_inside_a_stage_ends_with_its_traceback(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert _gr(home, "simulate", "--out", str(tmp_path / "log.parquet"), "--events", "2000").returncode == 0
    assert _gr(home, "import", str(tmp_path / "log.parquet")).returncode == 0
    code = (
        "from gr_platform import cli\nfrom gr_platform.events import ingest\n"
        "def fail(*_): raise ZeroDivisionError('a defect of ours')\n"
        "ingest.ingest = fail\ncli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "materialize", "--select", "events"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"GR_HOME": str(home)},
    )
    assert done.returncode == 1
    assert "ZeroDivisionError: a defect of ours" in done.stderr


def test_a_second_run_in_the_same_state_folder_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert _gr(home, "simulate", "--out", str(tmp_path / "log.parquet"), "--events", "2000").returncode == 0
    assert _gr(home, "import", str(tmp_path / "log.parquet")).returncode == 0
    with storage.exclusive(home, "stages"):
        assert "another program works on the stages" in _one_sentence(_gr(home, "materialize", "--select", "events"))
    assert _gr(home, "materialize", "--select", "events").returncode == 0


@pytest.mark.parametrize("name", ["50%", "what?"])
def test_a_state_folder_that_no_database_address_can_hold_is_refused(tmp_path: Path, name: str) -> None:
    assert "GR_HOME has a % or ? in its path" in _one_sentence(_gr(tmp_path / name, "status"))


def test_brackets_in_a_log_are_text_and_not_markup() -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    line = Listed(item="it[bold]x", title="Alien [director's cut] [/x]", scores={"buy[/b]": 0.25})
    answer = UserAnswer(lines=[line], milliseconds=1.0, cached_tokens=0)
    console.print(display.answer_table("Top 1 for user [/u]", answer, ["buy[/b]"]))
    stages = display.StageLines(console)
    stages.line("import", 0.1, {"actions": "buy[/b]"})
    stages({"name": "check", "event": "check_failed", "reason": "action '[/y]' is not declared"})
    facts = {"hr_at_10": 0.1, "ndcg_at_10": 0.1, "mrr": 0.1}
    ranking = {"buy[/b]": {"ne": 0.9, "auc": 0.6}}
    console.print(
        display.quality_table(dict.fromkeys(("retrieval", "cooccurrence", "popularity"), facts) | {"ranking": ranking})
    )
    shown = console.export_text()
    for text in ("it[bold]x", "Alien [director's cut] [/x]", "P(buy[/b])", "user [/u]", "'[/y]'", "buy[/b]: NE"):
        assert text in shown


def test_ids_are_split_at_commas_outside_quotes() -> None:
    assert split_ids("17, 4,,99") == ["17", "4", "99"]
    assert split_ids('"tea, green",cup') == ["tea, green", "cup"]
    assert split_ids("") == []


def test_a_defect_of_ours_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("defect")

    monkeypatch.setenv("GR_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(KeyError, match="defect"):
        cli.main()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_pipeline_says_so_in_one_sentence(tmp_path: Path, number: signal.Signals) -> None:
    home = tmp_path / "home"
    assert _gr(home, "simulate", "--out", str(tmp_path / "log.parquet"), "--events", "5000").returncode == 0
    assert _gr(home, "import", str(tmp_path / "log.parquet")).returncode == 0
    running = subprocess.Popen(
        [sys.executable, "-m", "gr_platform.cli", "materialize", "--recipe", "tiny"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"GR_HOME": str(home), "COLUMNS": "200", "GR_THREADS": "1"},
    )
    assert running.stdout is not None
    for line in running.stdout:
        if "sequences" in line:
            break
    running.send_signal(number)
    _, shown = running.communicate(timeout=300)
    assert running.returncode == options.INTERRUPTED
    assert "Traceback" not in shown
    assert shown.strip().splitlines()[-1].startswith("stopped: what was finished is kept")


def test_a_killed_run_does_not_stay_started(tmp_path: Path) -> None:
    import dagster as dg

    home = tmp_path / "home"
    assert _gr(home, "simulate", "--out", str(tmp_path / "log.parquet"), "--events", "2000").returncode == 0
    assert _gr(home, "import", str(tmp_path / "log.parquet")).returncode == 0
    killed = subprocess.Popen(
        [sys.executable, "-m", "gr_platform.cli", "materialize", "--recipe", "tiny"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"GR_HOME": str(home), "GR_THREADS": "1"},
    )
    assert killed.stdout is not None
    assert "events" in killed.stdout.readline()
    killed.kill()
    killed.communicate()

    def statuses() -> list[str]:
        with dg.DagsterInstance.from_config(str(home / "dagster_home")) as instance:
            return sorted(record.dagster_run.status.value for record in instance.get_run_records())

    assert statuses() == ["STARTED"]
    pipeline.materialize(home, home / "dagster_home", select=["events"])
    assert statuses() == ["FAILURE", "SUCCESS"]


def test_a_message_names_the_state_folder_as_it_can_be_pasted(tmp_path: Path) -> None:
    (tmp_path / services.RECORD).write_text("{")
    shown = _one_sentence(_gr(tmp_path, "down"))
    assert f"{tmp_path}/{services.RECORD} is damaged" in shown
    assert "$GR_HOME" not in shown


def test_a_recipe_that_is_none_is_refused_before_anything_runs(tmp_path: Path) -> None:
    assert "unknown recipe 'huge'" in _one_sentence(_gr(tmp_path / "home", "demo", "--recipe", "huge"))
    assert not (tmp_path / "home" / "landing").exists()


def test_the_demo_names_the_command_that_takes_the_option_it_lacks(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user,item,when\n1,2,3\n")
    shown = _one_sentence(_gr(tmp_path / "home", "demo", "--data", str(log)))
    assert "--time-column" in shown
    assert "gr import takes that option" in shown


def test_quarantined_rows_are_shown_by_rule_and_where_they_are() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    figures = {"rows_in": 9, "rows_kept": 6, "duplicates": 0, "quarantined": 3, "num_events": 6}
    display.StageLines(console).line("events", 0.1, figures | {"quarantined_nan_value": 3})
    shown = console.export_text()
    assert "quarantined: nan_value 3" in shown
    assert "quarantine-0.parquet" in shown


@pytest.mark.parametrize("value", ["abc", "0", "-1", "1.5"])
def test_a_number_of_threads_that_is_none_is_one_sentence(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("GR_THREADS", value)
    with pytest.raises(UserError, match="GR_THREADS is"):
        settings.num_threads()


def test_a_log_is_imported_and_then_seen_by_status(tmp_path: Path) -> None:
    log = tmp_path / "shop.csv"
    rows = [f"{user},{item},view,{1_700_000_000 + user * 60 + item}" for user in range(20) for item in range(5)]
    log.write_text("user_id,item_id,action,timestamp\n" + "\n".join(rows) + "\n")
    done = _gr(tmp_path / "home", "import", str(log))
    assert done.returncode == 0, done.stderr
    assert "100 rows in data set shop" in done.stdout
    assert "understood as" in done.stdout
    status = _gr(tmp_path / "home", "status")
    assert "data set shop (active)" in status.stdout
    assert "model server  not running" in status.stdout
    assert "nothing was running" in _gr(tmp_path / "home", "down").stdout


def test_a_state_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "set GR_HOME" in _one_sentence(_gr(tmp_path / "file" / "home", "status"))


def test_a_log_file_that_cannot_be_opened_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "logs" / "gr.log").mkdir(parents=True)
    assert "cannot write to the state folder" in _one_sentence(_gr(tmp_path, "status"))


def test_an_answer_is_shown_with_titles_only_where_there_are_any() -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    plain = UserAnswer(lines=[Listed(item=7, title="", scores={"like": 0.25})], milliseconds=1.0, cached_tokens=3)
    titled = UserAnswer(lines=[Listed(item=7, title="Blue", scores={"like": 0.25})], milliseconds=1.0, cached_tokens=3)
    console.print(display.answer_table("Top", plain, ["like"]))
    assert "title" not in console.export_text()
    console.print(display.answer_table("Top", titled, ["like"]))
    text = console.export_text()
    assert "Blue" in text
    assert "0.2500" in text


def test_the_simulated_log_is_written_once(tmp_path: Path) -> None:
    first = demo.simulated(tmp_path, 2_000)
    stamp = first.stat().st_mtime_ns
    assert demo.simulated(tmp_path, 2_000) == first
    assert first.stat().st_mtime_ns == stamp

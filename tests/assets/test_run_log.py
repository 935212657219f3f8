"""Lines that libraries log during a Dagster run carry the run's id, whoever started it."""

import logging
import re
import subprocess
import sys

import dagster as dg

from assets.materialization import Stage
from assets.resources import StateFolder
from gr_platform import run_log

log = logging.getLogger("gr_platform.tests.assets")


@dg.asset
def first(platform: StateFolder) -> dg.MaterializeResult:
    """Log from the asset's own thread."""
    stage = Stage("first")
    log.info("event=working dataset=%s", platform.dataset)
    return stage.finish(digest="d", reused=False, figures={})


@dg.asset_check(asset=first)
def looked_at(platform: StateFolder) -> dg.AssetCheckResult:
    """Log from a check."""
    log.info("event=checked dataset=%s", platform.dataset)
    return dg.AssetCheckResult(passed=True)


def _run(home, dataset):
    with dg.instance_for_test() as instance:
        done = dg.materialize(
            [first, looked_at],
            instance=instance,
            resources={"platform": StateFolder(home=str(home), dataset=dataset)},
        )
    assert done.success
    return done.run_id


def test_every_line_of_a_run_carries_its_id_in_assets_and_checks(tmp_path):
    run = _run(tmp_path, "mine")
    lines = (tmp_path / run_log.FILE).read_text().splitlines()
    ours = [line for line in lines if " gr.stages " in line or log.name in line]
    events = [re.search(rf"run={run} event=(\w+)", line)[1] for line in ours]
    assert events == ["started", "working", "finished", "checked"]
    assert run_log.current() != run


def test_two_runs_at_once_write_one_file_and_do_not_mix_ids(tmp_path):
    # In processes of their own, as Dagster starts them: it has a deadlock of its own where threads share one.
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('one', {__file__!r}); m = u.module_from_spec(s); "
    )
    code += "import sys; sys.modules['one'] = m; s.loader.exec_module(m); "
    code += f"from pathlib import Path; print(m._run(Path({str(tmp_path)!r}), sys.argv[1]))"
    started = [subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE, text=True) for name in "ab"]
    runs = {name: each.communicate(timeout=300)[0].split()[-1] for name, each in zip("ab", started, strict=True)}
    assert runs["a"] != runs["b"]
    lines = (tmp_path / run_log.FILE).read_text().splitlines()
    told = [re.search(r"run=(\S+) event=(?:working|checked) dataset=(\w)", line) for line in lines]
    assert sorted((each[2], each[1]) for each in told if each) == sorted(2 * list(runs.items()))

"""Every experiment end to end at smoke scale: nothing missing, nothing run twice, nothing lost when killed."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gr_platform import storage
from gr_platform.commands import experiment as command
from gr_platform.errors import UserError
from gr_platform.experiments import costs, data, efficiency, passes, protocols, render
from gr_platform.experiments import run as running
from gr_platform.experiments.catalogue import experiments, named
from gr_platform.experiments.report import means, recorded_rows, report, write
from gr_platform.experiments.run import Busy, run_cell, run_cells
from gr_platform.models.recipes import RECIPES

NAMES = list(experiments())


@pytest.mark.parametrize("name", NAMES)
def test_the_report_has_every_cell_with_finite_figures_and_where_they_come_from(lab: Path, name: str) -> None:
    experiment = named(name, "smoke")
    found = report(lab, experiment)
    assert found["missing"] == []
    assert [row["cell"] for row in found["rows"]] == [cell.name for cell in experiment.cells]
    for row in found["rows"]:
        assert row["figures"]
        assert all(value is None or math.isfinite(value) for value in row["figures"].values())
        assert [name for name in ("digest", "machine", "date") if not row[name]] == []
        assert row["command"] == f"gr experiment {name} --cell {row['cell']}"
    section = render.section(found, "picture.png")
    for cell in experiment.cells:
        assert f"| {cell.label} |" in section
    assert render.plot(found).startswith(b"\x89PNG")
    assert len(render.plot(found)) < 50_000


@pytest.mark.parametrize("name", NAMES)
def test_running_again_reuses_every_cell(lab: Path, name: str) -> None:
    done = list(run_cells(lab, named(name, "smoke"), progress=False))
    assert [cell.name for cell, result in done if result is None or not result.reused] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_of_a_table_is_one_that_some_cell_has_or_someone_published(lab: Path, name: str) -> None:
    experiment = named(name, "smoke")
    found = report(lab, experiment)
    # What this scale cannot have: tasks of another data set, long sequences.
    absent = {f"{figure}_{task}" for figure in ("ne", "auc") for task in ("cart", "buy")}
    absent |= {f"{figure}_{n}" for figure in efficiency.FIGURES for n in costs.EFFICIENCY_LENGTHS[1:]}
    for table in experiment.tables:
        rows = [row for row in found["rows"] if row["group"] == table.group]
        for figure in set(table.columns) - absent:
            assert means(rows, figure) is not None, (name, figure)


def test_at_full_scale_every_cell_is_named_once_and_its_recipe_differs_from_the_others_of_its_experiment() -> None:
    for experiment in experiments().values():
        described = [
            json.dumps([cell.protocol, cell.dataset, dict(cell.options), cell.recipe and cell.recipe.to_json()])
            for cell in experiment.cells
        ]
        assert len(set(described)) == len(described), experiment.name


def test_experiments_that_ask_for_the_same_training_share_it() -> None:
    table, ablation, thinning = (named(name) for name in ("ml_1m", "rab_ablation", "stochastic_length"))
    first = running._spec(table.cell("hstu-seed-1"), "sequences")
    assert running._spec(ablation.cell("full"), "sequences") == first
    assert running._spec(thinning.cell("alpha-2"), "sequences") == first
    assert running._spec(table.cell("hstu-seed-2"), "sequences") != first


def test_a_killed_training_goes_on_from_its_checkpoint(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = _copy(lab, tmp_path)
    experiment = named("generative_training", "smoke")
    cell = experiment.cell("generative")
    whole = run_cell(home, experiment, cell, progress=False)
    storage.discard(whole.folder)
    killed_at, steps = 2, []
    real = passes.Generative.__call__

    def counted(self: Any, step: int) -> Any:
        steps.append(step)
        if len(steps) == killed_at + 1:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(passes.Generative, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        run_cell(home, experiment, cell, progress=False)
    again = run_cell(home, experiment, cell, progress=False)
    assert steps[killed_at + 1] == killed_at
    assert _without_time(again) == _without_time(whole)
    assert not list(running.results(home).glob(".checkpoint-*"))


def test_a_cell_killed_after_its_training_only_judges_again(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = _copy(lab, tmp_path)
    experiment = named("amazon_sports", "smoke")
    cell = experiment.cell("hstu")
    whole = run_cell(home, experiment, cell, progress=False)
    storage.discard(whole.folder)
    real = protocols._retrieval
    monkeypatch.setattr(protocols, "_retrieval", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_cell(home, experiment, cell, progress=False)
    assert list(running.results(home).glob(".checkpoint-*"))
    monkeypatch.setattr(protocols, "_retrieval", real)
    again = run_cell(home, experiment, cell, progress=False)
    assert again.manifest.files["targets.parquet"] == whole.manifest.files["targets.parquet"]
    assert again.manifest.facts["figures"]["hr_at_200"] == whole.manifest.facts["figures"]["hr_at_200"]


def test_a_cell_that_another_process_works_on_is_passed_over(lab: Path, tmp_path: Path) -> None:
    home = _copy(lab, tmp_path)
    experiment = named("stochastic_length", "smoke")
    cell = experiment.cell("sparsity-1024")
    name = storage.digest_of(running._spec(cell, ""))[:16]
    code = (
        "import sys, pathlib; from gr_platform import storage\n"
        f"with storage.exclusive(pathlib.Path({str(running.results(home))!r}), 'cell-{name}'):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(Busy, match="sparsity-1024"):
            run_cell(home, experiment, cell)
        passed = [cell.name for cell, result in run_cells(home, experiment, progress=False) if result is None]
        other.communicate()
    assert passed == ["sparsity-1024"]


def test_a_data_set_that_is_nowhere_is_a_sentence_that_names_the_file(tmp_path: Path) -> None:
    experiment = named("ml_1m")
    with pytest.raises(UserError, match=r"--data FOLDER.*gr import"):
        run_cell(tmp_path, experiment, experiment.cells[0])
    with pytest.raises(UserError, match=r"holds no ml-1m/ratings\.parquet"):
        run_cell(tmp_path, experiment, experiment.cells[0], folder=tmp_path)
    assert data.digest(tmp_path, "ml-1m") is None


def test_a_missing_cell_and_a_missed_target_are_said(lab: Path, tmp_path: Path) -> None:
    experiment = named("ml_1m")
    found = report(lab, experiment)
    assert found["rows"] == []
    said = render.section(found)
    assert "not run yet: popularity" in said
    assert "HSTU: hr_at_10 >= 0.3226 within 0.006: not measured yet" in said
    write(found, tmp_path / "ml_1m.json")
    assert json.loads((tmp_path / "ml_1m.json").read_text(encoding="utf-8")) == found


def test_what_another_machine_found_is_not_run_again(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, file = named("retailrocket", "smoke"), tmp_path / "found.json"
    there = report(lab, experiment)
    write(there | {"rows": there["rows"][:-1]}, file)
    monkeypatch.setattr("gr_platform.registry.experiments.log_cell", lambda *_: "")
    monkeypatch.setattr("gr_platform.registry.experiments.log_report", lambda *_: "")
    said = "\n".join(command.run(tmp_path / "elsewhere", "retailrocket", json=file, scale="smoke"))
    assert said.count("found on") == len(experiment.cells) - 1
    assert [cell.name for cell in experiment.cells if running.find_cell(tmp_path / "elsewhere", cell)] == ["sasrec"]
    again = json.loads(file.read_text(encoding="utf-8"))
    assert [row["digest"] for row in again["rows"][:-1]] == [row["digest"] for row in there["rows"][:-1]]
    assert again["missing"] == []


def test_a_row_of_another_recipe_is_not_taken_for_the_cells_own(lab: Path, tmp_path: Path) -> None:
    experiment, file = named("amazon_sports", "smoke"), tmp_path / "found.json"
    write(report(lab, experiment), file)
    recorded = recorded_rows(file)
    assert report(tmp_path, experiment, recorded)["rows"] == []  # its data is not there, so nothing can be said of it
    data.prepare(tmp_path, "smoke", None)
    assert len(report(tmp_path, experiment, recorded)["rows"]) == len(experiment.cells)
    cells = [replace(c, recipe=c.recipe and c.recipe.with_training(seed=9)) for c in experiment.cells]
    other = report(tmp_path, replace(experiment, cells=tuple(cells)), recorded)
    assert [row["cell"] for row in other["rows"]] == ["popularity", "cooccurrence"]
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match=r"found\.json is no report"):
        recorded_rows(file)


def test_unknown_names_are_sentences() -> None:
    with pytest.raises(UserError, match="there is no experiment 'x'"):
        named("x")
    with pytest.raises(UserError, match="has no cell 'x'"):
        named("ml_1m").cell("x")


def test_the_ml_1m_recipe_is_the_one_of_the_table() -> None:
    assert named("ml_1m").cell("hstu-seed-1").recipe == RECIPES["ml_1m"]("retrieval").with_training(seed=1)


def _copy(lab: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lab, tmp_path / "home", symlinks=True))


def _interrupted(*_: Any) -> dict[str, Any]:
    raise KeyboardInterrupt


def _without_time(result: storage.Result) -> dict[str, float]:
    figures: dict[str, float] = result.manifest.facts["figures"]
    return {name: value for name, value in figures.items() if name != "train_seconds"}

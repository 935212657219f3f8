"""What the documentation says is there: links, commands, figures."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from gr_platform import cli, settings

ROOT = settings.PROJECT_ROOT
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_that_is_named_exists(page: Path) -> None:
    known = {info.name or (info.callback.__name__ if info.callback else "") for info in cli.app.registered_commands}
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^    |`|; )gr ([a-z]+)", text, re.MULTILINE))
    assert named - known == set()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z]+)", text, re.MULTILINE)) - targets == set()


@pytest.mark.parametrize("name", ["benchmarks/README.md", "kernels.md"])
def test_the_tables_of_a_page_are_those_of_its_files(load_script: Callable[[str], ModuleType], name: str) -> None:
    make = load_script("docs/benchmarks/make.py")
    page = ROOT / "docs" / name
    assert page in make.PAGES
    text = page.read_text(encoding="utf-8")
    assert make.BLOCK.findall(text)
    assert make.render(text) == text


def test_the_predictions_that_prose_quotes_are_those_of_the_table() -> None:
    rows = json.loads((ROOT / "docs/benchmarks/roofline.json").read_text(encoding="utf-8"))
    text = " ".join((ROOT / "docs/kernels.md").read_text(encoding="utf-8").split())
    with_rab, without = (row["value"] for row in rows if row.get("against_ms"))
    assert f"We predict {with_rab:.1f} ms for ours" in text
    assert f"Without rab ours would take {without:.1f} ms" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_python_example_runs(page: Path) -> None:
    for example in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(example, page.name, "exec"), {})


def test_times_by_length_become_a_small_picture(load_script: Callable[[str], ModuleType]) -> None:
    plots = load_script("docs/benchmarks/plots.py")
    named = [
        f"{direction}, {variant}, 32 users of {n}"
        for direction in ("forward", "backward")
        for variant in ("padded eager", "ours")
        for n in (128, 256)
    ]
    rows = [{"name": name, "value": 1.0 + index} for index, name in enumerate([*named, "forward, ours", "ratio"])]
    assert plots.times_by_length(rows)["backward"]["ours"] == [(128, 7.0), (256, 8.0)]
    assert plots.attention_lengths(rows).startswith(b"\x89PNG")
    assert plots.attention_lengths(rows[-2:]) is None


def test_every_plot_is_on_a_page_and_small(load_script: Callable[[str], ModuleType]) -> None:
    plots = load_script("docs/benchmarks/plots.py")
    pages = "".join(
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("benchmarks/README.md", "kernels.md")
    )
    for plot in (plot for drawn in plots.PLOTS.values() for plot in drawn):
        assert f"images/{plot.__name__}.png" in pages
        assert (plots.IMAGES / f"{plot.__name__}.png").stat().st_size < 70_000


def test_compiled_and_predicted_rows_become_one_line_a_kernel(load_script: Callable[[str], ModuleType]) -> None:
    make = load_script("docs/benchmarks/make.py")
    taken = {"registers": 64, "shared_bytes": 2048, "occupancy": 0.5, "machine": "m", "date": "d"}
    names = {"op": "o", "kernel": "k", "label": "bf16"}
    rows = [names | taken | {"arch": arch, "value": spilled} for arch, spilled in (("sm_80", 0), ("sm_90", 12))]
    assert "| o | k | bf16 | 64 / 2.0 / 50 | 64 / 2.0 / 50 / **12 B** |" in make.table(rows)
    both = make.table([*rows, *[row | {"op": "hstu_attention"} for row in rows]])
    assert both.index("| hstu_attention | k |") < both.index("<details>") < both.index("| o | k |")
    rows = [{"kernel": "k", "shape": "s", "gpu": gpu, "value": 2.0, "against_ms": 3.0} for gpu in ("A", "B")]
    assert "| k | s |  |  |  | 2; authors measured: 3.00 | 2; authors measured: 3.00 |" in make.table(rows)

"""What the documentation says is there: links, commands, figures."""

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


def test_the_tables_of_the_benchmark_page_are_those_of_its_files(load_script: Callable[[str], ModuleType]) -> None:
    make = load_script("docs/benchmarks/make.py")
    page = make.PAGE.read_text(encoding="utf-8")
    assert page.count("| row | value |") >= 2
    assert make.render(page) == page

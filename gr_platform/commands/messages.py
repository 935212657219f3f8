"""What `gr` says in words: its lines, its one sentence for a fault, and paths as they can be pasted.

Invariant: only light modules are imported, since every command begins here; texts are shown as they are, without
markup.
"""

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from gr_platform import settings


def say(text: str) -> None:
    """Print one line, exactly as it is."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def say_each(lines: Iterable[str]) -> None:
    """Print lines as they come: what happens between them happens between."""
    for line in lines:
        say(line)


def complain(what: str, sentence: str) -> None:
    """Print the sentence for a fault to stderr, with the state folder as the person at this terminal can paste it."""
    Console(stderr=True).print(f"[red]{what}:[/] {escape(spelt_out(sentence))}", highlight=False, soft_wrap=True)


def spelt_out(sentence: str) -> str:
    """Return a sentence of the library with the state folder in place of $GR_HOME."""
    return sentence.replace("$GR_HOME", pasteable(settings.home())) if "$GR_HOME/" in sentence else sentence


def pasteable(path: Path) -> str:
    """Return a path relative to the working folder where it lies inside."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

"""What a training shows while it runs: a bar to a person at a terminal, a line an epoch to a file.

Invariant: all of it goes to stderr, since results go to stdout; nothing that is computed depends on it.
"""

import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from tqdm import tqdm


def bar(label: str, num_steps: int, *, wanted: bool) -> "tqdm[NoReturn]":
    """Return a bar over an epoch's steps, which shows nothing without a terminal or where it is not wanted."""
    return tqdm(total=num_steps, desc=label, leave=False, disable=None if wanted else True)


def say(text: str) -> None:
    """Print a line above the bar, if there is one."""
    tqdm.write(text, file=sys.stderr)


def say_epoch(label: str, entry: Mapping[str, Any], seconds: float) -> None:
    """Print the line of a finished epoch, unless a bar is there to be watched; entry: its loss, tokens and figures."""
    if not sys.stderr.isatty():
        figures = (f"{name} {value:.4f}" for name, value in entry.items() if isinstance(value, float))
        speed = f"{entry['tokens'] / max(seconds, 1e-9):,.0f} tokens/s"
        say(f"{label}: {', '.join((*figures, speed))}, {seconds:,.0f} s")

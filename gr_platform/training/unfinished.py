"""Trainings that were begun and have no result yet, as their checkpoints say of themselves.

Invariant: reading only, and without torch, so that `gr status` answers at once. Whether one still runs is not told: a
training that was killed leaves the same file.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

CHECKPOINT = "checkpoint.safetensors"
FOLDERS = ".checkpoint-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """A training to go on with: where it stands, and how long ago that was written."""

    folder: Path
    recipe: str
    kind: str
    seed: int
    phase: str
    num_epochs: int
    age_s: float


def unfinished(runs: Path) -> Iterator[Unfinished]:
    """Yield the unfinished trainings of a data set's folder of runs; a checkpoint that cannot be read is left out."""
    for path in sorted(runs.glob(f"{FOLDERS}*/{CHECKPOINT}")):
        try:
            header, _ = header_of(path)
            recipe, progress = header["of"]["recipe"], header["progress"]
            epochs = [entry for entry in progress["curves"] if entry["phase"] == progress["phase"]]
            yield Unfinished(
                folder=path.parent,
                recipe=recipe["name"],
                kind=recipe["model"]["kind"],
                seed=recipe["training"]["seed"],
                phase=progress["phase"],
                num_epochs=len(epochs),
                age_s=max(0.0, time.time() - path.stat().st_mtime),
            )
        except (ValueError, LookupError, TypeError, OSError):
            continue


def header_of(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what a checkpoint says of itself, and the texts that it says it with.

    Raises ValueError if the file is damaged.
    """
    try:
        with safe_open(path, framework="np") as opened:
            texts: dict[str, str] = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    header = json.loads(texts.get("header", "{}"))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, texts

"""A resumable state of training as one safetensors file: weights, best weights, optimiser; its header holds JSON.

Invariant: one file replaced by one rename, so a checkpoint is whole or absent; nothing in it is pickled.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gr_platform.errors import UserError

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_VERSION = 2

State = dict[str, torch.Tensor]


@dataclass(kw_only=True)
class Progress:
    """What has happened so far: each epoch's figures, goal (higher is better) and seconds; the best weights.

    cursor: the place of the reader (sequences/reader.py) to go on from.
    """

    curves: list[dict[str, Any]] = field(default_factory=list)
    goals: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    best_epoch: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)
    best: State = field(default_factory=dict)

    @property
    def num_epochs(self) -> int:
        """Finished epochs."""
        return len(self.curves)


def copy_state(model: torch.nn.Module) -> State:
    """Return the model's weights as contiguous copies that share no memory."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}


def save_checkpoint(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, done: Progress) -> Path:
    """Replace the folder's checkpoint by the state after epoch `done.num_epochs` and return its path."""
    tensors = {f"model.{name}": tensor for name, tensor in copy_state(model).items()}
    tensors |= {f"best.{name}": tensor for name, tensor in done.best.items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{slot}": torch.as_tensor(value).clone() for slot, value in slots.items()}
    header = {
        "version": CHECKPOINT_VERSION,
        "curves": done.curves,
        "goals": done.goals,
        "seconds": done.seconds,
        "best_epoch": done.best_epoch,
        "cursor": done.cursor,
    }
    folder.mkdir(parents=True, exist_ok=True)
    writing = folder / f".writing-{os.getpid()}"
    try:
        save_file(tensors, writing, metadata={"progress": json.dumps(header, allow_nan=False)})
        with writing.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(writing, folder / CHECKPOINT)
    finally:
        writing.unlink(missing_ok=True)
    return folder / CHECKPOINT


def load_checkpoint(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
    """Return the folder's progress with model and optimiser set to it, or None if the folder holds no checkpoint.

    Raises UserError if the file is damaged or of another version.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get("progress", "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise UserError(f"{folder.name}/{path.name} is damaged ({error}); delete that folder and train again") from None
    if header.get("version") != CHECKPOINT_VERSION:
        raise UserError(
            f"{folder.name}/{path.name} has version {header.get('version')}, this release reads {CHECKPOINT_VERSION}; "
            "delete that folder and train again"
        )
    model.load_state_dict(_part(tensors, "model."))
    slots: dict[int, State] = {}
    for name, tensor in _part(tensors, "optimizer.").items():
        index, slot = name.split(".", 1)
        slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return Progress(
        curves=header["curves"],
        goals=header["goals"],
        seconds=header["seconds"],
        best_epoch=header["best_epoch"],
        cursor=header["cursor"],
        best=_part(tensors, "best."),
    )


def _part(tensors: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

"""A resumable state of training as one safetensors file: weights, best weights, optimiser; its header holds JSON.

Invariant: one file replaced by one rename, so a checkpoint is whole or absent; nothing in it is pickled. It says what
it is of, and serves nothing else. Where its tensors were, CPU or GPU, it does not say: they go to the model's device.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gr_platform.errors import UserError
from gr_platform.training.optim import Optimizer

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_VERSION = 3
# How much work a killed process may lose. A checkpoint of an ML-1M model takes some 10 ms.
CHECKPOINT_SECONDS = 300.0

State = dict[str, torch.Tensor]
PhaseName = Literal["validation", "refit"]


@dataclass(kw_only=True)
class Sums:
    """What an epoch has seen so far: the summed loss of its targets, and what they took."""

    loss: float = 0.0
    num_targets: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0


@dataclass(kw_only=True)
class Progress:
    """What has happened so far.

    curves: figures of every finished epoch, of both phases (its entry `phase`). goals: of each epoch of validation,
    higher is better; best: the weights of the best one, best_epoch. seconds, flops: of each finished epoch. cursor: the
    place of the reader (sequences/reader.py) to go on from; sums: of the epoch that it stands in.
    """

    phase: PhaseName = "validation"
    curves: list[dict[str, Any]] = field(default_factory=list)
    goals: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    best_epoch: int = 0
    cursor: dict[str, Any] = field(default_factory=dict)
    sums: Sums = field(default_factory=Sums)
    best: State = field(default_factory=dict)

    @property
    def num_epochs(self) -> int:
        """Finished epochs of this phase."""
        return sum(entry.get("phase", "validation") == self.phase for entry in self.curves)


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was read: what had happened, and the tensors."""

    progress: Progress
    tensors: State

    def restore(self, model: torch.nn.Module, optimizer: Optimizer) -> Progress:
        """Set model and optimiser to the saved state, which is then let go, and return the progress."""
        model.load_state_dict(_part(self.tensors, "model."))
        optimizer.load(_part(self.tensors, "optimizer."))
        self.tensors.clear()
        return self.progress


def copy_state(model: torch.nn.Module) -> State:
    """Return the model's weights as contiguous copies in main memory that share nothing."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}


def save_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizer: Optimizer,
    done: Progress,
    of: Mapping[str, Any] | None = None,
) -> Path:
    """Replace the folder's checkpoint by the state at `done.cursor` and return its path.

    of: what the run is a function of, a JSON-able mapping; `load_checkpoint` compares it.
    """
    tensors = {f"model.{name}": tensor for name, tensor in copy_state(model).items()}
    tensors |= {f"best.{name}": tensor for name, tensor in done.best.items()}
    tensors |= {f"optimizer.{name}": tensor.cpu().contiguous() for name, tensor in optimizer.state().items()}
    progress = {each.name: getattr(done, each.name) for each in fields(done) if each.name != "best"}
    progress["sums"] = asdict(done.sums)
    header = {"version": CHECKPOINT_VERSION, "of": dict(of or {}), "progress": progress}
    folder.mkdir(parents=True, exist_ok=True)
    writing = folder / f".writing-{os.getpid()}"
    try:
        save_file(tensors, writing, metadata={"header": json.dumps(header, allow_nan=False)})
        with writing.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(writing, folder / CHECKPOINT)
    finally:
        writing.unlink(missing_ok=True)
    return folder / CHECKPOINT


def load_checkpoint(folder: Path, of: Mapping[str, Any] | None = None) -> Saved | None:
    """Return the folder's checkpoint, or None if it holds none.

    Raises UserError if the file is damaged, of another version, or of another run than `of`.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get("header", "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise UserError(f"{folder.name}/{path.name} is damaged ({error}); delete that folder and train again") from None
    if header.get("version") != CHECKPOINT_VERSION:
        raise UserError(
            f"{folder.name}/{path.name} has version {header.get('version')}, this release reads {CHECKPOINT_VERSION}; "
            "delete that folder and train again"
        )
    _require_same(folder, header["of"], json.loads(json.dumps(dict(of or {}))))
    progress = header["progress"] | {"sums": Sums(**header["progress"]["sums"])}
    return Saved(Progress(**progress, best=_part(tensors, "best.")), tensors)


def _require_same(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UserError naming the first entry in which a checkpoint is of another run."""
    theirs, ours = _flat(saved), _flat(wanted)
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"the checkpoint in {folder.name} belongs to another run: its {name} is {theirs.get(name)}, this one's "
                f"is {ours.get(name)}; train with the same again, or delete that folder to start anew"
            )


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _part(tensors: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

"""A resumable state of training as one safetensors file: weights, best weights, optimiser; its header holds JSON.

Invariant: one file replaced by one rename, so a checkpoint is whole or absent; nothing in it is pickled. It says what
it is of, and serves nothing else; a digest shows that not a byte was changed since. Where its tensors were, CPU or GPU,
it does not say: they go to the model's device.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gr_platform.errors import UserError
from gr_platform.storage import shown
from gr_platform.training.optim import Optimizer
from gr_platform.training.unfinished import CHECKPOINT, header_of

# Raised when an older file cannot be gone on from: 4 brought the digest. No part of any result's key.
CHECKPOINT_VERSION = 4
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
    said = {"version": CHECKPOINT_VERSION, "of": dict(of or {}), "progress": progress}
    header = json.dumps(said, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    writing = folder / f".writing-{os.getpid()}"
    try:
        save_file(tensors, writing, metadata={"header": header, "digest": _digest(header, tensors)})
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
    where, mend = f"{shown(folder)}/{path.name}", f"delete {shown(folder)} and train again"
    try:
        header, texts = header_of(path)
        if header.get("version") != CHECKPOINT_VERSION:
            version = header.get("version")
            raise UserError(f"{where} has version {version}, this release reads {CHECKPOINT_VERSION}; {mend}")
        tensors = load_file(path)
        if texts.get("digest") != _digest(texts["header"], tensors):
            raise ValueError("its content is not what was written")
    except (SafetensorError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} is damaged ({error}); {mend}") from None
    _require_same(folder, header["of"], json.loads(json.dumps(dict(of or {}))))
    progress = header["progress"] | {"sums": Sums(**header["progress"]["sums"])}
    return Saved(Progress(**progress, best=_part(tensors, "best.")), tensors)


def _digest(header: str, tensors: State) -> str:
    """Return the digest of a file's content: of its header, and of each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _require_same(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UserError naming the first entry in which a checkpoint is of another run."""
    theirs, ours = _flat(saved), _flat(wanted)
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"the checkpoint in {shown(folder)} belongs to another run: its {name} is {theirs.get(name)}, this "
                f"one's is {ours.get(name)}; train with the same again, or delete that folder to start anew"
            )


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _part(tensors: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

"""Trained pairs as faults leave them: a version's run and bundle with something wrong in them, registered."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gr_platform import storage
from gr_platform.bundle.load import model_digest
from gr_platform.lifecycle.folders import bundle_of, run_of
from gr_platform.models.config import Kind
from gr_platform.registry import tracking, versions
from gr_platform.registry.versions import Version

DS = "simulated"
Change = Callable[[Path], None]


def pair_of(home: Path, number: str) -> dict[Kind, Version]:
    """Return the registered versions of a number."""
    return {kind: versions.numbered(home, versions.model_name(DS, kind), number) for kind in versions.KINDS}


def spoiled(
    home: Path,
    pair: Mapping[Kind, Version],
    name: str,
    *,
    run: Change = lambda _: None,
    bundle: Change = lambda _: None,
    facts: Mapping[str, Any] | None = None,
    split: bool = True,
) -> dict[Kind, Version]:
    """Return a pair like another one, registered, but for what `run` and `bundle` change in its folders.

    facts: in place of those of the runs' manifests; split: whether the runs say that they were trained by time.
    """
    return {
        kind: _register(home, kind, version, *_copied(home, kind, version, name, (run, bundle), facts or {}, split))
        for kind, version in pair.items()
    }


def weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Return what changes every weight of a run's or bundle's model."""

    def changed(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        save_file({name: change(tensor) for name, tensor in state.items()}, folder / "model.safetensors")

    return changed


def noise(tensor: torch.Tensor) -> torch.Tensor:
    """Return weights that have nothing to do with what was learned, always the same ones."""
    if not tensor.is_floating_point():
        return tensor
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)) * tensor.std(unbiased=False).add(0.05)


def nan(tensor: torch.Tensor) -> torch.Tensor:
    """Return weights of which the first is NaN."""
    if tensor.is_floating_point():
        tensor = tensor.clone()
        tensor.view(-1)[0] = float("nan")
    return tensor


def _copied(
    home: Path,
    kind: Kind,
    version: Version,
    name: str,
    changes: tuple[Change, Change],
    facts: Mapping[str, Any],
    split: bool,
) -> tuple[Path, str]:
    """Return the copy of a run's folder and its digest, after copying the bundle too."""
    source = run_of(home, DS, version)
    folder = source.with_name(f"{kind}_model-{name}")
    shutil.copytree(source, folder)
    changes[0](folder)
    made = storage.read_manifest(source)
    spec = {key: value for key, value in made.spec.items() if split or key != "split"} | {"spoiled": name}
    digest = storage.write_manifest(folder, kind=made.kind, spec=spec, facts=made.facts | facts).digest
    source = bundle_of(home, DS, kind, version)
    bundle = source.with_name(f"{kind}-{name}")
    shutil.copytree(source, bundle)
    changes[1](bundle)
    made = storage.read_manifest(source)
    files = {each: storage.file_sha256(bundle / each) for each in made.files}
    facts = made.facts | {"model_digest": model_digest(made.facts, files)}
    storage.write_manifest(bundle, kind=made.kind, spec=made.spec | {"run": digest, "spoiled": name}, facts=facts)
    return folder, digest


def _register(home: Path, kind: Kind, like: Version, folder: Path, digest: str) -> Version:
    client = tracking.connect(home)
    source = client.get_model_version(like.name, like.version).source
    tags = {tracking.RUN_DIGEST: digest, "gr.run_folder": folder.name}
    made = client.create_model_version(like.name, source=source, run_id=like.run_id, tags=tags)
    return versions.numbered(home, like.name, str(made.version))

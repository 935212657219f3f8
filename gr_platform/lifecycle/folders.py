"""Where the files of a registered version lie: its run and its bundle.

Invariant: reading only; nothing heavy is imported, since sensors ask too.
"""

from pathlib import Path

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.models.config import Kind
from gr_platform.registry.versions import Version


def run_of(home: Path, ds: str, version: Version) -> Path:
    """Return the run folder that a version was made from. Raises UserError if it is gone."""
    folder = home / "runs" / ds / version.tags.get("gr.run_folder", "-")
    if not (folder / storage.MANIFEST).is_file():
        raise UserError(
            f"the run of {version.name} version {version.version} is gone, so it cannot be judged; restore it from a "
            "backup, or train again from scratch: gr retrain --start scratch"
        )
    return folder


def bundle_of(home: Path, ds: str, kind: Kind, version: Version) -> Path:
    """Return the bundle folder that was exported from a version's run: the current one if it is, else the youngest.

    A damaged bundle of another version is passed over. Raises UserError if there is none.
    """
    parent = home / "bundles" / ds
    pointer = parent / f"{kind}.current"
    current = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.exists() else ""
    folders = sorted(parent.glob(f"{kind}-*"), key=lambda each: (each.name != current, -each.stat().st_mtime))
    damaged = []
    for folder in folders:
        try:
            run = storage.read_manifest(folder).spec.get("run")
        except UserError as error:
            damaged.append(str(error))
            continue
        if run == version.run_digest:
            return folder
    why = f" ({damaged[0]})" if damaged else ""
    raise UserError(f"{version.name} version {version.version} has no bundle; run gr materialize --select bundle{why}")

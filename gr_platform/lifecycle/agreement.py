"""Whether the model server's repository holds the pair that the alias `champion` names.

Invariant: reading only. A promotion moves the alias after the server, so what differs for a moment need not be mended.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from gr_platform import settings, storage
from gr_platform.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The data set, and what its champion is and what is served instead, the same text while nothing changes."""

    dataset: str
    text: str


def signature(home: Path) -> str:
    """Return what changes when the registry's file or the repository does, '' where the registry is no file of ours."""
    if settings.mlflow_db():
        return ""
    found = [_served_folder(home)]
    for name in ("mlflow.db", "mlflow.db-wal"):
        try:
            stat = (home / name).stat()
        except FileNotFoundError:
            found.append("none")
        else:
            found.append(f"{stat.st_size}-{stat.st_mtime_ns}")
    return " ".join(found)


def difference(home: Path) -> Difference | None:
    """Return how the served pair differs from the champion, None if it does not or there is no champion.

    Raises UserError if a bundle that is needed to tell is gone or damaged, or nothing was imported yet.
    """
    if not settings.mlflow_db() and not (home / "mlflow.db").is_file():
        return None
    from gr_platform.events.landing import active_dataset
    from gr_platform.lifecycle.folders import bundle_of
    from gr_platform.registry import promotion

    served = _served(home)
    ds = str(served.facts["dataset"]) if served else settings.dataset() or active_dataset(home)
    champions = promotion.champions(home, ds)
    wanted = {
        kind: storage.read_manifest(bundle_of(home, ds, kind, version)).digest for kind, version in champions.items()
    }
    if all(served is not None and served.spec[kind] == digest for kind, digest in wanted.items()):
        return None
    named = " and ".join(f"{version.name} {version.version}" for version in champions.values())
    return Difference(dataset=ds, text=f"champion is {named}, served is {_served_folder(home)}")


def _served(home: Path) -> storage.Manifest | None:
    folder = home / "model_repositories" / _served_folder(home)
    try:
        return storage.read_manifest(folder)
    except UserError:  # none yet, or the empty one that a server can start on
        return None


def _served_folder(home: Path) -> str:
    link = home / "model_repository"
    return os.path.basename(os.readlink(link)) if link.is_symlink() else "nothing"

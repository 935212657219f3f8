"""What a state folder keeps and what it lets go: results of old trainings that nobody refers to.

Invariant: what an alias names, a pointer calls current, the model server serves or goes back to, or one of these reads,
stays however old. Every decision is read off the state, and a result goes away as a whole by one rename first, so a
deletion that was killed is simply done again. Nothing behind a link is deleted.
"""

import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gr_platform import settings, storage
from gr_platform.errors import UserError
from gr_platform.lifecycle import options
from gr_platform.registry import expiry
from gr_platform.registry.versions import CHAMPION
from serving import repository, swap
from serving.server import LOCK

log = logging.getLogger(__name__)

DAY_S = 86_400.0
WAIT_S = 300.0
PLACES = ("runs", "bundles", "sequences", "cards")
PAIRS = "model_repositories"
MODELS = ("retrieval_model", "ranking_model")
RETIRED, CHECKPOINT = ".retired-", ".checkpoint-"
_RESULT = re.compile(r"([a-z][a-z_-]*)-[0-9a-f]{16}")
# In this order, so that nothing is left that names what is gone; all else comes between.
_FIRST, _LAST = ("judgement", "evaluation", "sequences"), ("segment", "vocabulary")


@dataclass(frozen=True, slots=True, kw_only=True)
class Doomed:
    """Something to delete: what it is called, where its files lie (None: nowhere), how large, how old."""

    what: str
    folder: Path | None
    num_bytes: int
    age_s: float
    entry: expiry.Entry | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaning:
    """What is or was to go, in the order of deletion. num_bytes: that it frees, a file with two names counted when
    both go. left_alone: what cannot be judged, a sentence each."""

    doomed: tuple[Doomed, ...]
    num_bytes: int
    num_kept: int
    left_alone: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """A result folder. manifest: None where a deletion or a crash took it."""

    folder: Path
    kind: str
    manifest: storage.Manifest | None
    age_s: float

    @property
    def spec(self) -> Mapping[str, Any]:
        return self.manifest.spec if self.manifest else {}


def clean(home: Path, ds: str, *, dry_run: bool = False, now: float | None = None) -> Cleaning:
    """Delete what the retention options of `lifecycle.toml` let go, and return what that was; dry_run: would be.

    now: seconds since the epoch. Raises UserError, with nothing deleted, while a stage runs, if the registry cannot be
    read, or if an option does not fit.
    """
    keep = options.read(home).retention
    # A rollback or a deployment beside it would name what it is about to delete.
    with storage.exclusive(home, "stages"), storage.exclusive(home, LOCK, wait_s=WAIT_S):
        found = _plan(home, ds, keep, time.time() if now is None else now)
        if not dry_run:
            for each in found.doomed:
                _delete(home, each)
            for place in PLACES:
                storage.sweep(home / place / ds)
            log.info("event=cleaned dataset=%s things=%d bytes=%d", ds, len(found.doomed), found.num_bytes)
        return found


def _plan(home: Path, ds: str, keep: options.Retention, now: float) -> Cleaning:
    limit_s, left_alone = keep.keep_days * DAY_S, list[str]()
    results, leftovers = list[_Found](), list[Path]()
    for place in PLACES:
        if (parent := home / place / ds).is_dir():
            if not _inside(home, parent):
                left_alone.append(f"{place}/{ds} leads out of the state folder, so nothing in it is deleted")
                continue
            results += _results(parent, now, left_alone)
            leftovers += _leftovers(parent, now - limit_s)
    pairs = list(_pairs(home, ds, now, left_alone))
    leftovers += _leftovers(home / PAIRS, now - limit_s)
    kept_pairs = _kept_pairs(home, pairs, limit_s)
    roles = expiry.roles(home, ds)
    _require_known(home, ds, pairs, roles)
    served = {str(pair.spec.get(kind)) for pair in kept_pairs for kind in ("retrieval", "ranking", "shadow")}
    kept = _kept(home, ds, results, limit_s, served, roles)
    doomed = [each for each in [*results, *pairs] if each not in kept and each not in kept_pairs]
    kept_runs = {each.manifest.digest for each in kept if each.manifest and each.kind in MODELS}
    old = expiry.old_versions(home, ds, kept_runs, (now - limit_s) * 1000)
    entries = old + expiry.old_runs(home, ds, kept_runs, old, (now - keep.keep_mlflow_days * DAY_S) * 1000)
    things = [_of_entry(entry, now) for entry in entries]
    things += [_of_folder(home, each.folder, each.age_s) for each in sorted(doomed, key=_order)]
    things += [_of_folder(home, folder, now - folder.stat().st_mtime) for folder in leftovers]
    return Cleaning(
        doomed=tuple(things),
        num_bytes=_freed(each.folder for each in things if each.folder),
        num_kept=len(kept) + len(kept_pairs),
        left_alone=tuple(left_alone),
    )


def _require_known(home: Path, ds: str, pairs: list[_Found], roles: Mapping[str, tuple[str, ...]]) -> None:
    """Raise UserError where models are served that the registry knows no champion of: it is another one, or empty."""
    is_served = repository.current(home) in {pair.folder for pair in pairs if pair.manifest}
    if is_served and not any(CHAMPION in aliases for aliases in roles.values()):
        raise UserError(
            f"models of {ds} are served, but the registry names no champion of it, so nobody can say what is needed; "
            f"nothing was deleted: check {settings.MLFLOW_DB}, or name the champion with gr promote"
        )


def _kept(
    home: Path,
    ds: str,
    results: list[_Found],
    limit_s: float,
    served: set[str],
    roles: Mapping[str, tuple[str, ...]],
) -> list[_Found]:
    """Return the results that stay: those that somebody names, the young ones, and what these read."""
    named = _current(home, ds)
    current = next((each.manifest for each in results if each.kind == "sequences" and each.folder in named), None)

    def is_root(each: _Found) -> bool:
        if each.manifest is None:
            return False
        return (
            each.folder in named
            or each.age_s < limit_s
            or each.manifest.digest in roles
            or each.manifest.digest in served
            or (each.folder.parent.parent.name == "bundles" and each.spec.get("run") in roles)
        )

    kept = [each for each in results if is_root(each)]
    by_digest = {each.manifest.digest: each for each in results if each.manifest}
    for each in list(kept):
        # What is served can be explained only with the run that it was exported from.
        run = by_digest.get(str(each.spec.get("run")))
        if run is not None and run not in kept:
            kept.append(run)
    digests = {each.manifest.digest for each in kept if each.manifest}
    if current is not None:
        kept += [e for e in results if e.kind == "evaluation" and e not in kept and _is_of(e, current.digest, digests)]
    read = {name for each in kept if each.kind == "sequences" for name in _reads(each)}
    return kept + [
        e for e in results if e.folder.name in read and e not in kept and e.kind in ("segment", "vocabulary")
    ]


def _is_of(evaluation: _Found, sequences: str, kept: set[str]) -> bool:
    """Return whether an evaluation can still be used: of the current sequences, and of models that stay."""
    models = evaluation.spec.get("models", {})
    return evaluation.spec.get("sequences") == sequences and all(digest in kept for digest in models.values())


def _reads(sequences: _Found) -> Iterator[str]:
    assert sequences.manifest is not None
    yield from sequences.manifest.facts.get("segments", ())
    yield str(sequences.spec.get("vocabulary_folder"))


def _results(parent: Path, now: float, left_alone: list[str]) -> Iterator[_Found]:
    for folder in sorted(parent.iterdir()):
        match = _RESULT.fullmatch(folder.name)
        if match is None or not folder.is_dir():
            continue
        if folder.is_symlink():
            left_alone.append(f"{folder.name} is a link, so it is not deleted")
            continue
        manifest = folder / storage.MANIFEST
        if not manifest.is_file():
            # No stage runs, so nobody is about to write it.
            yield _Found(folder, match[1], None, now - folder.stat().st_mtime)
            continue
        try:
            yield _Found(folder, match[1], storage.read_manifest(folder), now - manifest.stat().st_mtime)
        except UserError as error:
            left_alone.append(str(error))


def _leftovers(parent: Path, before: float) -> Iterator[Path]:
    """Yield what a deletion left that was killed, and trainings that nobody went on with."""
    for folder in sorted(parent.glob(".*")):
        if folder.is_dir() and not folder.is_symlink():
            old = folder.name.startswith(CHECKPOINT) and _newest(folder) < before
            if old or folder.name.startswith(RETIRED):
                yield folder


def _newest(folder: Path) -> float:
    return max(path.lstat().st_mtime for path in [folder, *folder.rglob("*")])


def _pairs(home: Path, ds: str, now: float, left_alone: list[str]) -> Iterator[_Found]:
    parent = home / PAIRS
    if not parent.is_dir() or not _inside(home, parent):
        return
    for pair in _results(parent, now, left_alone):
        if pair.manifest is None or pair.manifest.facts.get("dataset") == ds:
            yield pair


def _kept_pairs(home: Path, pairs: list[_Found], limit_s: float) -> list[_Found]:
    """Return the repository folders that stay: the served one, the one before it, and the young ones."""
    whole = [pair for pair in pairs if pair.manifest]
    served = {repository.current(home), _before_deployment(home)}
    others = [pair for pair in whole if pair.folder not in served]
    predecessor = min(others, key=lambda pair: pair.age_s, default=None)
    return [pair for pair in whole if pair.folder in served or pair is predecessor or pair.age_s < limit_s]


def _before_deployment(home: Path) -> Path | None:
    """Return the folder that a deployment which was killed is to go back to."""
    try:
        return home / str(storage.read_object(home / swap.JOURNAL)["previous"])
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _current(home: Path, ds: str) -> set[Path]:
    pointers = [pointer for place in PLACES for pointer in (home / place / ds).glob("*.current")]
    return {pointer.parent / pointer.read_text(encoding="utf-8", errors="replace").strip() for pointer in pointers}


def _inside(home: Path, folder: Path) -> bool:
    return folder.resolve().is_relative_to(home.resolve())


def _order(found: _Found) -> tuple[int, str]:
    rank = 0 if found.kind in _FIRST else 2 if found.kind in _LAST else 1
    return rank, str(found.folder)


def _of_folder(home: Path, folder: Path, age_s: float) -> Doomed:
    return Doomed(what=str(folder.relative_to(home)), folder=folder, num_bytes=_size(folder), age_s=age_s)


def _of_entry(entry: expiry.Entry, now: float) -> Doomed:
    what = f"MLflow run {entry.name}" if entry.run_id else f"registered version {entry.name} {entry.version}"
    size = _size(entry.folder) if entry.folder else 0
    return Doomed(what=what, folder=entry.folder, num_bytes=size, age_s=now - entry.created_ms / 1000, entry=entry)


def _delete(home: Path, doomed: Doomed) -> None:
    log.info("event=deleted what=%r bytes=%d", doomed.what, doomed.num_bytes)
    if doomed.entry is not None:
        expiry.drop(home, doomed.entry)
        return
    assert doomed.folder is not None
    retired = doomed.folder
    if not retired.name.startswith(RETIRED):
        retired = retired.with_name(f"{RETIRED}{retired.name}")
        shutil.rmtree(retired, ignore_errors=True)
        os.rename(doomed.folder, retired)
    shutil.rmtree(retired)


def _files(folder: Path) -> Iterator[os.stat_result]:
    for root, _, names in os.walk(folder):
        for name in names:
            yield (Path(root) / name).lstat()


def _size(folder: Path) -> int:
    return sum(file.st_size for file in _files(folder))


def _freed(folders: Iterable[Path]) -> int:
    """Return the bytes of the files all of whose names lie in these folders: bundles and repositories share files."""
    seen: dict[tuple[int, int], list[int]] = {}
    for folder in folders:
        for file in _files(folder):
            entry = seen.setdefault((file.st_dev, file.st_ino), [file.st_nlink, file.st_size])
            entry[0] -= 1
    return sum(size for links, size in seen.values() if links <= 0)

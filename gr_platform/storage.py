"""State on disk: manifests, digests and the one way in which a result becomes visible.

Invariant: a result is a folder whose `manifest.json` is written last and moved into place with the folder by one
rename. A folder without a valid manifest is not a result; a killed task leaves only a `.building-*` folder behind.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gr_platform import settings
from gr_platform.errors import UserError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
LEFTOVER_AGE_S = 2 * 24 * 3600
# How folders are named while something is made in them.
TEMPORARY = (".building-", ".retired-", ".landing-", ".spill-")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a result folder holds.

    `spec` is everything the result was made from (its digest names the folder), `files` maps each file to its sha256,
    `facts` are figures for people and checks. `digest` covers kind, spec and files: equal digests, equal content.
    """

    kind: str
    spec: dict[str, Any]
    files: dict[str, str]
    facts: dict[str, Any]
    digest: str
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished result: its folder, its manifest and whether it was there already."""

    folder: Path
    manifest: Manifest
    reused: bool


def canonical_json(value: Any) -> str:
    """Return `value` as JSON with sorted keys and no spaces: the bytes that digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """Return the hex BLAKE2b-160 digest of a JSON-able value."""
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=20).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a small file. Raises FileNotFoundError, or ValueError saying how it is damaged."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ValueError("it holds no JSON object")
    return fields


def read_manifest(folder: Path, *, verify: bool = False) -> Manifest:
    """Return the manifest of a result folder.

    Raises UserError if there is none, it is of another schema version, or (with `verify`) as `verify_files` does.
    """
    path = folder / MANIFEST
    try:
        fields = read_object(path)
    except FileNotFoundError:
        raise UserError(f"{shown(folder)} holds no {MANIFEST}: it is not a finished result; make it again") from None
    except ValueError as error:
        raise UserError(f"{shown(path)} is not valid JSON ({error}); delete the folder and make it again") from None
    if fields.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{shown(folder)} has schema version {fields.get('schema_version')}, this release reads {SCHEMA_VERSION}; "
            "delete the folder and make it again"
        )
    try:
        manifest = Manifest(**fields)
    except TypeError:
        raise UserError(
            f"{shown(path)} does not hold the entries of a manifest; delete the folder and make it again"
        ) from None
    if verify:
        verify_files(folder, manifest)
    return manifest


def verify_files(folder: Path, manifest: Manifest, *, mend: str = "run gr materialize") -> None:
    """Raise UserError naming the first file of the manifest that is missing or whose sha256 differs.

    mend: what to do about it, as the end of a sentence.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{shown(path)} is missing; {mend}")
        if file_sha256(path) != expected:
            raise UserError(f"{shown(path)} is corrupt (its sha256 differs from the manifest); {mend}")


def find(parent: Path, kind: str, spec: Mapping[str, Any]) -> Result | None:
    """Return the result of `spec` if it is there and whole, None otherwise."""
    _, folder = _named(parent, kind, spec)
    try:
        return Result(folder=folder, manifest=read_manifest(folder, verify=True), reused=True)
    except UserError:
        return None


def discard(folder: Path) -> None:
    """Delete a result, so that `ensure` makes it again."""
    (folder / MANIFEST).unlink()
    shutil.rmtree(folder)


def _named(parent: Path, kind: str, spec: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """Return the spec as it is written and the folder of its result."""
    written = json.loads(canonical_json(dict(spec)))
    return (
        written,
        parent / f"{kind}-{digest_of({'kind': kind, 'schema_version': SCHEMA_VERSION, 'spec': written})[:16]}",
    )


def ensure(parent: Path, kind: str, spec: Mapping[str, Any], build: Callable[[Path], dict[str, Any]]) -> Result:
    """Return the result of `spec`, building it unless a valid one is there.

    `build(folder)` writes files into an empty temporary folder and returns the facts. The result's folder is
    `parent/<kind>-<first 16 digits of the spec's digest>`. A damaged result is built again, and stays until the new one
    is there: somebody may use what is left of it.
    """
    found = find(parent, kind, spec)
    if found is not None:
        return found
    spec, folder = _named(parent, kind, spec)
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    building = Path(tempfile.mkdtemp(dir=parent, prefix=".building-"))
    try:
        facts = build(building)
        manifest = write_manifest(building, kind=kind, spec=spec, facts=facts)
        # Another process may have finished the same result first: then its folder is as good as ours.
        if (found := find(parent, kind, spec)) is None:
            try:
                _replace(folder, building)
            except OSError:
                if (found := find(parent, kind, spec)) is None:
                    raise
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(building, ignore_errors=True)
    return found or Result(folder=folder, manifest=manifest, reused=False)


def _replace(folder: Path, by: Path) -> None:
    """Put `by` in the place of a folder that is damaged, or not there."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".retired-", ignore_cleanup_errors=True) as retired:
        if folder.exists():
            os.rename(folder, Path(retired) / folder.name)
        os.rename(by, folder)


def sweep(parent: Path) -> None:
    """Delete what killed tasks left behind in a folder; a task that still runs is not days old."""
    for prefix in TEMPORARY:
        for leftover in parent.glob(f"{prefix}*"):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE_S:
                shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def exclusive(home: Path, work: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Be the only one on this machine who does `work` in a state folder; a process that dies gives the place up.

    Nested calls of one process pass. Raises UserError if another does it and has not ended after `wait_s`.
    """
    # Imported here: the model server's Python reads results, but never changes them.
    from filelock import FileLock, Timeout

    home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(home / f".{work}.lock", is_singleton=True).acquire(timeout=wait_s):
            yield
    except Timeout:
        raise UserError(
            f"another program works on the {work} of this state folder; run this again when it has ended"
        ) from None


def write_manifest(folder: Path, *, kind: str, spec: Mapping[str, Any], facts: Mapping[str, Any]) -> Manifest:
    """Write and return the manifest of all files now in `folder`."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = {name: file_sha256(folder / name) for name in names}
    manifest = Manifest(
        kind=kind,
        spec=dict(spec),
        files=files,
        facts=dict(facts),
        digest=digest_of({"kind": kind, "spec": spec, "files": files}),
    )
    write_text(folder / MANIFEST, json.dumps(asdict(manifest), indent=1, sort_keys=True, allow_nan=False) + "\n")
    return manifest


def add_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Add facts to a finished result, at once or not at all; its digest, which covers none, stays."""
    fields = read_object(folder / MANIFEST)
    fields["facts"] |= facts
    write_text(folder / MANIFEST, json.dumps(fields, indent=1, sort_keys=True, allow_nan=False) + "\n")


def point(parent: Path, name: str, folder: Path) -> None:
    """Make `parent/<name>.current` name `folder` (a child of `parent`): what later stages read."""
    write_text(parent / f"{name}.current", folder.name + "\n")


def current(parent: Path, name: str) -> Path:
    """Return the folder that `point` named last. Raises UserError if there is none yet."""
    pointer = parent / f"{name}.current"
    try:
        folder = parent / pointer.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        raise UserError(f"no {name} yet in {shown(parent)}; run gr materialize (or its stage) first") from None
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{shown(folder)} is gone; make {name} again (gr materialize)")
    return folder


def shown(path: Path) -> str:
    """Return a path as messages show it: from $GR_HOME on where it lies inside, which the command line spells out."""
    try:
        return f"$GR_HOME/{path.relative_to(settings.home())}"
    except ValueError:
        return path.name

"""A pair of bundles becomes the folder that the model server loads from.

Invariant: `model_repository` is a relative link to a finished `model_repositories/pair-*` folder, so the three models
change together and by one rename. No file in such a folder holds an absolute path: it runs wherever it is copied.
"""

import json
import os
import py_compile
import shutil
import string
from dataclasses import asdict, dataclass
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any

from gr_platform import storage
from gr_platform.bundle.load import Bundle, load
from gr_platform.errors import UserError

LINK = "model_repository"
MODELS = ("gr_retriever", "gr_ranker", "gr_recommender")
_PARENT = "model_repositories"
_EMPTY = "empty"
_TEMPLATES = Path(__file__).resolve().parent / "model_repository"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """What the operator sets. `cache_bytes` bounds each model's K/V cache; `num_threads` 0 = what the machine has."""

    cache_bytes: int = 256 << 20
    num_threads: int = 0
    retrieval_depth: int = 50
    max_batch_size: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The repository that the link names now, and the one it named before (None: none)."""

    folder: Path
    previous: Path | None
    changed: bool


def publish(home: Path, retrieval: Path, ranking: Path, options: ServingOptions | None = None) -> Published:
    """Build the model repository of two bundle folders, unless it exists, and point `model_repository` at it.

    Raises UserError if a bundle is damaged, of the wrong kind, or the two are of different data sets.
    """
    options = options or ServingOptions()
    bundles = load_pair(retrieval, ranking)
    spec = {
        "retrieval": storage.read_manifest(retrieval).digest,
        "ranking": storage.read_manifest(ranking).digest,
        "templates": {name: storage.file_sha256(_TEMPLATES / name) for name in _template_names()},
        "options": asdict(options),
    }
    result = storage.ensure(home / _PARENT, "pair", spec, lambda folder: _build(folder, bundles, options))
    previous = current(home)
    if previous == result.folder:
        return Published(folder=result.folder, previous=previous, changed=False)
    point_to(home, result.folder)
    _remove_others(home, keep={result.folder, previous})
    return Published(folder=result.folder, previous=previous, changed=True)


def load_pair(retrieval: Path, ranking: Path) -> tuple[Bundle, Bundle]:
    """Return the two bundles. Raises UserError unless they are whole, of these kinds and of one data set.

    One request goes to both, so they must know the same actions and the same items.
    """
    bundles = load(retrieval), load(ranking)
    for bundle, kind in zip(bundles, ("retrieval", "ranking"), strict=True):
        if bundle.kind != kind:
            raise UserError(f"{bundle.folder.name} is a {bundle.kind} bundle, expected a {kind} bundle")
    names = [f"{b.declaration.name} ({b.declaration.item_id_type} ids)" for b in bundles]
    if names[0] != names[1]:
        raise UserError(f"the bundles are of different data sets, {names[0]} and {names[1]}; export both of one")
    for what, of in (
        ("actions", lambda b: b.declaration.actions),
        ("vocabularies", lambda b: b.vocabulary.digest),
    ):
        if of(bundles[0]) != of(bundles[1]):
            raise UserError(
                f"the bundles of {bundles[0].declaration.name} have different {what}; train both models again"
            )
    return bundles


def current(home: Path) -> Path | None:
    """Return the repository folder that the link names, or None if there is none."""
    link = home / LINK
    return home / os.readlink(link) if link.is_symlink() and link.exists() else None


def point_to(home: Path, folder: Path) -> None:
    """Make `model_repository` name `folder`, by one rename, so that the server sees its models as new."""
    link = home / LINK
    if link.exists() and not link.is_symlink():
        raise UserError(f"$GR_HOME/{LINK} is a folder of something else; move it away")
    for model_file in folder.glob("*/1/model.py"):
        # The server takes a model whose files are not younger than the loaded one's for unchanged. Bytecode that it
        # wrote itself would make the model look changed after the load; bytecode checked by hash stays as it is.
        os.utime(model_file)
        py_compile.compile(str(model_file), dfile="model.py", invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    staged = home / f".{LINK}-{os.getpid()}"
    staged.unlink(missing_ok=True)
    staged.symlink_to(Path(_PARENT) / folder.name)
    os.replace(staged, link)


def ensure_repository(home: Path) -> tuple[str, ...]:
    """Return the models there are to load; an empty repository takes the place of none, so that a server can start."""
    folder = current(home)
    if folder is None:
        folder = home / _PARENT / _EMPTY
        folder.mkdir(parents=True, exist_ok=True)
        point_to(home, folder)
    return tuple(model for model in MODELS if (folder / model / "config.pbtxt").is_file())


def _build(folder: Path, bundles: tuple[Bundle, Bundle], options: ServingOptions) -> dict[str, Any]:
    retrieval, ranking = bundles
    for model, bundle in (("gr_retriever", retrieval), ("gr_ranker", ranking), ("gr_recommender", None)):
        version = folder / model / "1"
        version.mkdir(parents=True)
        shutil.copyfile(_TEMPLATES / model / "1" / "model.py", version / "model.py")
        template = string.Template((_TEMPLATES / model / "config.pbtxt").read_text(encoding="utf-8"))
        values = _config_values(ranking, bundle, options)
        (folder / model / "config.pbtxt").write_text(template.substitute(values), encoding="utf-8")
        if bundle is not None:
            _link_files(bundle.folder, version / "bundle")
    return {"dataset": ranking.declaration.name, "retrieval": retrieval.digest, "ranking": ranking.digest}


def _config_values(ranking: Bundle, own: Bundle | None, options: ServingOptions) -> dict[str, str]:
    declaration = ranking.declaration
    values = {
        "item_type": "TYPE_STRING" if declaration.item_id_type == "string" else "TYPE_INT64",
        "num_tasks": len(ranking.tasks),
        "dataset": declaration.name,
        "item_id_type": declaration.item_id_type,
        "actions": _quoted(declaration.actions),
        "tasks": _quoted(ranking.tasks),
        "model_digest": own.digest if own else "",
        **asdict(options),
    }
    return {name: str(value) for name, value in values.items()}


def _quoted(names: tuple[str, ...]) -> str:
    """Return names as a JSON list inside a protobuf text string."""
    return json.dumps(json.dumps(list(names)))[1:-1]


def _link_files(source: Path, target: Path) -> None:
    """Hard-link a bundle's files, or copy them where the file system cannot."""
    target.mkdir()
    for name in [*storage.read_manifest(source).files, storage.MANIFEST]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, target / name)
        except OSError:
            shutil.copyfile(source / name, target / name)


def _template_names() -> list[str]:
    return [f"{model}/{name}" for model in MODELS for name in ("config.pbtxt", "1/model.py")]


def _remove_others(home: Path, keep: set[Path | None]) -> None:
    """Delete all pairs but these: the current one and the one to go back to."""
    for folder in (home / _PARENT).glob("pair-*"):
        if folder not in keep:
            shutil.rmtree(folder, ignore_errors=True)

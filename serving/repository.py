"""A pair of bundles becomes the folder that the model server loads from.

Invariant: `model_repository` is a relative link to a finished `model_repositories/pair-*` folder, so all models
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
from serving.options import ServingOptions
from serving.options import read as read_options

LINK = "model_repository"
MODELS = ("gr_retriever", "gr_ranker", "gr_recommender", "gr_events", "gr_user_recommender")
SHADOW = "gr_ranker_shadow"
_PARENT = "model_repositories"
_EMPTY = "empty"
_TEMPLATES = Path(__file__).resolve().parent / "model_repository"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The repository that the link names now, and the one it named before (None: none)."""

    folder: Path
    previous: Path | None
    changed: bool


def publish(
    home: Path, retrieval: Path, ranking: Path, options: ServingOptions | None = None, *, shadow: Path | None = None
) -> Published:
    """Build the model repository of two bundle folders, unless it exists, and point `model_repository` at it.

    options: by default those of `serving.toml`. shadow: the bundle folder of a challenging ranking model. Raises
    UserError if a bundle is damaged, of the wrong kind, or they are of different data sets.
    """
    options = options or read_options(home)
    bundles = load_pair(retrieval, ranking)
    challenger = load_challenger(shadow, bundles[1]) if shadow else None
    spec = {
        "retrieval": storage.read_manifest(retrieval).digest,
        "ranking": storage.read_manifest(ranking).digest,
        "shadow": storage.read_manifest(shadow).digest if shadow else None,
        "templates": {name: storage.file_sha256(_TEMPLATES / name) for name in _template_names()},
        "options": asdict(options),
    }
    result = storage.ensure(home / _PARENT, "pair", spec, lambda folder: _build(folder, bundles, challenger, options))
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


def load_challenger(folder: Path, ranking: Bundle) -> Bundle:
    """Return a ranking bundle that may score the requests of `ranking`. Raises UserError for any other.

    It may know more items and more actions: a challenger is younger than the champion.
    """
    challenger = load(folder)
    if challenger.kind != "ranking":
        raise UserError(f"{folder.name} is a {challenger.kind} bundle, a shadow is a ranking bundle")
    own, served = challenger.declaration, ranking.declaration
    if (own.name, own.item_id_type) != (served.name, served.item_id_type):
        raise UserError(f"the shadow {folder.name} is of data set {own.name}, the served models of {served.name}")
    if own.actions[: len(served.actions)] != served.actions:
        raise UserError(f"the shadow {folder.name} lacks actions of the served models; train it again")
    return challenger


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
    return tuple(model for model in (SHADOW, *MODELS) if (folder / model / "config.pbtxt").is_file())


def _build(
    folder: Path, bundles: tuple[Bundle, Bundle], challenger: Bundle | None, options: ServingOptions
) -> dict[str, Any]:
    retrieval, ranking = bundles
    facts = _config_values(retrieval, ranking, challenger, options)
    for model in MODELS:
        own = {"gr_retriever": retrieval, "gr_ranker": ranking}.get(model)
        _build_model(folder, model, model, own, facts)
    if challenger is not None:
        known = {"actions": _quoted(challenger.declaration.actions), **_of_tasks(challenger)}
        _build_model(folder, SHADOW, "gr_ranker", challenger, facts | known)
    return {"dataset": ranking.declaration.name, "retrieval": retrieval.digest, "ranking": ranking.digest}


def _build_model(folder: Path, model: str, template: str, own: Bundle | None, values: dict[str, str]) -> None:
    """Fill in a template under the name `model`, with the bundle that the model loads, if any."""
    version = folder / model / "1"
    version.mkdir(parents=True)
    shutil.copyfile(_TEMPLATES / template / "1" / "model.py", version / "model.py")
    text = (_TEMPLATES / template / "config.pbtxt").read_text(encoding="utf-8")
    text = text.replace(f'name: "{template}"', f'name: "{model}"', 1)
    values = values | {"model_digest": own.digest if own else ""} | (_moments(own.folder) if own else {})
    (folder / model / "config.pbtxt").write_text(string.Template(text).substitute(values), encoding="utf-8")
    if own is not None:
        _link_files(own.folder, version / "bundle")


def _moments(bundle: Path) -> dict[str, str]:
    """Return until when a bundle's model learned, as far as its manifest says so, and when it was exported; ms UTC."""
    until = storage.read_manifest(bundle).facts.get("trained_until_ms")
    exported = (bundle / storage.MANIFEST).stat().st_mtime_ns // 1_000_000
    return {"trained_until_ms": "" if until is None else str(until), "exported_ms": str(exported)}


def _config_values(
    retrieval: Bundle, ranking: Bundle, challenger: Bundle | None, options: ServingOptions
) -> dict[str, str]:
    """Return what the templates name, as text, but for `model_digest`, which is each model's own."""
    declaration = ranking.declaration
    values = {
        "item_type": _wire_type(declaration.item_id_type),
        "user_type": _wire_type(declaration.user_id_type),
        "dataset": declaration.name,
        "item_id_type": declaration.item_id_type,
        "user_id_type": declaration.user_id_type,
        "exclude_seen": declaration.exclude_seen,
        "actions": _quoted(declaration.actions),
        **_of_tasks(ranking),
        "retriever_digest": retrieval.digest,
        "ranker_digest": ranking.digest,
        "shadow_digest": challenger.digest if challenger else "",
        "shadow_tasks": _quoted(challenger.tasks if challenger else ()),
        "history_events": max(b.config.max_events for b in (retrieval, ranking, challenger) if b is not None),
        **asdict(options),
    }
    return {name: str(value) for name, value in values.items()}


def _of_tasks(ranking: Bundle) -> dict[str, str]:
    return {"num_tasks": str(len(ranking.tasks)), "tasks": _quoted(ranking.tasks)}


def _wire_type(id_type: str) -> str:
    return "TYPE_STRING" if id_type == "string" else "TYPE_INT64"


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

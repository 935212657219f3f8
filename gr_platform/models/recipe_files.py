"""Recipes that users write: a TOML file that names one of ours and what is different.

Invariant: a field has its declared type or the file is refused in one sentence that names file and field, so nothing
that TOML allows (`true` for a number, `nan`, a misspelt name) reaches a training.

    base = "ml_1m"            # a recipe of `gr recipes`, or a variant
    name = "ml_1m_wide"       # how runs are called; the file's name where it is left out
    [model]                   # fields of ModelConfig but for its kind, which --kind chooses
    embedding_dim = 128
    [training]                # fields of TrainingConfig
    max_epochs = 8
    [training.stochastic_length]
    alpha = 1.6
"""

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from gr_platform.errors import UserError
from gr_platform.models.baselines import require_possible
from gr_platform.models.config import Kind, Recipe
from gr_platform.models.recipes import AUTO, named, require_recipe

SUFFIX = ".toml"
ENTRIES = ("base", "name", "model", "training")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# How a dataclass begins the sentence about a field of its own, and what the field is called in a file.
_WRITTEN = {
    "ModelConfig.": "model.",
    "TrainingConfig.": "training.",
    "StochasticLength.": "training.stochastic_length.",
}
_KINDS_OF_VALUES = {bool: "true or false", int: "a whole number", float: "a number"}
T = TypeVar("T")


def is_file(recipe: str) -> bool:
    """Return whether a recipe is given as a file rather than by name."""
    return recipe.lower().endswith(SUFFIX)


def chosen(recipe: str, kind: Kind) -> Recipe:
    """Return the recipe of that name, or of the TOML file at that path. Raises UserError as `named`, `read_recipe`."""
    return read_recipe(Path(recipe), kind) if is_file(recipe) else named(recipe, kind)


def require_known(recipe: str) -> None:
    """Raise UserError unless a recipe is `auto`, a name, or a file with a base: asked first, as training comes late."""
    if is_file(recipe):
        _entries(Path(recipe))
    else:
        require_recipe(recipe)


def read_recipe(path: Path, kind: Kind) -> Recipe:
    """Return the recipe that a TOML file describes, as a model of this kind.

    Raises UserError naming the file, and the field where one is at fault.
    """
    entries = _entries(path)
    try:
        base = named(entries["base"], kind)
        tables = {name: entries.get(name, {}) for name in ("model", "training")}
        if "kind" in tables["model"]:
            raise ValueError("model.kind cannot be set, since --kind chooses it; leave it out")
        recipe = Recipe(
            name=entries.get("name", path.stem),
            model=_changed(base.model, tables["model"], "model"),
            training=_changed(base.training, tables["training"], "training"),
        )
        require_possible(recipe.model)
    except ValueError as error:
        raise UserError(f"recipe file {path.name}: {_in_words_of_the_file(str(error))}") from None
    return recipe


def command_for(recipe: Recipe, ds: str, *, warm_start: str | None = None) -> str:
    """Return the command that trains a recipe on a data set; where its file is, or was, a recipe does not say."""
    kind, training = recipe.model.kind, recipe.training
    changed = {"seed": training.seed, "max_epochs": training.max_epochs}
    ours = named(recipe.name, kind) if _is_ours(recipe.name) else None
    same = ours is not None and ours.with_training(**changed) == recipe
    options: dict[str, str | int] = {"recipe": recipe.name if same else f"FILE-OF-{recipe.name}.toml"}
    options |= {"kind": kind, "dataset": ds}
    if ours is None or training.seed != ours.training.seed:
        options["seed"] = training.seed
    if ours is None or training.max_epochs != ours.training.max_epochs:
        options["epochs"] = training.max_epochs
    options |= {"warm-start": warm_start} if warm_start is not None else {}
    return "gr train " + " ".join(f"--{name} {value}" for name, value in options.items())


def _entries(path: Path) -> dict[str, Any]:
    """Return what a file holds, its entries known and its base and name possible. Raises UserError."""
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the recipe file {path.name}: {error.strerror}; name a TOML file") from None
    except ValueError as error:
        raise UserError(f"recipe file {path.name} is not valid TOML ({error}); mend it") from None
    try:
        _require_entries(entries, path.stem)
    except ValueError as error:
        raise UserError(f"recipe file {path.name}: {error}") from None
    return entries


def _require_entries(entries: Mapping[str, Any], stem: str) -> None:
    for name, value in entries.items():
        if name not in ENTRIES:
            raise ValueError(f"there is no entry {name!r}; choose among {', '.join(ENTRIES)}")
        wanted = dict if name in ("model", "training") else str
        if not isinstance(value, wanted):
            raise ValueError(f"{name} is {value!r}, must be a {'table' if wanted is dict else 'text'}")
    if entries.get("base", AUTO) == AUTO:
        raise ValueError('base must name the recipe to start from, for example base = "small"; gr recipes lists them')
    require_recipe(entries["base"])
    name = entries.get("name", stem)
    if not NAME.fullmatch(name):
        raise ValueError(f"name is {name!r}, must be 1 to 64 letters, digits, dots, dashes and underscores")
    if _is_ours(name):
        raise ValueError(f"name is {name!r}, which is a recipe of gr recipes; set name to another")


def _is_ours(name: str) -> bool:
    try:
        require_recipe(name)
    except UserError:
        return False
    return True


def _changed(config: T, changes: Mapping[str, Any], table: str) -> T:
    """Return a dataclass with fields replaced by a table's. Raises ValueError naming the field."""
    hints = get_type_hints(type(config))
    known = [each.name for each in fields(config)]  # type: ignore[arg-type]
    values = {}
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"there is no field {table}.{name}; choose among {', '.join(known)}")
        old, where = getattr(config, name), f"{table}.{name}"
        if is_dataclass(old) and isinstance(value, dict):
            values[name] = _changed(old, value, where)
        else:
            values[name] = _typed(hints[name], value, where)
    return replace(config, **values)  # type: ignore[type-var]


def _typed(hint: Any, value: Any, where: str) -> Any:
    """Return a TOML value as a field's type. Raises ValueError."""
    if get_origin(hint) is Literal:
        fits, wanted = value in get_args(hint), f"one of {', '.join(map(repr, get_args(hint)))}"
    elif get_origin(hint) is tuple:
        fits, wanted = isinstance(value, list) and all(isinstance(each, str) for each in value), "a list of texts"
        value = tuple(value) if fits else value
    elif is_dataclass(hint):
        fits, wanted = False, "a table"
    else:
        # A bool is an int to Python, and TOML knows inf and nan.
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        fits = {bool: isinstance(value, bool), int: number and isinstance(value, int), float: number}[hint]
        wanted = _KINDS_OF_VALUES[hint]
        value = float(value) if fits and hint is float else value
    if not fits:
        raise ValueError(f"{where} is {value!r}, must be {wanted}")
    return value


def _in_words_of_the_file(sentence: str) -> str:
    for ours, written in _WRITTEN.items():
        sentence = sentence.replace(ours, written)
    return sentence

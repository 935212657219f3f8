"""Declarations that are given, not guessed: those of public data sets that come along, and the user's own TOML files.

Invariant: a given declaration is strict unless it says otherwise, and never moves an action that is stored already.
"""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from gr_platform.errors import UserError
from gr_platform.events.declaration import Declaration

_SUFFIX = ".toml"


def names() -> list[str]:
    """Return the names of the data sets whose declarations come along."""
    folder = files("gr_platform.events") / "declarations"
    return sorted(each.name.removesuffix(_SUFFIX) for each in folder.iterdir() if each.name.endswith(_SUFFIX))


def read(name_or_path: str) -> Declaration:
    """Return a declaration that comes along, by its name, or the one in a TOML file. Raises UserError."""
    path = Path(name_or_path)
    if name_or_path in names():
        text = (files("gr_platform.events") / "declarations" / f"{name_or_path}{_SUFFIX}").read_text(encoding="utf-8")
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path.name} is not UTF-8 text, so it is no declaration; name a TOML file") from None
    else:
        raise UserError(
            f"there is no declaration {path.name!r}; give the path of a TOML file or one of {', '.join(names())}"
        )
    return Declaration.from_toml(text, file=path.name, strict=True)


def agreed(given: Declaration, stored: Declaration) -> Declaration:
    """Return what holds for a data set that is declared again: as given, with the actions that are stored already.

    Raises UserError where stored action masks or ids would change their meaning.
    """
    num_common = min(len(given.actions), len(stored.actions))
    if given.actions[:num_common] != stored.actions[:num_common]:
        raise UserError(
            f"the declaration lists the actions {', '.join(given.actions)}, but data set {stored.name} has "
            f"{', '.join(stored.actions)} already; append actions at the end, or import into another --dataset"
        )
    for name in ("user_id_type", "item_id_type"):
        if getattr(given, name) != getattr(stored, name):
            raise UserError(
                f"the declaration says {name} = {getattr(given, name)}, but data set {stored.name} has "
                f"{getattr(stored, name)}; import into another --dataset"
            )
    return replace(given, actions=max(given.actions, stored.actions, key=len))

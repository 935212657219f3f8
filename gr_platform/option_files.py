"""What an operator sets in a TOML file of the state folder: checked field by field, defaults for the rest.

Invariant: a file with a name, type or value that does not fit is refused whole, in a sentence that names the option.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from gr_platform.errors import UserError

T = TypeVar("T")


def read(path: Path, kind: type[T]) -> T:
    """Return the options of a file in the state folder, the defaults where there is none. Raises UserError.

    kind: a dataclass with defaults alone; a field that is such a dataclass itself is a table of the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        given = tomllib.loads(text)
    except FileNotFoundError:
        return kind()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"$GR_HOME/{path.name} is no valid TOML ({error}); mend it, or delete it for the defaults"
        ) from None
    return _build(kind, given, f"$GR_HOME/{path.name}", "")


def _build(kind: type[T], given: Mapping[str, Any], file: str, prefix: str) -> T:
    defaults = {field.name: _default(field) for field in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in defaults:
            raise UserError(f"{file} sets {prefix}{name}, which is no option; there are {', '.join(defaults)}")
        default = defaults[name]
        if is_dataclass(default):
            if not isinstance(value, Mapping):
                raise UserError(f"{file} sets {prefix}{name} to {value!r}, it must be a table: [{prefix}{name}]")
            values[name] = _build(type(default), value, file, f"{prefix}{name}.")
            continue
        wanted = type(default)
        if not (type(value) is wanted or (wanted is float and type(value) is int)):
            raise UserError(f"{file} sets {prefix}{name} to {value!r}, it must be of type {wanted.__name__}")
        values[name] = wanted(value)
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None


def _default(field: Any) -> Any:
    return field.default if field.default is not MISSING else field.default_factory()

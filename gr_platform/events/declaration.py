"""The data set declaration: what a log's columns and actions mean, carried in every manifest and bundle.

Invariant: `actions` is append-only, so bit j of a stored action mask means `actions[j]` for ever. Only the standard
library is imported: the model server reads declarations too.
"""

import json
import re
import tomllib
import zoneinfo
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from gr_platform.errors import UserError

MAX_ACTIONS = 62
IdType = Literal["int64", "string"]
TIME_UNITS = ("auto", "s", "ms", "us", "ns", "iso")
MAX_CONTEXT = 16
CANONICAL = ("user_id", "item_id", "action", "value", "event_ts", "event_id")
# What the tables between a log and a sequence call their own columns; a context column needs another name.
_TAKEN = {*CANONICAL, "source_file", "source_row", "source_name", "landed_at_ms", "rule", "bucket", "ingest_date"}
_TAKEN |= {"raw_user", "raw_item", "raw_value", "raw_time", "found_value", "found_time", "file_row_number"}
_TAKEN |= {"replaces", "items", "actions", "times", "places"}
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_IDENTIFIER = re.compile(r"[a-z_][a-z0-9_]{0,62}")
_RESERVED = ("active",)
_MAY_BE_EMPTY = {"context", "header", "catalogue"}
_LISTS = ("actions", "positives", *sorted(_MAY_BE_EMPTY))


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """One data set. Bit j of an action mask stands for `actions[j]`; at most 62 actions.

    tasks: ranking head -> actions that count as its positive. positives: actions that make an event a retrieval target.
    columns: canonical name -> column of a file, or several of which the first one present counts; where `action` and
    `value` name the same column, the action is `rate_<value>`. context: columns carried along with each event as text.
    header: the columns of CSV files that have no header line. rename_actions: a log's word -> the declared action.
    catalogue: files beside a log that hold titles, the first one present counts. time_unit: s, ms, us, ns, iso, or auto
    for each file its own. time_zone: of times that carry none. strict: columns that are not declared are not guessed,
    and an action that is not declared is quarantined instead of appended.
    """

    name: str
    actions: tuple[str, ...]
    tasks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    positives: tuple[str, ...]
    exclude_seen: Literal["none", "all"] = "none"
    merge_window_ms: int = 0
    user_id_type: IdType = "int64"
    item_id_type: IdType = "int64"
    time_unit: str = "ms"
    time_zone: str = "UTC"
    strict: bool = False
    context: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    catalogue: tuple[str, ...] = ()
    columns: dict[str, str | tuple[str, ...]] = field(default_factory=dict)
    rename_actions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        if not 1 <= len(self.actions) <= MAX_ACTIONS or len(set(self.actions)) != len(self.actions):
            raise ValueError(
                f"Declaration.actions has {len(self.actions)} names, must be 1 to {MAX_ACTIONS}, all different"
            )
        for owner, names in {"positives": self.positives, **self.tasks}.items():
            if unknown := [name for name in names if name not in self.actions]:
                raise ValueError(f"Declaration {owner} names {unknown}, which are not among the actions")
        for label, value, allowed in (
            ("exclude_seen", self.exclude_seen, ("none", "all")),
            ("user_id_type", self.user_id_type, ("int64", "string")),
            ("item_id_type", self.item_id_type, ("int64", "string")),
            ("time_unit", self.time_unit, TIME_UNITS),
        ):
            if value not in allowed:
                raise ValueError(f"Declaration.{label} is {value!r}, must be one of {', '.join(allowed)}")
        if self.merge_window_ms != 0:
            raise ValueError(f"Declaration.merge_window_ms is {self.merge_window_ms}, only 0 is supported")
        self._check_columns()

    def _check_columns(self) -> None:
        texts: dict[str, Any] = {"time_zone": self.time_zone, **self.rename_actions}
        texts |= {name: value for name, value in self.columns.items() if not isinstance(value, tuple) or not value}
        if wrong := next((name for name, value in texts.items() if not isinstance(value, str)), None):
            raise ValueError(f"Declaration {wrong} is {texts[wrong]!r}, must be text")
        if unknown := [name for name in self.columns if name not in CANONICAL]:
            raise ValueError(f"Declaration.columns names {unknown}, the canonical columns are {', '.join(CANONICAL)}")
        if unknown := [name for name in self.rename_actions.values() if name not in self.actions]:
            raise ValueError(f"Declaration.rename_actions leads to {unknown}, which are not among the actions")
        if not isinstance(self.strict, bool):
            raise ValueError(f"Declaration.strict is {self.strict!r}, must be true or false")
        if len(self.context) > MAX_CONTEXT or len(set(self.context)) != len(self.context):
            raise ValueError(
                f"Declaration.context has {len(self.context)} names, must be at most {MAX_CONTEXT}, all different"
            )
        if wrong := next((name for name in self.context if not _IDENTIFIER.fullmatch(name) or name in _TAKEN), None):
            raise ValueError(
                f"Declaration.context names {wrong!r}; use lower-case letters, digits and '_', and no name that events "
                "have already"
            )

    def action_mask(self, names: Iterable[str]) -> int:
        """Return the bitmask of action names. Raises ValueError for a name that is not declared."""
        mask = 0
        for name in names:
            if name not in self.actions:
                raise ValueError(f"action {name!r} is not declared; the actions are {', '.join(self.actions)}")
            mask |= 1 << self.actions.index(name)
        return mask

    def task_masks(self) -> dict[str, int]:
        """Return the action mask of each task, in the order of the tasks."""
        return {task: self.action_mask(names) for task, names in self.tasks.items()}

    def positive_mask(self) -> int:
        """Return the mask of the actions that make an event a retrieval target."""
        return self.action_mask(self.positives)

    def with_actions(self, names: Iterable[str]) -> "Declaration":
        """Return the declaration with new actions appended, counted as positives where all the others are."""
        fresh = [name for name in dict.fromkeys(names) if name not in self.actions]
        positives = (*self.positives, *fresh) if set(self.positives) == set(self.actions) else self.positives
        return replace(self, actions=(*self.actions, *fresh), positives=positives)

    def alternatives(self, canonical: str) -> tuple[str, ...]:
        """Return the columns of a file that may hold a canonical column, the preferred one first; () if none may."""
        declared = self.columns.get(canonical, ())
        return (declared,) if isinstance(declared, str) else declared

    def to_json(self) -> dict[str, Any]:
        """Return the declaration as JSON-able values."""
        fields = asdict(self)
        for name in _LISTS:
            fields[name] = list(fields[name])
        for name in ("tasks", "columns"):
            fields[name] = {key: _plain(value) for key, value in fields[name].items()}
        return fields

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Declaration":
        """Return the declaration that `to_json` wrote. Raises UserError naming what is wrong."""
        known = {name: value for name, value in fields.items() if name in Declaration.__slots__}
        if unknown := sorted(set(fields) - set(known)):
            raise UserError(f"the data set declaration has unknown entries {', '.join(unknown)}; remove them")
        try:
            known["actions"] = _names("actions", fields["actions"])
            known["positives"] = _names("positives", fields["positives"])
            known |= {
                name: _names(name, fields[name]) if fields[name] else () for name in _MAY_BE_EMPTY & fields.keys()
            }
            columns = fields.get("columns", {})
            known["columns"] = {key: tuple(v) if isinstance(v, list) else v for key, v in columns.items()}
            tasks = fields.get("tasks", {})
            known["tasks"] = {task: _names(f"task {task}", names) for task, names in tasks.items()}
            return Declaration(**known)
        except KeyError as error:
            raise UserError(f"the data set declaration has no entry {error.args[0]}; add it") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"the data set declaration is not valid: {error}; edit it") from None

    def to_toml(self) -> str:
        """Return the declaration as the text of a small TOML file."""
        fields = self.to_json()
        tables = {name: fields.pop(name) for name in ("tasks", "columns", "rename_actions")}
        lines = [f"{name} = {_toml(value)}" for name, value in fields.items() if value != []]
        for table, entries in tables.items():
            if entries or table != "rename_actions":
                lines += ["", f"[{table}]", *(f"{_key(key)} = {_toml(value)}" for key, value in entries.items())]
        return "\n".join(lines) + "\n"

    @staticmethod
    def from_toml(text: str, *, file: str = "dataset.toml", strict: bool = False) -> "Declaration":
        """Return the declaration written in TOML; `strict` holds where the text does not say.

        Raises UserError if it does not parse or does not hold together.
        """
        try:
            fields = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{file} is not valid TOML ({error}); mend it or import the data again") from None
        declared = Declaration.from_json({"strict": strict, **fields})
        if declared.time_zone not in zoneinfo.available_timezones():
            raise UserError(
                f"{file} names the time zone {declared.time_zone!r}, which there is not; write one such as "
                "Europe/Berlin or UTC"
            )
        return declared


def check_name(name: str) -> str:
    """Return `name` if it can name a data set (it becomes a folder). Raises UserError otherwise."""
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise UserError(
            f"{name!r} cannot name a data set: use 1 to 64 lower-case letters, digits, '.', '_' or '-', "
            f"not starting with a sign, and not {' or '.join(map(repr, _RESERVED))}"
        )
    return name


def _names(owner: str, value: Any) -> tuple[str, ...]:
    """Return a list of names as it was written. Raises ValueError for anything else: a text is no list of letters."""
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{owner} is {value!r}, must be a list of names")
    return tuple(value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _key(text: str) -> str:
    return text if re.fullmatch(r"[A-Za-z0-9_-]+", text) else _toml(text)


def _toml(value: Any) -> str:
    """Return a string, integer or list of strings in TOML's notation (JSON's, but DEL must be escaped too)."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

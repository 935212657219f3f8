"""How far a partition may stray before a check warns or stops the pipeline, and what the user accepts all the same.

Invariant: `landing/<data set>/checks.toml` may override any bound, and a misspelt one is an error, never ignored.
"""

import datetime
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gr_platform.errors import UserError

FILE = "checks.toml"
_SHARES = ("warn_duplicates", "max_duplicates", "max_quarantined", "max_new_users_change", "max_new_items_change")
_WHOLE = ("max_user_events", "min_partitions", "min_rows")
_LEAST = {**dict.fromkeys((*_SHARES, "max_psi"), 0), **dict.fromkeys(("warn_volume", "max_volume", *_WHOLE), 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Bounds of the partition checks; shares are 0 to 1.

    earliest, latest: dates between which events lie (latest None: a day from now). *_duplicates, max_quarantined:
    shares of the rows in. *_volume: how many times more or fewer rows than the trailing median. max_new_*_change: how
    far the share of users (items) never seen before may move from the trailing median. max_psi: drift of the action
    mix. max_user_events: most events of one user. min_partitions: trailing partitions that volume needs; min_rows: rows
    below which shares say nothing. accepted: ingest dates that break a bound and may.
    """

    earliest: datetime.date = datetime.date(1990, 1, 1)
    latest: datetime.date | None = None
    warn_duplicates: float = 0.05
    max_duplicates: float = 0.5
    max_quarantined: float = 0.01
    warn_volume: float = 3.0
    max_volume: float = 10.0
    max_new_users_change: float = 0.25
    max_new_items_change: float = 0.25
    max_psi: float = 0.25
    max_user_events: int = 20_000
    min_partitions: int = 3
    min_rows: int = 100
    accepted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value, whole = getattr(self, name), name in _WHOLE
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise ValueError(f"{name} is {value!r}, must be a {'whole number' if whole else 'number'}")
            if not least <= value < float("inf") or (name in _SHARES and value > 1):
                rule = "from 0 to 1" if name in _SHARES else f"at least {least}"
                raise ValueError(f"{name} is {value!r}, must be {rule}")
        for name in ("earliest", "latest"):
            value = getattr(self, name)
            if type(value) is not datetime.date and not (name == "latest" and value is None):
                raise ValueError(f"{name} is {value!r}, must be a date such as 2020-01-31 without quotes")


def load_bounds(home: Path, ds: str) -> Bounds:
    """Return the bounds of a data set: the defaults, overridden by its checks.toml. Raises UserError."""
    path = home / "landing" / ds / FILE
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Bounds()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{FILE} of data set {ds} is not valid TOML ({error}); mend or remove it") from None
    known = [entry.name for entry in fields(Bounds)]
    if unknown := [name for name in entries if name not in known]:
        raise UserError(f"{FILE} of data set {ds} has unknown entries {', '.join(unknown)}; known: {', '.join(known)}")
    try:
        return Bounds(**entries | {"accepted": _dates(entries.get("accepted", []))})
    except ValueError as error:
        raise UserError(f"{FILE} of data set {ds}: {error}") from None


def _dates(values: Any) -> tuple[str, ...]:
    """Return ingest dates as text; in TOML they stand with or without quotes. Raises ValueError."""
    try:
        return tuple(datetime.date.fromisoformat(str(value)).isoformat() for value in values)
    except (TypeError, ValueError):
        raise ValueError(f"accepted is {values!r}, must be a list of dates such as [2026-01-31]") from None

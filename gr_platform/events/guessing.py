"""What the columns of an unknown log mean, guessed from their names and shown to the user.

Invariant: a guess is overridden by what the user names, and what cannot be guessed is an error that lists the columns.
"""

import re
from pathlib import Path

from gr_platform.errors import UserError
from gr_platform.events.declaration import Declaration

_NAMES = {
    "user_id": """
        userid user uid customerid customer visitorid visitor memberid member accountid account clientid reviewerid
        personid
    """,
    "item_id": """
        itemid item iid movieid movie productid product asin parentasin sku articleid article videoid video bookid book
        isbn songid song trackid track contentid content adid newsid businessid gameid listingid objectid
    """,
    "action": """
        action actiontype eventtype eventname behaviortype behaviourtype behavior behaviour interactiontype event
    """,
    "value": "rating ratings stars score overall value dwelltime dwell",
    "event_ts": """
        timestamp eventts eventtime ts time timestampms unixtime unixreviewtime datetime eventdate date createdat
        occurredat
    """,
    "event_id": "eventid",
}
_FLAGS = {
    "user_id": "--user-column",
    "item_id": "--item-column",
    "action": "--action-column",
    "value": "--value-column",
    "event_ts": "--time-column",
    "event_id": "--event-id-column",
}
NO_COLUMN = "none"
REQUIRED = ("user_id", "item_id", "event_ts")


def map_columns(
    path: Path, columns: list[str], named: dict[str, str | None], known: Declaration | None = None
) -> dict[str, str]:
    """Return canonical name -> source column: as `named`, else as `known` declares it, else by common names.

    A strict declaration leaves nothing to guess. An event id named `none` is left out: it is the one optional column
    whose guess can lose rows. Raises UserError if a named column is missing or a required one is not found.
    """
    mapping: dict[str, str] = {}
    without = {"event_id"} if named.get("event_id") == NO_COLUMN and NO_COLUMN not in columns else set()
    for canonical, wanted in named.items():
        if wanted is not None and canonical not in without:
            mapping[canonical] = _present(path, columns, canonical, wanted)
    for canonical, names in _NAMES.items():
        if canonical in mapping or canonical in without:
            continue
        declared = [name for name in known.alternatives(canonical) if name in columns] if known else []
        if declared or (known and known.strict):
            mapping.update(zip([canonical], declared, strict=False))
            continue
        taken = set(mapping.values())
        simple = {re.sub(r"[^a-z0-9]", "", column.lower()): column for column in columns if column not in taken}
        found = next((simple[name] for name in names.split() if name in simple), None)
        if found is not None:
            mapping[canonical] = found
    for canonical in REQUIRED:
        if canonical not in mapping and known and known.strict:
            raise UserError(
                f"{path.name} has none of the columns that {known.name} declares for {canonical} "
                f"({', '.join(known.alternatives(canonical)) or 'none'}); it has {_listed(columns)}: mend the "
                f"declaration or name the column with {_FLAGS[canonical]}"
            )
        if canonical not in mapping:
            raise UserError(
                f"{path.name} has no column that looks like {canonical}; it has {_listed(columns)}: "
                f"name it with {_FLAGS[canonical]}"
            )
    _check_distinct(path, mapping)
    return mapping


def _present(path: Path, columns: list[str], canonical: str, wanted: str) -> str:
    if wanted in columns:
        return wanted
    folded = [column for column in columns if column.lower() == wanted.lower()]
    if len(folded) == 1:
        return folded[0]
    raise UserError(
        f"{path.name} has no column {wanted!r} ({_FLAGS[canonical]}); it has {_listed(columns)}: name one of these"
    )


def _check_distinct(path: Path, mapping: dict[str, str]) -> None:
    """Only action and value may share a column: then the value is a rating and becomes the action."""
    seen: dict[str, str] = {}
    for canonical, column in mapping.items():
        if column in seen and {canonical, seen[column]} != {"action", "value"}:
            raise UserError(
                f"column {column!r} of {path.name} cannot be both {seen[column]} and {canonical}; name another for one"
            )
        seen.setdefault(column, canonical)


def _listed(columns: list[str]) -> str:
    shown = ", ".join(columns[:20])
    return shown if len(columns) <= 20 else f"{shown} and {len(columns) - 20} more"


def default_name(path: Path, format: str) -> str:
    """Return the data set name for a file: its stem, or for MovieLens the folder's name where that tells more."""
    if path.is_dir():
        return default_name(path.absolute() / f"{path.absolute().name.replace('.', '-')}.x", "folder")
    stem = re.sub(r"(\.[a-z0-9]{1,8})+$", "", path.name.lower())
    if format == "movielens" and stem == "ratings":
        parent = path.absolute().parent.name.lower()
        stem = parent if parent.startswith("ml") else "movielens"
    return re.sub(r"[^a-z0-9._-]+", "-", stem).strip("-._")[:64] or "log"

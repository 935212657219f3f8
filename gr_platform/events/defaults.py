"""The declaration of a new data set: which actions, tasks and rules a log gets that nobody has described.

Invariant: a default is written into dataset.toml, where the user can read and change it; it is never applied silently
later on.
"""

import re
from dataclasses import replace
from typing import Any, Literal

from gr_platform.errors import UserError
from gr_platform.events.declaration import MAX_ACTIONS, Declaration
from gr_platform.events.profile import Profile
from gr_platform.events.readers import Source


def declare(
    name: str,
    source: Source,
    mapping: dict[str, str],
    found: Profile,
    declared: Declaration | None,
    hints: dict[str, Any],
    exclude_seen: str | None,
) -> Declaration:
    """Return the data set's declaration, this file's actions appended unless it is strict, or a new one with defaults.

    hints: what the file says about itself (the simulator's do). Raises UserError for too many actions.
    """
    excluded = _checked_exclude(exclude_seen)
    movielens = source.format == "movielens" and found.ratings
    present = _rating_scale(found.actions) if movielens else _ordered(found, hints)
    if declared is not None:
        fresh = [] if declared.strict else [action for action in present if action not in declared.actions]
        if len(declared.actions) + len(fresh) > MAX_ACTIONS:
            raise UserError(
                f"{source.path.name} would bring data set {name} to {len(declared.actions) + len(fresh)} actions, "
                f"at most {MAX_ACTIONS} are possible; map rare actions to one name before importing"
            )
        extended = declared.with_actions(fresh)
        return replace(extended, exclude_seen=excluded or extended.exclude_seen)
    return Declaration(
        name=name,
        actions=tuple(present),
        tasks=_default_tasks(found, present),
        positives=tuple(present),
        exclude_seen=excluded or hints.get("exclude_seen") or ("all" if source.format == "movielens" else "none"),
        user_id_type=found.user_id_type,
        item_id_type=found.item_id_type,
        columns={**mapping, **({"action": mapping["value"]} if found.ratings else {})},
        time_unit=found.time_unit,
    )


def _checked_exclude(wanted: str | None) -> Literal["none", "all"] | None:
    if wanted is None:
        return None
    if wanted == "none":
        return "none"
    if wanted == "all":
        return "all"
    raise UserError(
        f"exclude_seen is {wanted!r}; it can be 'none' (items may repeat) or 'all' (never show a seen item)"
    )


def _ordered(found: Profile, hints: dict[str, Any]) -> list[str]:
    """Return the actions: as the file's own declaration orders them, ratings ascending, else most frequent first."""
    if found.ratings:
        return sorted(found.actions, key=_rating)
    first = [action for action in hints.get("actions", []) if action in found.actions]
    return first + [action for action in found.actions if action not in first]


def _rating(action: str) -> float:
    return float(action.removeprefix("rate_"))


def _rating_scale(actions: dict[str, int]) -> list[str]:
    """Return MovieLens' scale: 1..5, or 0.5..5 in half steps if any rating is a half."""
    halves = any(_rating(action) % 1 for action in actions)
    return [f"rate_{step / 2:g}" for step in range(1, 11) if halves or step % 2 == 0]


def _default_tasks(found: Profile, actions: list[str]) -> dict[str, tuple[str, ...]]:
    """Return `like` = the upper fifth of a rating scale; else a task for every action but the most frequent."""
    if found.ratings:
        top = max(map(_rating, actions))
        liked = tuple(action for action in actions if _rating(action) >= 0.8 * top)
        return {"like": liked} if 0 < len(liked) < len(actions) else {}
    frequent = next(iter(found.actions))
    tasks: dict[str, tuple[str, ...]] = {}
    for action in actions:
        if action != frequent:
            slug = re.sub(r"[^a-z0-9_]+", "_", action.lower()).strip("_") or "task"
            tasks[slug if slug not in tasks else f"{slug}_{len(tasks)}"] = (action,)
    return tasks

"""Who serves: the aliases of one retrieval + ranking pair at a time, moved whole.

Invariant: both models of a pair move together. `champion` serves or is about to, `previous` served before it,
`challenger` is what was trained last and may not serve yet; a version keeps as tags why it was refused or taken back.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gr_platform.errors import UserError
from gr_platform.models.config import Kind
from gr_platform.registry import versions
from gr_platform.registry.versions import CHALLENGER, CHAMPION, KINDS, PREVIOUS, Version

log = logging.getLogger(__name__)

REASONS, PROMOTED, FORCED = "gr.refused", "gr.promoted", "gr.promoted_against"
ROLLED_BACK = "gr.rolled_back"
# On versions that a promotion or rollback has begun with and not ended: to which pair.
PROMOTING, RETREATING = "gr.promoting", "gr.rolling_back_to"
MAX_TAG_CHARS = 4000
Pair = Mapping[Kind, Version]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """pair: the versions that ask to serve; reigning: the champions at that time, empty until there was a pair."""

    pair: Pair
    reigning: Pair

    @property
    def is_new(self) -> bool:
        """Whether the pair differs from the one that reigns."""
        return not same(self.pair, self.reigning)


def same(a: Pair, b: Pair) -> bool:
    """Return whether two pairs are of the same versions, whatever their roles."""
    return {kind: version.version for kind, version in a.items()} == {kind: v.version for kind, v in b.items()}


def contest(home: Path, ds: str) -> Contest:
    """Return who contends: the challenger of each kind, or the champion where there is none.

    Raises UserError if a kind has neither.
    """
    return Contest(pair={kind: _contender(home, ds, kind) for kind in KINDS}, reigning=champions(home, ds))


def champions(home: Path, ds: str) -> dict[Kind, Version]:
    """Return the serving version of each kind; empty until a whole pair was promoted."""
    return _whole(home, ds, CHAMPION)


def previous(home: Path, ds: str) -> dict[Kind, Version]:
    """Return the version of each kind that served before; empty if there is none of a kind."""
    return _whole(home, ds, PREVIOUS)


def crown(home: Path, found: Contest, *, against: str = "") -> None:
    """Make the pair the champions and remember those before; `against`: what it was promoted in spite of.

    Killed half-way, it is finished by the next call, with the contest that `interrupted` returns.
    """
    mark = {PROMOTING: _numbers(found.pair), **({FORCED: against[:MAX_TAG_CHARS]} if against else {})}
    for kind, version in found.pair.items():
        if kind not in found.reigning or found.reigning[kind].version != version.version:
            versions.drop_tag(home, version, RETREATING)
            versions.set_tags(home, version, mark)
    for before in found.reigning.values() if found.is_new else ():
        # A marked one reigns by this very promotion.
        if PROMOTING not in before.tags:
            versions.move_alias(home, before, PREVIOUS)
    for version in found.pair.values():
        versions.move_alias(home, version, CHAMPION)
    for version in found.pair.values():
        if CHALLENGER in version.aliases:
            versions.drop_alias(home, version, CHALLENGER)
        for tag in (REASONS, ROLLED_BACK):
            versions.drop_tag(home, version, tag)
        versions.set_tags(home, version, {PROMOTED: _now()})
        log.info("event=promoted name=%s version=%s against=%r", version.name, version.version, against)
    # Last, as long as any of them has it the promotion is not over.
    for version in found.pair.values():
        versions.drop_tag(home, versions.numbered(home, version.name, version.version), PROMOTING)


def interrupted(home: Path, ds: str) -> Contest | None:
    """Return the promotion that was killed after one of its pair had become champion, None if none was."""
    reigning = champions(home, ds)
    marks = [version.tags[PROMOTING] for version in reigning.values() if PROMOTING in version.tags]
    return Contest(pair=_numbered(home, ds, marks[0]), reigning=reigning) if marks else None


def refuse(home: Path, pair: Pair, reasons: list[str]) -> None:
    """Let the pair stay challenger, with the reasons as a tag of those that do not reign already."""
    for version in pair.values():
        if CHAMPION in version.aliases:
            continue
        versions.set_tags(home, version, {REASONS: "; ".join(reasons)[:MAX_TAG_CHARS]})
    log.warning("event=promotion_refused reasons=%s", " | ".join(reasons))


def retreat(home: Path, ds: str) -> tuple[dict[Kind, Version], dict[Kind, Version]]:
    """Return which champions a rollback takes back, and the pair that serves then.

    Of a rollback that was killed half-way those that it left. Raises UserError if nothing served before.
    """
    now, before = champions(home, ds), previous(home, ds)
    marks = [version.tags[RETREATING] for version in now.values() if RETREATING in version.tags]
    if marks:
        back = _numbered(home, ds, marks[0])
        return {kind: version for kind, version in now.items() if version.version != back[kind].version}, back
    if not now or not before:
        raise UserError(f"no pair of {ds} served before the present one, so there is nothing to go back to")
    return now, before


def mark_taken_back(home: Path, reigning: Pair, before: Pair) -> None:
    """Record that champions are taken back, and for whom: from then on nothing brings them back by itself."""
    for kind, version in reigning.items():
        if version.version != before[kind].version:
            versions.set_tags(home, version, {RETREATING: _numbers(before), ROLLED_BACK: _now()})


def take_back(home: Path, reigning: Pair, before: Pair) -> None:
    """Make `before` the champions again and `reigning`, marked as taken back, the previous ones."""
    for kind, version in reigning.items():
        # The champion's mark says who takes its place, so its alias goes last.
        versions.move_alias(home, version, PREVIOUS)
        if CHALLENGER in version.aliases:
            versions.drop_alias(home, version, CHALLENGER)
        for tag in (ROLLED_BACK, RETREATING):
            versions.drop_tag(home, before[kind], tag)
        versions.move_alias(home, before[kind], CHAMPION)
        log.warning("event=rolled_back name=%s version=%s", version.name, version.version)
    # Whoever makes one of them champion again by hand wants it to serve.
    for version in reigning.values():
        versions.drop_tag(home, versions.numbered(home, version.name, version.version), RETREATING)


def is_retreating(version: Version) -> bool:
    """Return whether a champion is being rolled back: a rollback was killed half-way, or is under way."""
    return RETREATING in version.tags


def _whole(home: Path, ds: str, alias: str) -> dict[Kind, Version]:
    held = {kind: versions.by_alias(home, ds, kind, alias) for kind in KINDS}
    found = {kind: version for kind, version in held.items() if version is not None}
    # One alone is what a promotion leaves that was killed half-way: it never served.
    return found if len(found) == len(KINDS) else {}


def _numbers(pair: Pair) -> str:
    """Return a pair as a tag holds it: `retrieval=2 ranking=2`."""
    return " ".join(f"{kind}={version.version}" for kind, version in pair.items())


def _numbered(home: Path, ds: str, numbers: str) -> dict[Kind, Version]:
    """Return the pair that a tag names."""
    found = dict(each.split("=") for each in numbers.split())
    return {kind: versions.numbered(home, versions.model_name(ds, kind), found[kind]) for kind in KINDS}


def _contender(home: Path, ds: str, kind: Kind) -> Version:
    for alias in (CHALLENGER, CHAMPION):
        if version := versions.by_alias(home, ds, kind, alias):
            return version
    raise UserError(f"{versions.model_name(ds, kind)} has no registered version; run gr materialize first")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

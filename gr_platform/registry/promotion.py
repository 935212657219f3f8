"""Who serves: the gate between challenger and champion, for one retrieval + ranking pair at a time.

Invariant: both models of a pair move together, and only if no rule objects; a refused challenger keeps its reasons as
tags and the champion pair stays as it was.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gr_platform.errors import UserError
from gr_platform.models.config import Kind
from gr_platform.registry import tracking, versions
from gr_platform.registry.versions import CHALLENGER, CHAMPION, KINDS, PREVIOUS, Version

log = logging.getLogger(__name__)

REASONS = "gr.refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What the gate knows of one version: its figures and the sequences they were measured on."""

    kind: Kind
    metrics: Mapping[str, float]
    sequences: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The gate's answer on a pair: `reasons` why it must not serve; `reigning` are the champions at that time."""

    pair: Mapping[Kind, Version]
    reigning: Mapping[Kind, Version]
    reasons: tuple[str, ...]

    @property
    def is_new(self) -> bool:
        """Whether the pair differs from the one that reigns."""
        return any(self.reigning.get(kind) != version for kind, version in self.pair.items())

    @property
    def serving(self) -> Mapping[Kind, Version]:
        """The pair that is to serve: the judged one if it passed, else the champions (empty if there are none)."""
        return self.reigning if self.reasons else self.pair


def objections(candidate: Candidate, champion: Candidate | None, parity_ok: bool) -> list[str]:
    """Return why `candidate` must not serve, one sentence a rule; empty if it may."""
    found = [f"{name} is {value}" for name, value in candidate.metrics.items() if not math.isfinite(value)]
    if not parity_ok:
        found.append("the bundle's scores differ from the trained model's")
    if candidate.kind == "retrieval":
        ours, popular = candidate.metrics["test_hr_at_10"], candidate.metrics["popularity_hr_at_10"]
        if not ours > popular:
            found.append(f"HR@10 {ours:.4f} is not above popularity's {popular:.4f}")
    # Figures of other sequences are not comparable; then the absolute rules above decide alone.
    if champion is not None and champion.sequences == candidate.sequences:
        found += _worse(candidate, champion)
    return [f"{candidate.kind}: {reason}" for reason in found]


def _worse(candidate: Candidate, champion: Candidate) -> list[str]:
    if candidate.kind == "retrieval":
        ours, theirs = candidate.metrics["test_hr_at_10"], champion.metrics["test_hr_at_10"]
        return [f"HR@10 {ours:.4f} is below the champion's {theirs:.4f}"] if ours < theirs else []
    ours, theirs = _mean_ne(candidate.metrics), _mean_ne(champion.metrics)
    return [f"mean NE {ours:.4f} is above the champion's {theirs:.4f}"] if ours > theirs else []


def _mean_ne(metrics: Mapping[str, float]) -> float:
    values = [v for name, v in metrics.items() if name.startswith("test_") and name.endswith("_ne")]
    return sum(values) / len(values) if values else math.nan


def contenders(home: Path, ds: str) -> dict[Kind, Version]:
    """Return the version of each kind that the gate looks at: the challenger, or the champion where there is none.

    Raises UserError if a kind has neither.
    """
    return {kind: _contender(home, ds, kind) for kind in KINDS}


def judge(home: Path, ds: str, parity_ok: Mapping[Kind, bool]) -> Verdict:
    """Return the gate's verdict on the contenders; nothing is changed.

    `parity_ok[kind]` says whether the bundle of the kind's contender gives the trained model's scores.
    """
    pair, reigning = contenders(home, ds), champions(home, ds)
    if pair == reigning:
        return Verdict(pair=pair, reigning=reigning, reasons=())
    reasons = [
        reason
        for kind, version in pair.items()
        for reason in objections(
            _candidate(home, kind, version),
            _candidate(home, kind, reigning[kind]) if kind in reigning else None,
            parity_ok[kind],
        )
    ]
    return Verdict(pair=pair, reigning=reigning, reasons=tuple(reasons))


def settle(home: Path, verdict: Verdict) -> None:
    """Write a verdict into the registry: move the aliases of a pair that passed, tag one that did not."""
    if verdict.reasons:
        _refuse(home, verdict)
    elif verdict.is_new:
        _crown(home, verdict)


def champions(home: Path, ds: str) -> dict[Kind, Version]:
    """Return the serving version of each kind; empty until a whole pair was promoted."""
    held = {kind: versions.by_alias(home, ds, kind, CHAMPION) for kind in KINDS}
    reigning = {kind: version for kind, version in held.items() if version is not None}
    # One alone is what a promotion leaves that was killed half-way: it never served.
    return reigning if len(reigning) == len(KINDS) else {}


def _contender(home: Path, ds: str, kind: Kind) -> Version:
    for alias in (CHALLENGER, CHAMPION):
        if version := versions.by_alias(home, ds, kind, alias):
            return version
    raise UserError(f"{versions.model_name(ds, kind)} has no registered version; run gr materialize first")


def _candidate(home: Path, kind: Kind, version: Version) -> Candidate:
    run = tracking.connect(home).get_run(version.run_id)
    return Candidate(kind=kind, metrics=run.data.metrics, sequences=run.data.tags[tracking.SEQUENCES_DIGEST])


def _refuse(home: Path, verdict: Verdict) -> None:
    for version in verdict.pair.values():
        versions.set_tags(home, version, {REASONS: "; ".join(verdict.reasons)[:4000]})
    log.warning("event=promotion_refused reasons=%s", " | ".join(verdict.reasons))


def _crown(home: Path, verdict: Verdict) -> None:
    # In this order a promotion that is killed half-way is judged and finished by the next one.
    for kind, version in verdict.pair.items():
        before = verdict.reigning.get(kind)
        if before is not None and before.version != version.version:
            versions.move_alias(home, before, PREVIOUS)
    for version in verdict.pair.values():
        versions.move_alias(home, version, CHAMPION)
    for version in verdict.pair.values():
        if CHALLENGER in version.aliases:
            versions.drop_alias(home, version, CHALLENGER)
        versions.drop_tag(home, version, REASONS)
        log.info("event=promoted name=%s version=%s", version.name, version.version)

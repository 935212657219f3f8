"""Whether the data or the served model have drifted: a measure each, held against the operator's bounds.

Invariant: what cannot be told yet breaks no bound. A day that one item swamps is an alarm and never a reason to
retrain, whatever else it moves: a model must not learn from it.
"""

import datetime
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events.ingest import clean_events
from gr_platform.events.times import DAY_MS
from gr_platform.lifecycle import options
from gr_platform.lifecycle.drift_events import DayDrift, stored_day_drift
from gr_platform.lifecycle.drift_served import Agreement, ScoreDrift, agreement, stored_score_drift
from gr_platform.lifecycle.options import Drift
from serving import repository

log = logging.getLogger(__name__)

FOLDER = "drift"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One measure: its value (None: not judged) against a bound (None: only shown). why: a sentence about both.

    asks: whether a crossed bound is a reason to retrain.
    """

    name: str
    value: float | None
    bound: float | None
    ok: bool
    why: str
    asks: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftReport:
    """All measures of a data set. day: the newest of the log with enough events (YYYY-MM-DD, "": none).

    items, actions: [name, share of the days before, share of the day], the largest first.
    """

    dataset: str
    day: str
    num_events: int
    measures: tuple[Measure, ...]
    items: list[list[Any]]
    actions: list[list[Any]]

    def __getitem__(self, name: str) -> Measure:
        """Return a measure by its name."""
        return next(measure for measure in self.measures if measure.name == name)

    @property
    def alarms(self) -> list[str]:
        """What is crossed, a sentence each."""
        return [measure.why for measure in self.measures if not measure.ok]

    @property
    def asks(self) -> list[str]:
        """What is crossed and a reason to retrain; nothing on a day that one item swamps."""
        if not self["item_share"].ok:
            return []
        return [measure.why for measure in self.measures if measure.asks and not measure.ok]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedPair:
    """The pair that the model repository names: digests of its models, until when they learned, since when it is there.

    trained_until_ms: of the model that learned longest ago; None if a bundle does not say. since: Unix time.
    """

    retriever: str
    ranker: str
    trained_until_ms: int | None
    since: float


def crossed(home: Path, ds: str) -> list[str]:
    """Return why a data set's models should be trained again, a sentence a reason; [] if no pair of it serves.

    Measured once for each state of events and served log, so asking again is cheap. Raises UserError if the events
    change meanwhile.
    """
    return report(home, ds).asks if served_pair(home, ds) is not None else []


def report(home: Path, ds: str) -> DriftReport:
    """Return every measure of a data set and of its served pair. Raises UserError if no events were ingested yet."""
    chosen, parent, pair = options.read(home).drift, home / FOLDER / ds, served_pair(home, ds)
    events = stored_day_drift(parent, clean_events(home, ds), chosen)
    day = DayDrift(**events.manifest.facts)
    scores, agreed = ScoreDrift(), Agreement(why="no models are served")
    kept = {events.folder}
    if pair is not None:
        stored = stored_score_drift(parent, home, ds, pair.ranker, chosen.min_events)
        scores, agreed = (
            ScoreDrift(**stored.manifest.facts),
            agreement(home, ds, pair.retriever, pair.ranker, min_requests=chosen.min_events),
        )
        kept.add(stored.folder)
    _remove_others(parent, kept)
    found = DriftReport(
        dataset=ds,
        day=day.day,
        num_events=day.num_events,
        measures=(
            *_of_events(day, chosen),
            _of_scores(scores, chosen),
            _of_agreement(agreed, chosen),
            *_of_age(pair, day, chosen),
        ),
        items=day.items,
        actions=day.actions,
    )
    for measure in found.measures:
        if not measure.ok:
            log.warning("event=drifted dataset=%s day=%s measure=%s value=%s", ds, day.day, measure.name, measure.value)
    return found


def served_pair(home: Path, ds: str) -> ServedPair | None:
    """Return the pair of a data set in the model repository; None if there is none, it is another data set's, or it is
    damaged."""
    folder = repository.current(home)
    if folder is None:
        return None
    try:
        facts = storage.read_manifest(folder).facts
        bundles = [storage.read_manifest(folder / model / "1" / "bundle") for model in ("gr_retriever", "gr_ranker")]
    except UserError:
        # The empty repository of a server without models, or one that the next deployment makes again.
        return None
    if facts["dataset"] != ds:
        return None
    until = [_trained_until(home, ds, bundle) for bundle in bundles]
    return ServedPair(
        retriever=facts["retrieval"],
        ranker=facts["ranking"],
        trained_until_ms=None if None in until else min(time_ms for time_ms in until if time_ms is not None),
        since=(home / repository.LINK).lstat().st_mtime,
    )


def _trained_until(home: Path, ds: str, bundle: storage.Manifest) -> int | None:
    """Return until when a bundle's model learned, as the bundle says or the run that it was exported from."""
    until: int | None = bundle.facts.get("trained_until_ms")
    if until is not None:
        return until
    for path in (home / "runs" / ds).glob(f"{bundle.kind}_model-*/{storage.MANIFEST}"):
        try:
            run = storage.read_manifest(path.parent)
        except UserError:
            continue
        if run.digest == bundle.spec.get("run"):
            until = run.facts.get("trained_until_ms")
    return until


def _remove_others(parent: Path, kept: set[Path]) -> None:
    for folder in parent.glob("*-*"):
        if folder not in kept and not folder.name.startswith(storage.TEMPORARY):
            shutil.rmtree(folder, ignore_errors=True)


def _of_events(day: DayDrift, chosen: Drift) -> list[Measure]:
    few = ""
    if not day.day:
        few = f"no day has {chosen.min_events:,} events (drift.min_events)"
    elif day.num_people is not None and day.item_psi is None:
        few = f"too few people made the {day.num_events:,} events of {day.day}"
    elif day.item_psi is None:
        few = f"{day.num_reference:,} events in the {chosen.reference_days} days before {day.day} are too few"
    against = f"those of {day.num_days} days before" + (f" ({day.left_out} left out)" if day.left_out else "")
    before = "" if day.top_share_before is None else f", {_percent(day.top_share_before)} of the days before"
    top = (
        f"item {day.top_item} has {_percent(day.top_share or 0)} of the {day.num_events:,} events of {day.day}{before}"
    )
    return [
        _psi("item_drift", day.item_psi, chosen.max_item_drift, few, f"items of {day.day} against {against}"),
        _psi("action_drift", day.action_psi, chosen.max_action_drift, few, f"actions of {day.day} against {against}"),
        _measure(
            "item_share",
            day.top_share,
            chosen.max_item_share,
            few
            if day.top_share is None
            else f"{top}, at most {_percent(chosen.max_item_share)} (drift.max_item_share)",
            asks=False,
        ),
    ]


def _of_scores(scores: ScoreDrift, chosen: Drift) -> Measure:
    if not scores.psi:
        why = f"too few requests to the served ranking model: {scores.num_requests:,} on a day, before it "
        return _measure("score_drift", None, chosen.max_score_drift, f"{why}{scores.num_reference:,}")
    task = max(scores.psi, key=lambda each: scores.psi[each])
    was, became = scores.means[task]
    what = f"scores of {task} on {scores.day} (mean {became:.3g}) against the days before (mean {was:.3g})"
    return _psi("score_drift", scores.psi[task], chosen.max_score_drift, "", what)


def _of_agreement(agreed: Agreement, chosen: Drift) -> Measure:
    if agreed.loss is None:
        return _measure("online_offline", None, chosen.max_hit_rate_loss, agreed.why)
    said = (
        f"online {_percent(agreed.online or 0)} of {agreed.num_judged:,} lists were hit, offline "
        f"{_percent(agreed.offline or 0)}; before it {_percent(agreed.online_before or 0)} and "
        f"{_percent(agreed.offline_before or 0)}: a relative loss of {_percent(agreed.loss)}, at most "
        f"{_percent(chosen.max_hit_rate_loss)} (drift.max_hit_rate_loss)"
    )
    return _measure("online_offline", agreed.loss, chosen.max_hit_rate_loss, said)


def _of_age(pair: ServedPair | None, day: DayDrift, chosen: Drift) -> list[Measure]:
    bound = chosen.max_model_age_days
    if pair is None:
        none = "no models of this data set are served"
        return [_measure("model_age", None, bound, none), _measure("served_for", None, None, none, asks=False)]
    days = (time.time() - pair.since) / 86_400
    served = _measure("served_for", days, None, f"the pair has been in front for {days:.1f} days", asks=False)
    if pair.trained_until_ms is None or day.newest_ms is None:
        return [_measure("model_age", None, bound, "the served bundles do not say until when they learned"), served]
    # A day of too few events does not count as the log's newest, but was learned from.
    age = max(0.0, (day.newest_ms - pair.trained_until_ms) / DAY_MS)
    said = (
        f"the served models learned from events until {_date(pair.trained_until_ms)}, the log goes to "
        f"{_date(day.newest_ms)}: {age:.1f} days, at most {bound:g} (drift.max_model_age_days)"
    )
    return [_measure("model_age", age, bound, said), served]


def _psi(name: str, value: float | None, bound: float, few: str, what: str) -> Measure:
    if value is None:
        return _measure(name, None, bound, few)
    said = f"{what}: population stability index {value:.3f}, at most {bound:g} (drift.max_{name})"
    return _measure(name, value, bound, said)


def _measure(name: str, value: float | None, bound: float | None, why: str, *, asks: bool = True) -> Measure:
    # A NaN bound cannot be set, a NaN value would be a fault of ours: it is no reason to stay silent.
    ok = value is None or bound is None or value <= bound
    return Measure(name=name, value=value, bound=bound, ok=ok, why=why, asks=asks)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _date(ms: int) -> str:
    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).date().isoformat()

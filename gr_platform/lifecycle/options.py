"""What the operator of the lifecycle sets: `lifecycle.toml` in the state folder, defaults for the rest.

Invariant: bounds are data. What a gate or a check measures stands in code, from where on it objects stands here.
"""

import logging
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from gr_platform import option_files
from gr_platform.errors import UserError

log = logging.getLogger(__name__)

FILE = "lifecycle.toml"
_CRON = re.compile(r"\S+( \S+){4}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """When things happen, as cron lines in UTC; "" = never. ingest: of the day that ended.

    daily: a retraining from the champion's weights; weekly: one from scratch. cleaning: of old results (`Retention`).
    """

    ingest: str = "30 0 * * *"
    daily: str = "0 2 * * *"
    weekly: str = "0 4 * * 0"
    cleaning: str = "0 8 * * 0"

    def __post_init__(self) -> None:
        for name in ("ingest", "daily", "weekly", "cleaning"):
            if (line := getattr(self, name)) and not _CRON.fullmatch(line):
                raise ValueError(f"schedule.{name} is {line!r}, must be five fields of cron or empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retraining:
    """recipe: as `gr train` takes it, a file from the state folder on. num_processes: that share each step.

    window_days: how much of the log's end is held out to judge on, in whole UTC days; it is widened until it asks
    min_targets users. warm_epochs: at most, of a warm start (from scratch: the recipe's).
    """

    recipe: str = "auto"
    num_processes: int = 1
    window_days: int = 1
    min_targets: int = 100
    warm_epochs: int = 2

    def __post_init__(self) -> None:
        for name in ("num_processes", "window_days", "min_targets", "warm_epochs"):
            _at_least(f"retraining.{name}", getattr(self, name), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """From where on a gate objects; challenger against champion on the same targets unless it says otherwise.

    confidence: of "better" and "worse". min_gain: relative gain of NDCG@10 or NE that the pair must have in one of its
    models for certain (0: any). max_slice_loss: relative, of HR@10 in a slice of at least min_slice_users, for certain.
    max_latency_ratio, max_memory_ratio: of scoring. min_catalogue_ratio: distinct items in all top 10.
    max_score_drift: population stability index of scores that did not move towards what happened. max_item_share: of
    the window's events on one item.
    """

    confidence: float = 0.95
    min_gain: float = 0.0
    max_slice_loss: float = 0.1
    min_slice_users: int = 100
    max_latency_ratio: float = 1.5
    max_memory_ratio: float = 1.5
    min_catalogue_ratio: float = 0.5
    max_score_drift: float = 1.0
    max_item_share: float = 0.3

    def __post_init__(self) -> None:
        _within("gates.confidence", self.confidence, 0.5, 0.9999)
        for name in ("max_item_share", "min_catalogue_ratio", "max_slice_loss"):
            _within(f"gates.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("min_gain", "max_latency_ratio", "max_memory_ratio", "max_score_drift", "min_slice_users"):
            _at_least(f"gates.{name}", getattr(self, name), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """requests: live ones that a challenger must have scored before it may serve, 0 = none. share: of recommendations.

    max_failures: share of them. max_latency_ratio: its time to score against the champion's.
    max_score_drift: population stability index. min_agreement: mean rank correlation with what was served.
    """

    requests: int = 0
    share: float = 0.2
    max_failures: float = 0.01
    max_latency_ratio: float = 2.0
    max_score_drift: float = 3.0
    min_agreement: float = 0.2

    def __post_init__(self) -> None:
        _at_least("shadow.requests", self.requests, 0)
        _within("shadow.share", self.share, 0.001, 1.0)
        _within("shadow.max_failures", self.max_failures, 0.0, 1.0)
        _within("shadow.min_agreement", self.min_agreement, -1.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """From where on data or the served model count as drifted; then the check warns and a retraining is asked for.

    reference_days: what the newest day is held against. max_item_drift, max_action_drift, max_score_drift: population
    stability index. max_item_share: of a day's events on one item; beyond it the day is an alarm, and nothing is asked
    for. max_hit_rate_loss: relative, of the served models' online hit rate by their offline one against the models
    before. max_model_age_days: since the newest event they were trained on, by the log's clock. min_events: of a day,
    and requests, to say anything of them. retrain: whether a crossed bound starts one.
    """

    reference_days: int = 7
    max_item_drift: float = 0.25
    max_action_drift: float = 0.1
    max_score_drift: float = 0.5
    max_item_share: float = 0.3
    max_hit_rate_loss: float = 0.5
    max_model_age_days: float = 7.0
    min_events: int = 100
    retrain: bool = True

    def __post_init__(self) -> None:
        _at_least("drift.reference_days", self.reference_days, 1)
        _at_least("drift.min_events", self.min_events, 1)
        _within("drift.max_item_share", self.max_item_share, 0.0, 1.0)
        for name in ("item_drift", "action_drift", "score_drift", "hit_rate_loss", "model_age_days"):
            _at_least(f"drift.max_{name}", getattr(self, f"max_{name}"), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long what nobody refers to is kept.

    keep_days: trained runs with their evaluations, bundles, sequences. keep_mlflow_days: MLflow's runs. What an alias
    names or a pointer calls current stays, however old.
    """

    keep_days: float = 14.0
    keep_mlflow_days: float = 90.0

    def __post_init__(self) -> None:
        for name in ("keep_days", "keep_mlflow_days"):
            _at_least(f"retention.{name}", getattr(self, name), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleOptions:
    """The tables of `lifecycle.toml`."""

    schedule: Schedule = field(default_factory=Schedule)
    retraining: Retraining = field(default_factory=Retraining)
    gates: Gates = field(default_factory=Gates)
    shadow: Shadow = field(default_factory=Shadow)
    drift: Drift = field(default_factory=Drift)
    retention: Retention = field(default_factory=Retention)


def read(home: Path) -> LifecycleOptions:
    """Return the options in `lifecycle.toml` of a state folder, or the defaults. Raises UserError naming the option.

    A recipe that is a file is looked for from the state folder on.
    """
    found = option_files.read(home / FILE, LifecycleOptions)
    if not found.retraining.recipe.endswith(".toml"):
        return found
    return replace(found, retraining=replace(found.retraining, recipe=str(home / found.retraining.recipe)))


def loadable(home: Path) -> LifecycleOptions:
    """Return the options, or the defaults and a line in the log where the file does not fit: landing, deploying and
    alarms must go on. A retraining reads the file itself, and says what is wrong with it."""
    try:
        return read(home)
    except UserError as error:
        log.warning("event=options_refused reason=%r", str(error))
        return LifecycleOptions()


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name} is {value}, must be at least {least}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, must be from {low} to {high}")

"""A week in minutes: a log is lived through day by day on a platform of its own, under a load that never stops.

Invariant: everything goes the way it goes in production: the day's file is imported, the job `retraining` learns,
judges and deploys, the real model server answers over gRPC the whole time. Nothing of the user's state folder is read,
but for an ingested data set, or written, but for the replay's own folder.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gr_platform import provenance, storage
from gr_platform.commands import pipeline
from gr_platform.errors import UserError
from gr_platform.evaluation.evaluate import evaluate_run
from gr_platform.evaluation.significance import compare_tables, intervals
from gr_platform.events.landing import import_file
from gr_platform.lifecycle import release
from gr_platform.lifecycle.folders import bundle_of, run_of
from gr_platform.models.config import Kind
from gr_platform.registry import promotion
from gr_platform.registry.promotion import Pair
from gr_platform.replay import report, traffic
from gr_platform.replay.answers import staleness
from gr_platform.replay.load import RATE, Served, StreamLoad
from gr_platform.replay.stream import Day, Stream, StreamOptions, of_dataset, simulated
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.time_split import DAY_MS, TimeSplit

log = logging.getLogger(__name__)

TARGET_SECONDS = 600.0
TARGET_DAYS = 7
SETTLE_S = 5.0
# `small` is for logs of some 200,000 events: on the stream's few it needs more and larger steps.
RECIPE = """base = "small"
name = "replay"
[training]
learning_rate = 3e-3
batch_size = 16
max_epochs = 6
patience = 2
"""
LIFECYCLE = """[retraining]
recipe = "{recipe}"
warm_epochs = {warm_epochs}
[shadow]
requests = {shadow}
share = 1.0
"""
SERVING = "log_seconds = 1.0\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """stream: what is replayed. dataset: an ingested data set instead of simulated events. rate: requests a second.

    recipe: a name or TOML file, "" for the one of RECIPE. shadow: live requests that a challenger scores before it may
    serve, 0 = none. command: as it was called, for the report.
    """

    stream: StreamOptions = field(default_factory=StreamOptions)
    dataset: str = ""
    rate: float = RATE
    recipe: str = ""
    warm_epochs: int = 2
    shadow: int = 0
    command: str = "gr replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """day: told as one begins, None before the first; stage: the fields that stages log; said: a line of its own."""

    day: Callable[[Day | None], None]
    stage: pipeline.StageListener
    said: Callable[[str], None]


def replay(folder: Path, options: ReplayOptions, listener: Listener, *, source: Path | None = None) -> Path:
    """Live through the days in the new folder `folder` and return the path of the report.

    source: the state folder of `options.dataset`. Raises UserError if the first model cannot be made or the server does
    not start; a day that fails is told in the report.
    """
    began = time.monotonic()
    folder.mkdir(parents=True)
    home = folder / "home"
    stream = _stream(folder / "stream", options, source)
    _settle(home, options)
    listener.day(None)
    import_file(
        stream.history,
        home=home,
        dataset=stream.dataset,
        declaration=stream.declaration,
        ingest_date=stream.history_date,
    )
    pipeline.retrain(home, home / "dagster_home", start="scratch", reason="replay", on_stage=listener.stage)
    frozen = promotion.champions(home, stream.dataset)
    days, load = _live(folder, home, stream, options, frozen, listener)
    facts = {
        "dataset": stream.dataset,
        "command": options.command,
        "commit": provenance.git_commit() or "unknown",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "machine": provenance.machine(),
        "seconds": time.monotonic() - began,
        "target_seconds": TARGET_SECONDS if len(days) == TARGET_DAYS and not options.dataset else None,
        "days": days,
        **load,
    }
    return report.write(folder, facts)


def _stream(folder: Path, options: ReplayOptions, source: Path | None) -> Stream:
    if not options.dataset:
        return simulated(folder, options.stream)
    if source is None:
        raise ValueError("source is None, must be the state folder of the data set to replay")
    return of_dataset(folder, source, options.dataset, options.stream)


def _settle(home: Path, options: ReplayOptions) -> None:
    """Make the replay's state folder with the options that it runs by."""
    home.mkdir()
    (home / "dagster_home").mkdir()
    from gr_platform import settings

    shutil.copy(settings.PROJECT_ROOT / "dagster_home" / "dagster.yaml", home / "dagster_home" / "dagster.yaml")
    recipe = options.recipe
    if not recipe:
        (home / "replay.toml").write_text(RECIPE, encoding="utf-8")
        recipe = "replay.toml"
    text = LIFECYCLE.format(recipe=recipe, warm_epochs=options.warm_epochs, shadow=options.shadow)
    (home / "lifecycle.toml").write_text(text, encoding="utf-8")
    (home / "serving.toml").write_text(SERVING, encoding="utf-8")


def _live(
    folder: Path, home: Path, stream: Stream, options: ReplayOptions, frozen: Pair, listener: Listener
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the facts of every day, and of the load meanwhile."""
    from serving.server import EmbeddedServer

    first = served_of(home, stream.dataset, frozen)
    days = []
    with (
        EmbeddedServer(home) as handle,
        StreamLoad(
            folder / "load",
            stream,
            first,
            grpc_address=handle.grpc_address,
            rate=options.rate,
            seed=options.stream.seed,
        ) as load,
    ):
        for day in stream.days:
            listener.day(day)
            if day.number > 1:
                load.live(day.number)
            days.append(_Day(home, stream, day, frozen, load, listener)())
        time.sleep(SETTLE_S)
        told = load.end()
    return days, {"load": traffic.figures(told), "staleness": asdict(staleness(told))}


def served_of(home: Path, ds: str, pair: Pair) -> Served:
    """Return the bundles of a pair as the load knows them."""
    folders = {kind: bundle_of(home, ds, kind, version) for kind, version in pair.items()}
    label = "version " + pair["ranking"].version
    return Served(retrieval=folders["retrieval"], ranking=folders["ranking"], label=label)


class _Day:
    """One day: its file comes in, models are trained, judged and deployed, and yesterday's are asked about it."""

    def __init__(
        self, home: Path, stream: Stream, day: Day, frozen: Pair, load: StreamLoad, listener: Listener
    ) -> None:
        self._home, self._stream, self._day = home, stream, day
        self._frozen, self._load, self._listener = frozen, load, listener
        self._reigning = promotion.champions(home, stream.dataset)
        self._deploying: list[float] = []

    def __call__(self) -> dict[str, Any]:
        began = time.monotonic()
        outcome, reasons = self._outcome()
        facts = {
            "number": self._day.number,
            "date": self._day.date,
            "num_events": self._day.num_events,
            "fault": self._day.fault,
            "top_share": self._day.top_share,
            "new_item_share": self._day.new_item_share,
            "outcome": outcome,
            "reasons": reasons,
            "seconds": time.monotonic() - began,
            "deploy_s": self._deploying[1] - self._deploying[0] if outcome == "promoted" else None,
        }
        return facts | self._quality()

    def _outcome(self) -> tuple[str, list[str]]:
        """Return what became of the day's model: promoted, refused, kept or failed; and why not."""
        home, day, ds = self._home, self._day, self._stream.dataset
        try:
            if day.path is not None:
                import_file(day.path, home=home, dataset=ds, ingest_date=day.date)
            pipeline.retrain(home, home / "dagster_home", reason="replay", on_stage=self._heard)
            if self._is_shadowed():
                self._wait_for_requests()
        except UserError as error:
            log.exception("event=replay_day_failed day=%d", day.number)
            return "failed", [str(error)]
        champions = promotion.champions(home, ds)
        if not promotion.same(champions, self._reigning):
            self._load.swapped(served_of(home, ds, champions), *self._deploying)
            return "promoted", []
        found = promotion.contest(home, ds)
        if not found.is_new:
            return "kept", ["there was nothing new to learn from"]
        return "refused", found.pair["ranking"].tags.get(promotion.REASONS, "").split("; ")

    def _heard(self, fields: Mapping[str, Any]) -> None:
        """Note when the deployment begins and ends, and pass on what a stage says."""
        if fields["name"] == "deployment" and fields["event"] in ("started", "finished"):
            self._deploying.append(time.monotonic())
        self._listener.stage(fields)

    def _is_shadowed(self) -> bool:
        from serving import repository

        return (self._home / repository.LINK / repository.SHADOW).is_dir()

    def _wait_for_requests(self, timeout_s: float = 120.0) -> None:
        """Judge again once the challenger has scored enough live requests, as a sensor would. Raises UserError."""
        home, ds = self._home, self._stream.dataset
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            time.sleep(2.0)
            self._deploying = [time.monotonic()]
            done = release.release(home, ds)
            self._deploying.append(time.monotonic())
            if done.outcome != "in the shadow":
                self._listener.said(f"judged with live requests: {done.sentence}")
                return
        raise UserError("the challenger did not get enough live requests to be judged on")

    def _quality(self) -> dict[str, Any]:
        """Return the figures of this morning's champion beside the frozen model's, on the day's events."""
        home, ds, day = self._home, self._stream.dataset, self._day
        if day.path is None:
            return {"retrieval": None, "ranking": None}
        window = TimeSplit(validation_cut=day.begin - DAY_MS, cut=day.begin, end=day.end)
        dataset = SequenceDataset.current(home, ds)
        if not len(window.window(dataset).targets):
            return {"retrieval": None, "ranking": None}
        tables: dict[Kind, list[Any]] = {}
        for kind in ("retrieval", "ranking"):
            pair = (self._frozen, self._reigning)
            results = [evaluate_run(home, ds, run_of(home, ds, side[kind]), window) for side in pair]
            tables[kind] = [pq.read_table(result.folder / f"{kind}.parquet") for result in results]
        return {kind: _compared(kind, *of_kind) for kind, of_kind in tables.items()}


def _compared(kind: Kind, frozen: Any, daily: Any) -> dict[str, Any]:
    """Return figure -> daily, frozen and difference, each with its interval; ranking's NE is that of its first task."""
    own = [{line.figure: line for line in intervals(table)} for table in (daily, frozen)]
    apart = {line.figure: line for line in compare_tables(frozen, daily)}
    wanted = {name: name for name in ("ndcg_at_10", "hr_at_10")}
    if kind == "ranking":
        wanted = {"ne": next(name for name in apart if name.endswith("_ne"))}
    found = {}
    for label, name in wanted.items():
        line = apart[name]
        found[label] = {
            "daily": _interval(own[0][name]),
            "frozen": _interval(own[1][name]),
            "difference": {"value": line.difference, "low": line.low, "high": line.high},
        }
    return found


def _interval(line: Any) -> dict[str, float]:
    return {"value": line.value, "low": line.low, "high": line.high}


def remove_state(folder: Path) -> None:
    """Delete what a replay needed beside its report."""
    for name in ("home", "stream", "load"):
        shutil.rmtree(folder / name, ignore_errors=True)
    log.info("event=replay_state_removed folder=%s", storage.shown(folder))

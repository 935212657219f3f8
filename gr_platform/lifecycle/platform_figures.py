"""What of a state folder goes to Prometheus, without Dagster's part: models, data, inbox, model server, disk, alerts.

Invariant: reading only, and cheaply: manifests, pointers and one query a model; no file of data is opened. Timestamps
are seconds since the epoch, as Prometheus has them.
"""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.lifecycle import alerts
from gr_platform.lifecycle import inbox as landing
from gr_platform.lifecycle.platform_metrics import Part

# The registry is a database that others work on; models change once a day.
REGISTRY_S = 30.0
SERVED_AS = {"retrieval": "gr_retriever", "ranking": "gr_ranker"}
STATES = ("serving", "degraded", "unreachable", "restarting", "failed")


class Family(GaugeMetricFamily):
    """A gauge whose labels are given by name, and which leaves out what is not a number."""

    def __init__(self, name: str, documentation: str, *labels: str) -> None:
        super().__init__(name, documentation, labels=labels)
        self.names = labels

    def put(self, value: Any, **labels: str) -> None:
        """Add a figure."""
        if isinstance(value, int | float):
            self.add_metric([labels[name] for name in self.names], float(value))


def parts(home: Path) -> list[Part]:
    """Return the parts of a state folder."""
    every = {
        "judgement": judgement,
        "data": data,
        "inbox": inbox,
        "server": server,
        "disk": disk,
        "alerts": alerted,
    }
    return [
        *(Part(name=name, read=partial(read, home)) for name, read in every.items()),
        Part(name="registry", read=partial(registry, home), kept_s=REGISTRY_S),
    ]


def datasets(home: Path) -> list[str]:
    """Return the names of the imported data sets."""
    return sorted(path.parent.name for path in (home / "landing").glob("*/dataset.toml"))


def judgement(home: Path) -> Iterator[Metric]:
    """Yield what the gates said last, and how often a challenger passed or did not."""
    ok = Family("gr_gate_ok", "Whether a gate let the last challenger pass", "dataset", "gate")
    value = Family("gr_gate_value", "What a gate measured of the last challenger", "dataset", "gate")
    bound = Family("gr_gate_bound", "From where on a gate objects", "dataset", "gate")
    passed = Family("gr_judgement_passed", "Whether the last challenger passed every gate", "dataset")
    made = Family("gr_judgement_timestamp_seconds", "When the last challenger was judged", "dataset")
    kept = Family("gr_judgements", "Judgements that are kept, by outcome", "dataset", "outcome")
    for ds in datasets(home):
        runs = home / "runs" / ds
        outcomes = [bool(_facts(folder)["passed"]) for folder in runs.glob("judgement-*")]
        kept.put(outcomes.count(True), dataset=ds, outcome="passed")
        kept.put(outcomes.count(False), dataset=ds, outcome="refused")
        if not (runs / "judgement.current").is_file():
            continue
        facts = _facts(storage.current(runs, "judgement"))
        made.put((runs / "judgement.current").stat().st_mtime, dataset=ds)
        passed.put(facts["passed"], dataset=ds)
        for gate in facts["gates"]:
            ok.put(gate["ok"], dataset=ds, gate=gate["gate"])
            value.put(gate["value"], dataset=ds, gate=gate["gate"])
            bound.put(gate["bound"], dataset=ds, gate=gate["gate"])
    yield from (ok, value, bound, passed, made, kept)


def registry(home: Path) -> Iterator[Metric]:
    """Yield who reigns, how old that is, and how many versions there are and were refused."""
    from gr_platform.registry import promotion, tracking, versions

    labels = ("dataset", "kind")
    info = Family("gr_champion_info", "The version that is champion", *labels, "version")
    until = Family("gr_champion_trained_until_timestamp_seconds", "The newest event that it was trained on", *labels)
    since = Family("gr_champion_promoted_timestamp_seconds", "When it was promoted", *labels)
    served = Family("gr_champion_served", "Whether the model repository holds it, of the served data set", *labels)
    known = Family("gr_versions", "Registered versions by what became of them", *labels, "outcome")
    outcomes = {"promoted": promotion.PROMOTED, "refused": promotion.REASONS, "rolled_back": promotion.ROLLED_BACK}
    if not tracking.exists(home):
        return
    client = tracking.connect(home)
    for ds in datasets(home):
        for kind in versions.KINDS:
            found = client.search_model_versions(f"name='{versions.model_name(ds, kind)}'", max_results=10_000)
            known.put(len(found), dataset=ds, kind=kind, outcome="registered")
            for outcome, tag in outcomes.items():
                known.put(sum(tag in each.tags for each in found), dataset=ds, kind=kind, outcome=outcome)
        for kind, version in promotion.champions(home, ds).items():
            info.put(1, dataset=ds, kind=kind, version=version.version)
            run = home / "runs" / ds / version.tags.get("gr.run_folder", "")
            if (run / storage.MANIFEST).is_file() and (ms := _facts(run).get("trained_until_ms")):
                until.put(ms / 1000, dataset=ds, kind=kind)
            if moment := version.tags.get(promotion.PROMOTED):
                since.put(datetime.fromisoformat(moment).timestamp(), dataset=ds, kind=kind)
            if (run_digest := _served_run(home, ds, kind)) is not None:
                served.put(run_digest == version.run_digest, dataset=ds, kind=kind)
    yield from (info, until, since, served, known)


def data(home: Path) -> Iterator[Metric]:
    """Yield how new the events are, how many the newest day has, and what is in quarantine."""
    from gr_platform.events.partitions import partition_folders

    newest = Family("gr_newest_event_timestamp_seconds", "Time of the newest event", "dataset")
    day = Family("gr_newest_partition_timestamp_seconds", "Day of the newest partition", "dataset")
    events = Family("gr_newest_partition_events", "Events of the newest partition", "dataset")
    broken = Family("gr_newest_partition_quarantined", "Rows of the newest partition in quarantine", "dataset")
    total = Family("gr_events", "Events of all partitions", "dataset")
    aside = Family("gr_quarantined", "Rows of all partitions in quarantine", "dataset")
    count = Family("gr_partitions", "Partitions", "dataset")
    for ds in datasets(home):
        facts = {date: _facts(folder) for date, folder in partition_folders(home, ds).items()}
        count.put(len(facts), dataset=ds)
        total.put(sum(each["rows_kept"] for each in facts.values()), dataset=ds)
        aside.put(sum(sum(each["quarantined"].values()) for each in facts.values()), dataset=ds)
        if times := [each["last_ts"] for each in facts.values() if each["last_ts"] is not None]:
            newest.put(max(times) / 1000, dataset=ds)
        if facts:
            date = max(facts)
            day.put(datetime.fromisoformat(date).replace(tzinfo=UTC).timestamp(), dataset=ds)
            events.put(facts[date]["rows_kept"], dataset=ds)
            broken.put(sum(facts[date]["quarantined"].values()), dataset=ds)
    yield from (newest, day, events, broken, total, aside, count)


def server(home: Path) -> Iterator[Metric]:
    """Yield how the supervisor of the model server last found it."""
    from serving import health

    up = Family("gr_server_up", "Whether the model server answered when it was last looked at, at most 30 s ago")
    expected = Family("gr_server_expected", "Whether a pair of models is deployed, so that a server should run")
    state = Family("gr_server_state", "State of the model server as its supervisor has it", "state")
    answers = Family("gr_model_answers", "Whether a model answered its last canary", "model")
    took = Family("gr_model_canary_seconds", "How long its last canary took", "model")
    restarts = Family("gr_server_restarts", "Restarts since the supervisor began")
    reloads = Family("gr_server_reloads", "Models loaded again since the supervisor began")
    found = health.read(home)
    seen = found is not None and not (found.stale and found.state != "failed")
    up.put(found is not None and seen and found.state in ("serving", "degraded"))
    expected.put(any((home / "model_repository").glob("*/config.pbtxt")))
    if found is not None and seen:
        for name in STATES:
            state.put(found.state == name, state=name)
        restarts.put(found.num_restarts)
        reloads.put(found.num_reloads)
        for model, each in found.models.items():
            answers.put(each.outcome == "answers", model=model)
            took.put(each.milliseconds / 1000, model=model)
    yield from (up, expected, state, answers, took, restarts, reloads)


def inbox(home: Path) -> Iterator[Metric]:
    """Yield how many files wait to be landed, and how many could not be."""
    waits = Family("gr_inbox_waiting_files", "Files in the inbox that can be landed", "dataset")
    refused = Family("gr_inbox_refused_files", "Files that could not be landed and still lie there", "dataset")
    strays = Family("gr_inbox_stray_files", "What lies in the inbox and belongs to no data set: nobody takes it")
    for ds in landing.data_sets(home):
        waits.put(sum(len(drops) for drops in landing.waiting(home, ds).values()), dataset=ds)
        reasons = (home / landing.FOLDER / ds / landing.REFUSED).glob(f"*/*{landing.REASON}")
        refused.put(sum(1 for _ in reasons), dataset=ds)
    strays.put(len(landing.strays(home)))
    yield from (waits, refused, strays)


def disk(home: Path) -> Iterator[Metric]:
    """Yield the room of the state folder's disk."""
    usage = shutil.disk_usage(home)
    free = Family("gr_disk_free_bytes", "Free space of the state folder's disk")
    size = Family("gr_disk_size_bytes", "Size of the state folder's disk")
    free.put(usage.free)
    size.put(usage.total)
    yield from (free, size)


def alerted(home: Path) -> Iterator[Metric]:
    """Yield how many alerts there were, and how many calls of a hook failed."""
    found = alerts.read(home)
    told = CounterMetricFamily("gr_alerts", "Alerts in the life of the state folder")
    failed = CounterMetricFamily("gr_alert_hook_failures", "Calls of an alert hook that failed")
    told.add_metric([], found[-1].num_alerts if found else 0)
    failed.add_metric([], found[-1].num_failed_hooks if found else 0)
    last = Family("gr_alert_last_timestamp_seconds", "When there was an alert of a kind last", "kind")
    for kind, at_ms in sorted({each.kind: each.at_ms for each in found}.items()):
        last.put(at_ms / 1000, kind=kind)
    yield from (told, failed, last)


def _served_run(home: Path, ds: str, kind: str) -> str | None:
    """Return the digest of the run whose bundle is deployed, None if none of this data set is."""
    link = home / "model_repository"
    bundle = link / SERVED_AS[kind] / "1" / "bundle"
    if not all((folder / storage.MANIFEST).is_file() for folder in (link, bundle)):
        return None
    if _facts(link.resolve())["dataset"] != ds:
        return None
    return str(_manifest(bundle.resolve()).spec.get("run"))


@lru_cache(maxsize=4096)
def _read(folder: Path, modified_ns: int) -> storage.Manifest:
    return storage.read_manifest(folder)


def _facts(folder: Path) -> dict[str, Any]:
    return _manifest(folder).facts


def _manifest(folder: Path) -> storage.Manifest:
    """Return a result's manifest, read once: a result does not change, but one may be made again in its place."""
    try:
        return _read(folder, (folder / storage.MANIFEST).stat().st_mtime_ns)
    except FileNotFoundError:
        raise UserError(f"{storage.shown(folder)} is no finished result; make it again (gr materialize)") from None

"""What the served log tells about the model that serves: its scores day by day, and its hit rate against what was
promised.

Invariant: only answers of one pair of models are compared with each other, and what cannot be told yet is None, never a
fault. Days are those that the requests were made for, so a replayed week has seven.
"""

import json
import math
from bisect import bisect_left
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from gr_platform import serving_state, storage
from gr_platform.errors import UserError
from gr_platform.evaluation.served import FILE
from gr_platform.events.database import connect, literal, parquet_of
from gr_platform.events.judgements import psi
from gr_platform.events.times import DAY_MS
from gr_platform.lifecycle.drift_events import beyond_chance, day_name

VERSION = 1
NUM_BINS = 10
# Steps of the log odds: fine beside a tenth of the scores, coarse enough that a day is a few hundred numbers.
STEPS = 20
MIN_HITS = 20

_SCORES = """
SELECT day, task, round({steps} * ln(score / (1 - score)))::INT AS step, count(*) AS num FROM (
    SELECT day, unnest(scores) AS score, generate_subscripts(scores, 1) AS task FROM (
        SELECT request_ts // {day_ms} AS day, unnest(scores) AS scores FROM {parts} WHERE ranker_digest = {digest}
    )
) WHERE score > 0 AND score < 1 GROUP BY ALL
"""
_DAYS = """
SELECT request_ts // {day_ms} AS day, count(*) FROM {parts} WHERE ranker_digest = {digest} GROUP BY day ORDER BY day
"""
_RATES = """
SELECT retriever_digest, ranker_digest, count(*) FILTER (is_judged),
    count(*) FILTER (is_judged AND position IS NOT NULL), median(num_items), max(served_ts)
FROM {outcomes} GROUP BY ALL ORDER BY max(served_ts)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreDrift:
    """Scores of the newest served day against the days before, of one ranking model; psi: by task, {} = not judged."""

    day: str = ""
    num_requests: int = 0
    num_reference: int = 0
    psi: dict[str, float] = field(default_factory=dict)
    means: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """The served pair's hit rate online and offline, and those of the pairs before it; None: nothing to tell.

    num_judged: requests whose window has closed. loss: 1 - (online / offline) / (the same of the pairs before).
    """

    num_judged: int = 0
    online: float | None = None
    offline: float | None = None
    online_before: float | None = None
    offline_before: float | None = None
    loss: float | None = None
    why: str = ""


def stored_score_drift(parent: Path, home: Path, ds: str, digest: str, min_requests: int) -> storage.Result:
    """Return `score_drift` as the facts of a result in `parent`, measured once for each state of the log."""
    parts = serving_state.log_parts(serving_state.served_folder(home, ds))
    states = [[part.name, part.parent.name, *_state(part)] for part in parts]
    spec = {"parts": storage.digest_of(states), "ranker": digest, "min_requests": min_requests, "version": VERSION}
    return storage.ensure(
        parent, "scores", spec, lambda _: asdict(score_drift(home, parts, digest, min_requests=min_requests))
    )


def score_drift(home: Path, parts: list[Path], digest: str, *, min_requests: int) -> ScoreDrift:
    """Return how the scores of a ranking model (its digest) on its newest day differ from its days before.

    The newest day is the last with `min_requests` requests. Bins are tenths of the scores before, a task at a time.
    """
    readable = {part: tasks for part in parts if (tasks := _tasks_of(part)) is not None}
    if not readable:
        return ScoreDrift()
    values = {"parts": parquet_of(readable), "digest": literal(digest), "day_ms": DAY_MS, "steps": STEPS}
    try:
        with connect(home) as connection:
            num_requests = dict(connection.sql(_DAYS.format(**values)).fetchall())
            rows = connection.sql(_SCORES.format(**values)).fetchall()
    except duckdb.IOException:
        raise UserError("the served log changed while its drift was measured; ask again") from None
    enough = [day for day, num in num_requests.items() if num >= min_requests]
    if not enough:
        return ScoreDrift(num_requests=max(num_requests.values(), default=0))
    newest = enough[-1]
    num_reference = sum(num for day, num in num_requests.items() if day < newest)
    found = ScoreDrift(day=day_name(newest), num_requests=num_requests[newest], num_reference=num_reference)
    if num_reference < min_requests:
        return found
    tasks = list(readable.values())[-1]
    psis, means = {}, {}
    for place, task in enumerate(tasks, start=1):
        before, became = defaultdict[int, int](int), defaultdict[int, int](int)
        for day, number, step, num in rows:
            if number == place and day <= newest:
                (became if day == newest else before)[step] += num
        bins = tenths(before)
        drift = psi(_binned(before, bins), _binned(became, bins))
        # The scores of one request are one taste, as the events of one person are.
        psis[task] = beyond_chance(drift, len(bins) + 1, [num_reference, num_requests[newest]])
        means[task] = [_mean(before), _mean(became)]
    return ScoreDrift(**asdict(found) | {"psi": psis, "means": means})


def tenths(counts: dict[int, int]) -> list[int]:
    """Return the upper edges (steps, the last left out) that cut counts by step into NUM_BINS equal parts, if they can
    be: fewer where many scores are equal."""
    total, passed = sum(counts.values()), 0
    edges: list[int] = []
    for step in sorted(counts):
        passed += counts[step]
        if passed * NUM_BINS >= total * (len(edges) + 1) and passed < total:
            edges.append(step)
    return edges


def _binned(counts: dict[int, int], edges: list[int]) -> dict[int, int]:
    bins = defaultdict[int, int](int)
    for step, num in counts.items():
        bins[bisect_left(edges, step)] += num
    return bins


def _mean(counts: dict[int, int]) -> float:
    """Return the mean probability."""
    total = max(1, sum(counts.values()))
    return sum(num / (1 + math.exp(-step / STEPS)) for step, num in counts.items()) / total


def _tasks_of(part: Path) -> list[str] | None:
    """Return the tasks that a part has scores of; None for a part that is damaged or that the server just deleted."""
    try:
        return [str(task) for task in json.loads((pq.read_schema(part).metadata or {})[b"tasks"])]
    except (OSError, pa.ArrowInvalid, KeyError, ValueError):
        return None


def _state(part: Path) -> tuple[int, int]:
    try:
        found = part.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def agreement(home: Path, ds: str, retriever: str, ranker: str, *, min_requests: int) -> Agreement:
    """Return how well the hit rate of the served pair (its digests) keeps what its offline figure promised.

    The two differ in level by nature. Offline, a request asks for the one next event, among all items, and the list is
    the retrieval model's; online, any positive event in the week after counts, the ranking model has ordered the list,
    and users react to what they are shown. So the ratio of the two is compared, with that of the pairs that served
    before: what it loses, the model does worse in front of users than its own judgement said. Reads the outcomes that
    the asset `served` made last; None where there are none, or fewer than MIN_HITS hits are to be expected.
    """
    rates = _rates(home, ds)
    promised = _offline_rates(home, ds)
    own = next((rate for rate in rates if (rate.retriever, rate.ranker) == (retriever, ranker)), None)
    if own is None or own.num_judged < min_requests:
        judged = own.num_judged if own else 0
        why = f"{judged:,} requests to the served models have had their week, {min_requests:,} are needed"
        return Agreement(num_judged=judged, why=why)
    if retriever not in promised:
        return Agreement(num_judged=own.num_judged, online=own.rate, why="the served bundle has no hit rate")
    metrics, by_time = promised[retriever]
    figure = _figure_for(own.list_length, metrics)
    found = Agreement(num_judged=own.num_judged, online=own.rate, offline=metrics[figure])
    before = [
        (rate, promised[rate.retriever][0][figure])
        for rate in rates[: rates.index(own)]
        if rate.num_judged and rate.retriever in promised and promised[rate.retriever][1] is by_time
    ]
    if sum(rate.num_hits for rate, _ in before) < MIN_HITS:
        return replace(found, why="no models before it were judged the same way and have hits enough to compare with")
    num_before = sum(rate.num_judged for rate, _ in before)
    found = replace(
        found,
        online_before=sum(rate.num_hits for rate, _ in before) / num_before,
        offline_before=sum(rate.num_judged * offline for rate, offline in before) / num_before,
    )
    return _with_loss(found)


def _with_loss(found: Agreement) -> Agreement:
    online, offline = found.online_before or 0.0, found.offline_before or 0.0
    expected = (found.offline or 0.0) * online / offline if offline else 0.0
    if expected * found.num_judged < MIN_HITS:
        return replace(found, why=f"fewer than {MIN_HITS} hits are to be expected of it by now")
    return replace(found, loss=1 - (found.online or 0.0) / expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rate:
    """What became of one pair's judged requests."""

    retriever: str
    ranker: str
    num_judged: int
    num_hits: int
    list_length: float

    @property
    def rate(self) -> float:
        return self.num_hits / max(1, self.num_judged)


def _rates(home: Path, ds: str) -> list[_Rate]:
    """Return the pairs in the order in which they served last."""
    try:
        file = storage.current(serving_state.served_folder(home, ds) / "outcomes", "served") / FILE
        with connect(home) as connection:
            rows = connection.sql(_RATES.format(outcomes=parquet_of([file]))).fetchall()
    except (UserError, duckdb.IOException):
        # No outcomes yet, or they are being made anew.
        return []
    return [
        _Rate(retriever=retriever, ranker=ranker, num_judged=judged, num_hits=hits, list_length=length or 0.0)
        for retriever, ranker, judged, hits, length, _ in rows
    ]


def _offline_rates(home: Path, ds: str) -> dict[str, tuple[dict[str, float], bool]]:
    """Return model digest -> (hit rates, whether they are of a window of time) of the retrieval bundles there are."""
    found = {}
    for folder in (home / "bundles" / ds).glob("retrieval-*"):
        try:
            facts = storage.read_manifest(folder).facts
            figures = facts["metrics"]["retrieval"]
            rates = {name: rate for name, rate in figures.items() if name.startswith("hr_at_") and rate is not None}
            if rates:
                found[facts["model_digest"]] = (rates, facts.get("split") is not None)
        except (UserError, KeyError):
            continue
    return found


def _figure_for(list_length: float, rates: dict[str, float]) -> str:
    """Return the name of the hit rate at the list's length, or at the nearest below that was measured."""
    cuts = sorted(int(name.removeprefix("hr_at_")) for name in rates)
    return f"hr_at_{max((cut for cut in cuts if cut <= list_length), default=cuts[0])}"

"""What a swap of the served pair does to people who ask meanwhile: failures, old scores, the slowest answers.

Invariant: probes, whose scores by the old and by the new model are known from the bundles' offline model, tell which
model answered; one asked after an answer of the new model has come must not get the old one's.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from gr_platform.bundle import golden
from gr_platform.sequences.vocabulary import NUM_OOV
from serving.bench import models
from serving.bench.generator import OK, PROBE_SCORES, Phase, probe
from serving.bench.load import NUM_CALLERS, latencies, percentile
from serving.bench.stage import Load, Stage
from serving.bench.traffic import Visit
from serving.engine.requests import History
from serving.swap import deploy

SHARE = 0.3
PROBE_SHARE = 0.3
NAME = "swap at 30 % of saturation: failed requests, stale scores"
# The precision that serving promises in fp32 is 1e-5; two random models differ by far more than this.
TOLERANCE = 1e-3
# Seconds before a swap that its plot begins.
LEAD_S = 5
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """One swap to pair number `to`, from `began` to `ended` (seconds of the monotonic clock)."""

    to: int
    began: float
    ended: float


def rows(
    stage: Stage,
    saturation: float,
    *,
    num_swaps: int = 3,
    warm_up_s: float = 6.0,
    before_s: float = 20.0,
    settle_s: float = 8.0,
) -> list[Row]:
    """Return the rows of `num_swaps` swaps under 30 % of `saturation` (requests a second), `settle_s` after each."""
    probes, expected = _probes(stage)
    longest = before_s + num_swaps * (settle_s + 60.0)
    plan = stage.plan(
        phases=(
            # What an overload before left in the server's queue, and what its cache lacks, is none of the swap's.
            Phase(seconds=warm_up_s, callers=NUM_CALLERS),
            Phase(seconds=before_s, rate=SHARE * saturation),
            Phase(seconds=longest, rate=SHARE * saturation),
        ),
        probes=probes,
        probe_share=PROBE_SHARE,
        deadline_s=10.0,
        seed=1,
    )
    swaps = []
    with Load(stage, plan) as load:
        for _ in plan.phases:
            load.wait_for_phase()
        for number in range(1, num_swaps + 1):
            to = number % len(stage.pairs)
            began = time.monotonic()
            deploy(stage.home, stage.pairs[to].retrieval, stage.pairs[to].ranking, stage.options)
            swaps.append(Swap(to=to, began=began, ended=time.monotonic()))
            time.sleep(settle_s)
        load.stop()
        records, _ = load.results()
    return _judged(records, swaps, expected, settle_s)


def served_by(scores: np.ndarray, expected: np.ndarray) -> int:
    """Return the number of the pair whose scores [n] these are, of `expected` [pairs, n]; -1 if of none."""
    distance = np.abs(expected - scores[: expected.shape[1]]).max(axis=1)
    nearest = int(distance.argmin())
    return nearest if distance[nearest] <= TOLERANCE * np.abs(expected[nearest]).max() else -1


def stale(records: np.ndarray, models_seen: np.ndarray, swaps: list[Swap]) -> tuple[int, int]:
    """Return how many probes got an old model's scores after the flip to a newer one, and how many those of no model.

    records: RECORD [n] of answered probes, models_seen int [n]: served_by. The flip is over when the first answer of
    the new model has come, at the latest when the swap has ended.
    """
    count = 0
    for swap, following in zip(swaps, [*swaps, None][1:], strict=True):
        until = following.began if following else np.inf
        of_new = records["done"][(models_seen == swap.to) & (records["sent"] > swap.began)]
        flipped = min([swap.ended, *of_new])
        late = (records["sent"] > flipped) & (records["sent"] < until)
        count += int(np.count_nonzero(late & (models_seen != swap.to) & (models_seen >= 0)))
    return count, int(np.count_nonzero(models_seen < 0))


def _judged(records: np.ndarray, swaps: list[Swap], expected: list[np.ndarray], settle_s: float) -> list[Row]:
    records = records[records["phase"] > 0]
    before = records[records["phase"] == 1]
    while_swapping = np.zeros(len(records), bool)
    for swap in swaps:
        while_swapping |= (records["scheduled"] >= swap.began) & (records["scheduled"] < swap.ended + settle_s)
    during = records[while_swapping]
    probes = records[(records["probe"] >= 0) & (records["outcome"] == OK)]
    seen = np.array([served_by(record["scores"], expected[record["probe"]]) for record in probes], int)
    num_failed = int(np.count_nonzero(records["outcome"] != OK))
    num_stale, num_wrong = stale(probes, seen, swaps)
    p99 = [percentile(latencies(part), 99) for part in (before, during)]
    told = f"{len(during)} requests, {len(swaps)} swaps"
    zero = {"target": 0, "at_most": True}
    ratio = p99[1] / p99[0] if p99[0] and p99[1] else None
    return [
        _row(NAME, num_failed + num_stale + num_wrong, "", told) | zero,
        _row(f"{NAME}: failed", num_failed, "", f"{len(records)} requests") | zero,
        _row(f"{NAME}: stale", num_stale, "", f"{len(probes)} probes") | zero,
        _row(f"{NAME}: of neither model", num_wrong, "", f"{len(probes)} probes") | zero,
        _row("P99 during the swap / before", ratio, "x", told) | {"target": 3, "at_most": True},
        _row("swap: P99 before", p99[0], "ms", f"{len(before)} requests"),
        _row("swap: P99 during", p99[1], "ms", told),
        _row("swap: from call to served, slowest", max(swap.ended - swap.began for swap in swaps), "s", None),
        _timeline(records, swaps, settle_s),
    ]


def _timeline(records: np.ndarray, swaps: list[Swap], settle_s: float) -> Row:
    """Return the row that a plot is drawn from: latency by the second around the call, of all swaps together."""
    until = max(swap.ended - swap.began for swap in swaps) + settle_s
    since_call = [np.floor(records["scheduled"] - swap.began) for swap in swaps]
    seconds = []
    for at in range(-LEAD_S, int(until)):
        waits = latencies(np.concatenate([records[since == at] for since in since_call]))
        if len(waits):
            seconds.append({"at_s": at + 0.5, "p50": percentile(waits, 50), "p99": percentile(waits, 99)})
    ended = [round(swap.ended - swap.began, 1) for swap in swaps]
    return _row("swap: latency by the second", None, "ms", None) | {"timeline": seconds, "ended_s": ended}


def _probes(stage: Stage) -> tuple[tuple[dict[str, Any], ...], list[np.ndarray]]:
    """Return the golden requests of the ranking bundles as a plan's probes, and their scores [pairs, n] each.

    All bundles of one shape have the same golden requests; their scores come from the offline model.
    """
    by_pair = [golden.load(pair.ranking / "golden.safetensors") for pair in stage.pairs]
    to_id = models.FIRST_ID - (1 + NUM_OOV)
    probes = []
    for request, _ in by_pair[0]:
        history = History(items=request.items + to_id, actions=request.actions, times=request.times)
        visit = Visit(
            kind="probe",
            history=history,
            candidates=request.candidates + to_id,
            request_time=request.request_time,
            cacheable=2 * len(request.items) + 1,
        )
        probes.append(probe(visit))
    expected = [np.stack([scores.ravel() for _, scores in same]) for same in zip(*by_pair, strict=True)]
    assert all(scores.shape[1] <= PROBE_SCORES for scores in expected)
    return tuple(probes), expected


def _row(name: str, value: float | None, unit: str, against: str | None) -> Row:
    return {"name": name, "value": value, "unit": unit, "against": against, "target": None}

"""The gates between a challenger and the server: what was measured against bounds, each with a sentence.

Invariant: a gate reads evidence and bounds alone, so the same two always give the same verdict. What could not be
measured objects: silence is not consent.

A figure's difference is challenger minus champion.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gr_platform.lifecycle.options import Gates, Shadow

# Figure of a comparison -> whether more is better.
HEADLINES = {"ndcg_at_10": True}
NE = "_ne"
# The gate that time opens by itself.
LIVE = "live_requests"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What scoring costs: ms of the golden requests, bytes of the weights and of a full history's K/V."""

    milliseconds: float
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """How far a task's probabilities moved: PSI over tenths of the champion's, and the mean of each side over what
    happened (1 = calibrated; None where nothing happened)."""

    psi: float
    champion: float | None
    challenger: float | None

    @property
    def nearer(self) -> bool:
        """Whether the challenger's mean is nearer to what happened: a move that nobody needs to fear."""
        if not self.champion or not self.challenger:
            return False
        return abs(math.log(self.challenger)) < abs(math.log(self.champion))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowEvidence:
    """What a challenger did with live requests: how many it was asked, and how it answered."""

    num_requests: int
    failures: float
    latency_ratio: float | None
    score_drift: float | None
    agreement: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All that is known of a challenger, and of the champion beside it where there is one.

    faults: gate -> why it cannot pass whatever else was measured. differences: kind -> those of `compare_tables`;
    slices: rows slice, bin, num_targets, champion (HR@10), difference, low, high. costs: kind -> (challenger's,
    champion's). catalogue: distinct items in top 10 (challenger's, champion's). score_drift: by task.
    hit_rate: HR@10 of (challenger, popularity). parity: kind -> largest error over the largest score, relative to what
    is allowed. item_share: of the window's exposures on one item. shadow: None where live requests are not asked for.
    """

    faults: Mapping[str, str] = field(default_factory=dict)
    parity: Mapping[str, float] = field(default_factory=dict)
    hit_rate: tuple[float, float] | None = None
    item_share: float | None = None
    has_champion: bool = False
    differences: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    slices: Sequence[Mapping[str, Any]] = ()
    costs: Mapping[str, tuple[Cost, Cost | None]] = field(default_factory=dict)
    catalogue: tuple[int, int | None] | None = None
    score_drift: Mapping[str, Moved] = field(default_factory=dict)
    shadow: ShadowEvidence | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One gate's answer. value, bound: of what decided, None where nothing of the kind was measured."""

    gate: str
    ok: bool
    value: float | None
    bound: float | None
    why: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them, which knows no NaN: a value that is none is None there."""
        value = self.value if self.value is not None and math.isfinite(self.value) else None
        return asdict(self) | {"value": value}


# Gate -> what it asks, for `gr gates` and the documentation.
MEANINGS = {
    "unseen": "neither model learned from anything in the window that both are judged on",
    "finite": "every score of the challenger is a number",
    "taken_back": "the challenger was not rolled back before",
    "parity": "the bundles give the trained models' scores",
    "window": "the window is ordinary: no single item holds it",
    "popularity": "HR@10 is above recommending the most popular items to everybody",
    "quality": "no model of the pair is worse for certain, and one is better for certain",
    "slices": "no group of users or items is served worse for certain, by more than a bound",
    "catalogue": "as much of the catalogue is recommended",
    "score_drift": "the probabilities are distributed as the champion's, or moved towards what happened",
    "latency": "scoring takes no longer",
    "memory": "scoring takes no more memory",
    LIVE: "it has scored as many live requests as are wanted",
    "shadow": "live requests are answered as well as by the champion",
}


def judge(evidence: Evidence, bounds: Gates, shadow: Shadow) -> list[Verdict]:
    """Return the verdict of every gate in the order of MEANINGS."""
    measured = {verdict.gate: verdict for verdict in _measured(evidence, bounds, shadow)}
    return [
        _verdict(gate, False, None, None, evidence.faults[gate]) if gate in evidence.faults else measured[gate]
        for gate in MEANINGS
        if gate in evidence.faults or gate in measured
    ]


def reasons(verdicts: Sequence[Verdict]) -> list[str]:
    """Return a sentence for each gate that objects."""
    return [f"{verdict.gate}: {verdict.why}" for verdict in verdicts if not verdict.ok]


def _measured(evidence: Evidence, bounds: Gates, shadow: Shadow) -> Iterator[Verdict]:
    for gate in ("unseen", "finite", "taken_back"):
        yield _verdict(gate, True, None, None, "yes")
    yield _parity(evidence)
    yield _item_share(evidence, bounds)
    yield _popularity(evidence)
    if evidence.has_champion:
        yield _quality(evidence, bounds)
        yield _slices(evidence, bounds)
        yield _catalogue(evidence, bounds)
        yield _score_drift(evidence, bounds)
        yield from _costs(evidence, bounds)
        if shadow.requests:
            yield from _shadow(evidence.shadow, shadow)


def _verdict(gate: str, ok: bool, value: float | None, bound: float | None, why: str) -> Verdict:
    return Verdict(gate=gate, ok=ok, value=value, bound=bound, why=why)


def _unmeasured(gate: str, bound: float | None = None) -> Verdict:
    return _verdict(gate, False, None, bound, "it could not be measured")


def _parity(evidence: Evidence) -> Verdict:
    if not evidence.parity:
        return _unmeasured("parity")
    # Before any number: Python's max() lets a NaN pass as the smaller one.
    kind, worst = max(evidence.parity.items(), key=lambda each: (math.isnan(each[1]), each[1]))
    # Not `worst > 1`: a NaN must not pass.
    ok = worst <= 1
    return _verdict("parity", ok, worst, 1.0, f"the {kind} bundle's largest error is {worst:.3g} of what is allowed")


def _item_share(evidence: Evidence, bounds: Gates) -> Verdict:
    share, bound = evidence.item_share, bounds.max_item_share
    if share is None:
        return _unmeasured("window", bound)
    why = f"one item holds {share:.1%} of the window's events, at most {bound:.0%} is ordinary"
    return _verdict("window", share <= bound, share, bound, why)


def _popularity(evidence: Evidence) -> Verdict:
    if evidence.hit_rate is None:
        return _unmeasured("popularity")
    ours, popular = evidence.hit_rate
    return _verdict("popularity", ours > popular, ours, popular, f"HR@10 is {ours:.4f}, popularity's is {popular:.4f}")


def _quality(evidence: Evidence, bounds: Gates) -> Verdict:
    gains = list(_gains(evidence.differences))
    if not gains:
        return _unmeasured("quality", bounds.min_gain)
    chance = 1 - bounds.confidence
    worse = [name for name, gain, p_value in gains if gain < 0 and p_value < chance]
    better = [name for name, gain, p_value in gains if gain >= bounds.min_gain and gain > 0 and p_value < chance]
    told = ", ".join(f"{name} {gain:+.1%} (p {p_value:.2g})" for name, gain, p_value in gains)
    best = max(gain for _, gain, _ in gains)
    if worse:
        return _verdict("quality", False, best, bounds.min_gain, f"{', '.join(worse)} is worse for certain: {told}")
    if not better:
        return _verdict("quality", False, best, bounds.min_gain, f"nothing is better for certain: {told}")
    return _verdict("quality", True, best, bounds.min_gain, told)


def _gains(differences: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[tuple[str, float, float]]:
    """Yield (name, relative gain, p value) of each headline figure; NE falls where a model gets better."""
    for kind, found in differences.items():
        for line in found:
            name = str(line["figure"])
            if name in HEADLINES or name.endswith(NE):
                sign = 1.0 if name in HEADLINES else -1.0
                yield f"{kind} {name}", sign * line["difference"] / max(abs(line["a"]), 1e-9), line["p_value"]


def _slices(evidence: Evidence, bounds: Gates) -> Verdict:
    rows = [row for row in evidence.slices if row["num_users"] >= bounds.min_slice_users]
    if not rows:
        why = f"no slice has {bounds.min_slice_users} users, so there is none to lose"
        return _verdict("slices", True, None, bounds.max_slice_loss, why)
    losses = {f"{row['slice']} {row['bin']}": 0.0 - row["high"] / max(row["champion"], 1e-9) for row in rows}
    name, worst = max(losses.items(), key=lambda each: each[1])
    bound = bounds.max_slice_loss
    # The sum turns -0 into 0.
    why = f"HR@10 of {name} falls by {max(worst, 0.0) + 0.0:.1%} at the least, the most of {len(rows)} slices"
    return _verdict("slices", worst <= bound, worst, bound, why)


def _catalogue(evidence: Evidence, bounds: Gates) -> Verdict:
    ours, theirs = evidence.catalogue or (0, None)
    if not theirs:
        return _unmeasured("catalogue", bounds.min_catalogue_ratio)
    ratio = ours / theirs
    why = f"{ours:,} items stand in the top 10, {theirs:,} in the champion's"
    return _verdict("catalogue", ratio >= bounds.min_catalogue_ratio, ratio, bounds.min_catalogue_ratio, why)


def _score_drift(evidence: Evidence, bounds: Gates) -> Verdict:
    if not evidence.score_drift:
        return _unmeasured("score_drift", bounds.max_score_drift)
    away = {task: moved for task, moved in evidence.score_drift.items() if not moved.nearer}
    task, worst = max((away or evidence.score_drift).items(), key=lambda each: each[1].psi)
    why = f"the probabilities of {task} moved by {worst.psi:.3g} (PSI)"
    if worst.champion is not None and worst.challenger is not None:
        why += f", their mean from {worst.champion:.2f} to {worst.challenger:.2f} times what happened"
    bound = bounds.max_score_drift
    return _verdict("score_drift", not away or worst.psi <= bound, worst.psi, bound, why)


def _costs(evidence: Evidence, bounds: Gates) -> Iterator[Verdict]:
    told: tuple[tuple[str, float, Callable[[Cost], float], str], ...] = (
        ("latency", bounds.max_latency_ratio, lambda cost: cost.milliseconds, "the time"),
        ("memory", bounds.max_memory_ratio, lambda cost: float(cost.num_bytes), "the memory"),
    )
    for gate, bound, of, what in told:
        ratios = {kind: of(ours) / of(theirs) for kind, (ours, theirs) in evidence.costs.items() if theirs is not None}
        if not ratios:
            yield _unmeasured(gate, bound)
            continue
        kind, worst = max(ratios.items(), key=lambda each: each[1])
        yield _verdict(gate, worst <= bound, worst, bound, f"{kind} takes {worst:.2f} times {what} of the champion's")


def _shadow(found: ShadowEvidence | None, bounds: Shadow) -> Iterator[Verdict]:
    asked = 0 if found is None else found.num_requests
    why = f"it scored {asked} live requests, {bounds.requests} are wanted"
    yield _verdict(LIVE, asked >= bounds.requests, float(asked), float(bounds.requests), why)
    if found is not None and asked >= bounds.requests:
        yield _of_shadow(found, bounds)


def _of_shadow(found: ShadowEvidence, bounds: Shadow) -> Verdict:
    limits = (
        ("it failed in {:.1%} of live requests", found.failures, bounds.max_failures),
        ("it took {:.2f} times as long as an answer", found.latency_ratio, bounds.max_latency_ratio),
        ("its probabilities moved by {:.3g} (PSI)", found.score_drift, bounds.max_score_drift),
    )
    for said, value, bound in limits:
        if value is None or not value <= bound:
            return _verdict("shadow", False, value, bound, said.format(float("nan") if value is None else value))
    agreement = found.agreement
    told = "unknown" if agreement is None else f"{agreement:.2f}"
    ok = agreement is not None and agreement >= bounds.min_agreement
    why = f"{found.num_requests} live requests; its order agrees with the served one by {told}"
    return _verdict("shadow", ok, agreement, bounds.min_agreement, why)

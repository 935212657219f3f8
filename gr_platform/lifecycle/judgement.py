"""Challenger and champion on the same held-out targets: what is measured, and what the gates say of it.

Invariant: both are judged on the same newest window, and neither learned from anything in it; a pair that cannot be
judged so does not pass. A judgement is stored like any other result: asking again gives the same one.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr_platform import storage
from gr_platform.bundle.load import load
from gr_platform.bundle.verify import parity
from gr_platform.evaluation.evaluate import evaluate_run, split_of, trained_until
from gr_platform.evaluation.ranks import NonFiniteScores
from gr_platform.evaluation.significance import compare_tables
from gr_platform.events.judgements import psi
from gr_platform.lifecycle import gates, options
from gr_platform.lifecycle.folders import bundle_of, run_of
from gr_platform.lifecycle.gates import Cost, Evidence
from gr_platform.lifecycle.measures import scoring_cost, slice_differences
from gr_platform.lifecycle.shadow import shadow_evidence
from gr_platform.models.config import Kind
from gr_platform.registry import promotion
from gr_platform.registry.versions import KINDS, Version
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.time_split import TimeSplit

NAME = "judgement"
VERSION = 2
SCORE_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One pair with its files: run and bundle folders by kind."""

    pair: Mapping[Kind, Version]
    runs: Mapping[Kind, Path]
    bundles: Mapping[Kind, Path]


def judge(home: Path, ds: str, found: promotion.Contest) -> storage.Result:
    """Return the judgement of a contest, made unless it is there, and make it the data set's current.

    Facts: "window" (cut, end, kind: "time" or "leave_one_out"), "challenger" and "champion" (kind -> name, version,
    run, trained_until_ms; {} without a champion), "differences" (kind -> fields of `Difference`, champion first),
    "slices", "figures" (kind -> side -> figures of the evaluation), "gates" (fields of `Verdict`), "passed".
    Raises UserError if a run or a bundle of either is gone.
    """
    bounds = options.read(home)
    challenger = _side(home, ds, found.pair)
    champion = _side(home, ds, found.reigning) if found.reigning else None
    dataset = SequenceDataset.current(home, ds)
    split, fault = _common_split(dataset, challenger, champion)
    shadow = shadow_evidence(home, ds, challenger.bundles["ranking"]) if champion and bounds.shadow.requests else None
    taken_back = sorted(v.name for v in found.pair.values() if promotion.ROLLED_BACK in v.tags)
    spec = {
        "challenger": _digests(challenger),
        "champion": _digests(champion) if champion else {},
        "taken_back": taken_back,
        "sequences": dataset.digest,
        "split": split.to_json() if split else None,
        "bounds": [asdict(bounds.gates), asdict(bounds.shadow)],
        "shadow": asdict(shadow) if shadow else None,
        "version": VERSION,
    }

    def build(_: Path) -> dict[str, Any]:
        work = _Work(home, ds, dataset, split, challenger, champion)
        evidence, facts = work.evidence({"unseen": fault} if fault else {}, taken_back, shadow)
        verdicts = gates.judge(evidence, bounds.gates, bounds.shadow)
        return facts | {
            "window": {
                "kind": "time" if split else "leave_one_out",
                "cut": split.cut if split else None,
                "end": split.end if split else None,
            },
            "challenger": _described(dataset, challenger),
            "champion": _described(dataset, champion) if champion else {},
            "gates": [verdict.to_json() for verdict in verdicts],
            "passed": all(verdict.ok for verdict in verdicts),
        }

    runs = home / "runs" / ds
    result = storage.ensure(runs, NAME, spec, build)
    storage.point(runs, NAME, result.folder)
    return result


def last(home: Path, ds: str) -> storage.Result:
    """Return the data set's current judgement. Raises UserError if there is none yet."""
    folder = storage.current(home / "runs" / ds, NAME)
    return storage.Result(folder=folder, manifest=storage.read_manifest(folder), reused=True)


def reasons(facts: Mapping[str, Any]) -> list[str]:
    """Return why a judged pair may not serve, a sentence a gate."""
    return [f"{gate['gate']}: {gate['why']}" for gate in facts["gates"] if not gate["ok"]]


def _side(home: Path, ds: str, pair: Mapping[Kind, Version]) -> Side:
    return Side(
        pair=pair,
        runs={kind: run_of(home, ds, version) for kind, version in pair.items()},
        bundles={kind: bundle_of(home, ds, kind, version) for kind, version in pair.items()},
    )


def _digests(side: Side) -> dict[str, Any]:
    folders = {**{f"{kind}_run": f for kind, f in side.runs.items()}, **{f"{k}_b": f for k, f in side.bundles.items()}}
    return {name: storage.read_manifest(folder).digest for name, folder in folders.items()}


def _described(dataset: SequenceDataset, side: Side) -> dict[str, Any]:
    return {
        kind: {
            "name": version.name,
            "version": version.version,
            "run": side.runs[kind].name,
            "trained_until_ms": trained_until(dataset, side.runs[kind]),
        }
        for kind, version in side.pair.items()
    }


def _common_split(dataset: SequenceDataset, challenger: Side, champion: Side | None) -> tuple[TimeSplit | None, str]:
    """Return where to judge (None: leave-one-out's last exposures), and why there is no such place, "" if there is."""
    splits = {split_of(folder) for folder in challenger.runs.values()}
    runs = [*challenger.runs.values(), *(champion.runs.values() if champion else ())]
    if len(splits) > 1:
        return None, "its two models were trained on different splits of the log; train both the same way: gr retrain"
    split = splits.pop()
    if split is None:
        same = all(_sequences(folder) == dataset.digest and split_of(folder) is None for folder in runs)
        if same:
            return None, ""
        return None, (
            "it was trained on all but each user's last events, the champion on other data, so there is no window that "
            "neither has seen; hold out the newest days instead: gr retrain"
        )
    for folder in runs:
        if (until := trained_until(dataset, folder)) >= split.cut:
            return split, (
                f"{folder.name} learned from events up to {_when(until)}, the window begins {_when(split.cut)}; wait "
                "for newer data"
            )
    return split, ""


def _sequences(folder: Path) -> str:
    return str(storage.read_manifest(folder).spec.get("sequences", ""))


def _when(ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(ms / 1000))


@dataclass(frozen=True, slots=True)
class _Work:
    """The measuring of one contest."""

    home: Path
    ds: str
    dataset: SequenceDataset
    split: TimeSplit | None
    challenger: Side
    champion: Side | None

    def evidence(
        self, faults: dict[str, str], taken_back: list[str], shadow: gates.ShadowEvidence | None
    ) -> tuple[Evidence, dict[str, Any]]:
        """Return the evidence and the facts that are kept of it; after a fault no more than what needs no window."""
        if taken_back:
            told = f"{', '.join(taken_back)} was rolled back; train again, or promote it by hand: gr promote --force"
            faults["taken_back"] = told
        checked, costs = self._bundles()
        facts: dict[str, Any] = {"differences": {}, "slices": [], "figures": {}}
        if "unseen" in faults:
            # Nothing that is measured on a window that a model has seen says anything.
            faults |= dict.fromkeys(("window", "popularity", "quality"), "there is no window to measure it on")
            return Evidence(faults=faults, parity=checked, costs=costs), facts
        try:
            ours = self._tables(self.challenger)
        except NonFiniteScores as error:
            faults["finite"] = str(error)
            faults |= dict.fromkeys(("popularity", "quality"), "its scores are no numbers")
            return Evidence(faults=faults, parity=checked, costs=costs), facts
        theirs = self._tables(self.champion) if self.champion else {}
        items = ours["ranking"][0]["item"].to_numpy()
        retrieval = ours["retrieval"][1]
        differences = {
            kind: [asdict(line) for line in compare_tables(theirs[kind][0], ours[kind][0])] for kind in theirs
        }
        facts["differences"] = differences
        if theirs:
            facts["slices"] = slice_differences(self.dataset, theirs["retrieval"][0], ours["retrieval"][0], self.split)
        facts["figures"] = _figures(ours, theirs)
        found = Evidence(
            faults=faults,
            parity=checked,
            hit_rate=(retrieval["retrieval"]["hr_at_10"] or 0.0, retrieval["popularity"]["hr_at_10"] or 0.0),
            item_share=float(np.bincount(items).max() / len(items)) if len(items) else None,
            has_champion=bool(theirs),
            differences=differences,
            slices=facts["slices"],
            costs=costs,
            catalogue=(
                retrieval["catalogue"]["num_items"],
                theirs["retrieval"][1]["catalogue"]["num_items"] if theirs else None,
            ),
            score_drift=_score_drift(theirs["ranking"][0], ours["ranking"][0]) if theirs else {},
            shadow=shadow,
        )
        return found, facts

    def _bundles(self) -> tuple[dict[str, float], dict[str, tuple[Cost, Cost | None]]]:
        """Return how far the challenger's bundles are from their models, and what scoring costs on both sides."""
        errors, costs = {}, {}
        for kind in KINDS:
            bundle = load(self.challenger.bundles[kind])
            found = parity(bundle)
            allowed = found.tolerance * found.max_abs_reference
            errors[str(kind)] = found.max_abs_error / allowed if allowed else float("nan")
            beside = load(self.champion.bundles[kind]) if self.champion else None
            costs[str(kind)] = scoring_cost(bundle, beside)
        return errors, costs

    def _tables(self, side: Side) -> dict[str, tuple[pa.Table, dict[str, Any]]]:
        """Return kind -> the table of its targets and the facts of its evaluation."""
        found = {}
        for kind, folder in side.runs.items():
            result = evaluate_run(self.home, self.ds, folder, self.split)
            found[str(kind)] = pq.read_table(result.folder / f"{kind}.parquet"), result.manifest.facts
        return found


def _score_drift(theirs: pa.Table, ours: pa.Table) -> dict[str, gates.Moved]:
    """Return task -> how far the challenger's probabilities are from the champion's, and both from what happened."""
    found = {}
    for name in theirs.column_names:
        if name.startswith("logit_"):
            before, now = theirs[name].to_numpy(), ours[name].to_numpy()
            edges = np.quantile(before, np.arange(1, SCORE_BINS) / SCORE_BINS)
            counts = [np.bincount(np.searchsorted(edges, each), minlength=SCORE_BINS) for each in (before, now)]
            task = name.removeprefix("logit_")
            happened = float(theirs[f"label_{task}"].to_numpy().mean())
            means = [float((1 / (1 + np.exp(-each))).mean() / happened) if happened else None for each in (before, now)]
            moved = psi(*(dict(enumerate(each.tolist())) for each in counts))
            found[task] = gates.Moved(psi=moved, champion=means[0], challenger=means[1])
    return found


def _figures(
    ours: Mapping[str, tuple[pa.Table, dict[str, Any]]], theirs: Mapping[str, tuple[pa.Table, dict[str, Any]]]
) -> dict[str, Any]:
    """Return kind -> side -> the figures of its evaluation; the baselines stand beside retrieval's."""
    figures: dict[str, Any] = {}
    for kind in ours:
        figures[kind] = {"challenger": ours[kind][1][kind]}
        if kind in theirs:
            figures[kind]["champion"] = theirs[kind][1][kind]
    figures["retrieval"] |= {name: ours["retrieval"][1][name] for name in ("popularity", "cooccurrence")}
    return figures

"""The stage that judges challenger beside champion, and its check: which gates are open."""

from typing import Any

import dagster as dg

from assets.materialization import Stage, table, verdict
from assets.resources import PIPELINE, Platform
from gr_platform.models.config import Kind


@dg.asset(group_name="release", pool=PIPELINE, kinds={"mlflow"}, deps=["bundle"])
def judgement(platform: Platform) -> dg.MaterializeResult:
    """Challenger and champion on the same held-out targets: differences with intervals, gates, and the outcome."""
    from gr_platform.lifecycle import judgement as library
    from gr_platform.registry import card_facts, promotion
    from gr_platform.storage import digest_of

    stage = Stage("judgement")
    home, ds = platform.folder(), platform.dataset_name()
    found = promotion.contest(home, ds)
    if not found.is_new:
        versions = {kind: version.version for kind, version in found.pair.items()}
        figures = {"outcome": "nobody challenges the champion"}
        return stage.finish(digest=digest_of(versions), reused=True, figures=figures)
    result = library.judge(home, ds, found)
    facts = result.manifest.facts
    refused = library.reasons(facts)
    card_facts.try_record(home, ds, facts)
    return stage.finish(
        digest=result.manifest.digest,
        reused=result.reused,
        figures={
            "outcome": "may serve" if facts["passed"] else f"refused: {'; '.join(refused)}",
            **_versions(facts),
            **_headlines(facts),
        },
        preview=f"{_gates(facts)}\n\n{_differences(facts)}",
        plot=_plot(facts),
    )


@dg.asset_check(asset="judgement", name="gates")
def gates(platform: Platform) -> dg.AssetCheckResult:
    """Every gate is open to the challenger; a closed one stops nothing but its promotion."""
    from gr_platform.lifecycle import judgement as library
    from gr_platform.registry import promotion

    home, ds = platform.folder(), platform.dataset_name()
    if not promotion.contest(home, ds).is_new:
        return verdict("judgement gates", [], "nobody challenges the champion")
    facts = library.last(home, ds).manifest.facts
    return verdict(
        "judgement gates",
        library.reasons(facts),
        f"all {len(facts['gates'])} gates are open",
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"gates": dg.MetadataValue.md(_gates(facts))},
    )


def _versions(facts: dict[str, Any]) -> dict[str, str]:
    return {
        f"{side}_{kind}": f"version {version['version']}"
        for side in ("challenger", "champion")
        for kind, version in facts[side].items()
    }


def _headlines(facts: dict[str, Any]) -> dict[str, float]:
    kinds: tuple[Kind, ...] = ("retrieval", "ranking")
    return {
        f"{kind}_{line['figure']}_difference": line["difference"]
        for kind in kinds
        for line in facts["differences"].get(kind, [])
        if line["figure"] == "ndcg_at_10" or line["figure"].endswith("_ne")
    }


def _gates(facts: dict[str, Any]) -> str:
    rows = [["open" if gate["ok"] else "CLOSED", gate["gate"], gate["why"]] for gate in facts["gates"]]
    return "\n".join(["| | gate | why |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)])


def _differences(facts: dict[str, Any]) -> str:
    columns = ["figure", "a", "b", "difference", "low", "high", "p_value"]
    lines = [
        [f"{kind} {line['figure']}", *(line[name] for name in columns[1:])]
        for kind, found in facts["differences"].items()
        for line in found
    ]
    return table(["figure", "champion", "challenger", *columns[3:]], lines) if lines else "no champion to compare with"


def _plot(facts: dict[str, Any]) -> bytes | None:
    from gr_platform.evaluation.plots import slice_differences

    return slice_differences(facts["slices"]) if facts["slices"] else None

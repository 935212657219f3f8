"""The stage that judges the models beside the counted baselines on the held-out last exposures."""

from typing import Any

import dagster as dg

from assets.materialization import UNTRACKED, Stage, table
from assets.resources import PIPELINE, Platform


@dg.asset(group_name="models", pool=PIPELINE, kinds={"pytorch"}, deps=["sequences", "retrieval_model", "ranking_model"])
def evaluation(platform: Platform) -> dg.MaterializeResult:
    """Test figures: HR, NDCG, MRR over the whole catalogue beside what counting gives; NE and AUC a task."""
    from gr_platform.evaluation.evaluate import evaluate_current
    from gr_platform.evaluation.plots import slices
    from gr_platform.registry.tracking import try_log_run
    from gr_platform.registry.versions import trained_kinds
    from gr_platform.storage import current

    stage = Stage("evaluation")
    home, ds = platform.folder(), platform.dataset_name()
    result = evaluate_current(home, ds)
    facts = result.manifest.facts
    folders = {kind: current(home / "runs" / ds, f"{kind}_model") for kind in trained_kinds(home, ds)}
    tracked = {f"{kind}_run": try_log_run(home, ds, each, facts) or UNTRACKED for kind, each in folders.items()}
    return stage.finish(
        digest=result.manifest.digest,
        reused=result.reused,
        figures={name: value for name, value in _figures(facts).items() if value is not None} | tracked,
        preview="\n\n".join(_tables(facts)),
        plot=slices(facts["slices"]) if "slices" in facts else None,
    )


class Pair(dg.Config):
    """Two runs: their folders, names in MLflow or first digits; `retrieval_model`, `ranking_model`: the current."""

    first: str
    second: str


@dg.asset(group_name="models", pool=PIPELINE, kinds={"mlflow"})
def comparison(platform: Platform, config: Pair) -> dg.MaterializeResult:
    """Two runs user by user, as `gr compare`: each figure's difference, its 95 % interval and p value by bootstrap."""
    from gr_platform.evaluation.compare import compare_runs
    from gr_platform.evaluation.significance import MEANING
    from gr_platform.registry.tracking import try_log_run
    from gr_platform.storage import digest_of

    stage = Stage("comparison")
    home, ds = platform.folder(), platform.dataset_name()
    found = compare_runs(home, ds, config.first, config.second)
    for run in ("a", "b"):
        try_log_run(home, ds, home / "runs" / ds / found[run], found[f"facts_{run}"])
    lines = found["differences"]
    columns = ["figure", "a", "b", "difference", "low", "high", "p_value"]
    return stage.finish(
        digest=digest_of([found["a"], found["b"], lines]),
        reused=False,
        figures={
            **{run: f"{found[run]} ({found[f'recipe_{run}']})" for run in ("a", "b")},
            "num_targets": found["num_targets"],
            **{line["figure"]: line["difference"] for line in lines},
        },
        preview=f"{table(columns, [[line[name] for name in columns] for line in lines])}\n\n{MEANING}",
    )


def _figures(facts: dict[str, Any]) -> dict[str, Any]:
    """Return what the asset page shows first; a kind that was never trained has nothing."""
    found = {f"{task}_ne": figures.get("ne") for task, figures in facts.get("ranking", {}).items()}
    if "retrieval" in facts:
        found |= {name: facts["retrieval"][name] for name in ("hr_at_10", "ndcg_at_10")}
        found |= {f"{name}_hr_at_10": facts[name]["hr_at_10"] for name in ("popularity", "cooccurrence")}
        found |= {name: facts[name] for name in ("num_users", "num_ties")}
    return found


def _tables(facts: dict[str, Any]) -> list[str]:
    tables = []
    if "retrieval" in facts:
        shown = ["hr_at_10", "ndcg_at_10", "mrr"]
        models = {"model": "retrieval", "item co-occurrence": "cooccurrence", "popularity": "popularity"}
        rows = [[label, *(facts[part][name] for name in shown)] for label, part in models.items()]
        tables.append(table(["model", *shown], rows))
    if "ranking" in facts:
        rows = [[task, figures.get("ne"), figures.get("auc")] for task, figures in facts["ranking"].items()]
        tables.append(table(["task", "NE", "AUC"], rows))
    return tables

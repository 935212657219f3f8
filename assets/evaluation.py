"""The stage that judges both models beside the counted baselines on the held-out last exposures."""

import dagster as dg

from assets.materialization import Stage, table
from assets.resources import Platform


@dg.asset(group_name="models", kinds={"pytorch"}, deps=["sequences", "retrieval_model", "ranking_model"])
def evaluation(platform: Platform) -> dg.MaterializeResult:
    """Test figures: HR, NDCG, MRR over the whole catalogue beside what counting gives; NE and AUC a task."""
    from gr_platform.evaluation.evaluate import evaluate_current
    from gr_platform.evaluation.plots import slices

    stage = Stage("evaluation")
    result = evaluate_current(platform.folder(), platform.dataset_name())
    facts = result.manifest.facts
    retrieval, popularity = facts["retrieval"], facts["popularity"]
    shown = ["hr_at_10", "ndcg_at_10", "mrr"]
    models = {"model": "retrieval", "item co-occurrence": "cooccurrence", "popularity": "popularity"}
    rows = [[label, *(facts[part][name] for name in shown)] for label, part in models.items()]
    tasks = table(["task", "NE", "AUC"], [[t, f.get("ne"), f.get("auc")] for t, f in facts["ranking"].items()])
    return stage.finish(
        digest=result.manifest.digest,
        reused=result.reused,
        figures={
            "hr_at_10": retrieval["hr_at_10"],
            "popularity_hr_at_10": popularity["hr_at_10"],
            "cooccurrence_hr_at_10": facts["cooccurrence"]["hr_at_10"],
            "ndcg_at_10": retrieval["ndcg_at_10"],
            "num_users": facts["num_users"],
            "num_ties": facts["num_ties"],
        },
        preview=f"{table(['model', *shown], rows)}\n\n{tasks}",
        plot=slices(facts["slices"]),
    )

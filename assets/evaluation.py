"""The stage that judges both models and the popularity baseline on the held-out last exposures."""

import dagster as dg

from assets.materialization import Stage, table
from assets.resources import Platform


@dg.asset(group_name="models", kinds={"pytorch"}, deps=["sequences", "retrieval_model", "ranking_model"])
def evaluation(platform: Platform) -> dg.MaterializeResult:
    """Test figures: HR, NDCG, MRR over the whole catalogue beside popularity; NE and AUC a task."""
    from gr_platform.evaluation.evaluate import evaluate
    from gr_platform.evaluation.plots import metric_bars

    stage = Stage("evaluation")
    result = evaluate(platform.folder(), platform.dataset_name())
    facts = result.manifest.facts
    retrieval, popularity = facts["retrieval"], facts["popularity"]
    shown = ["hr_at_10", "ndcg_at_10", "mrr"]
    rows = [["HSTU", *(retrieval[n] for n in shown)], ["popularity", *(popularity[n] for n in shown)]]
    tasks = table(["task", "NE", "AUC"], [[t, f.get("ne"), f.get("auc")] for t, f in facts["ranking"].items()])
    return stage.finish(
        digest=result.manifest.digest,
        reused=result.reused,
        figures={
            "hr_at_10": retrieval["hr_at_10"],
            "popularity_hr_at_10": popularity["hr_at_10"],
            "ndcg_at_10": retrieval["ndcg_at_10"],
            "num_users": facts["num_users"],
            "num_ties": facts["num_ties"],
        },
        preview=f"{table(['model', *shown], rows)}\n\n{tasks}",
        plot=metric_bars({"HSTU": retrieval, "popularity": popularity}, shown),
    )

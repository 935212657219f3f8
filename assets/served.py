"""The stage after serving: what became of the recommendations that the model server gave."""

from typing import Any

import dagster as dg

from assets.materialization import PREVIEW_ROWS, Stage, table
from assets.resources import PIPELINE, Platform


@dg.asset(group_name="release", pool=PIPELINE, kinds={"duckdb", "parquet"}, deps=["events", "deployment"])
def served(platform: Platform) -> dg.MaterializeResult:
    """The server's log joined with the events that followed: online hit rate, latency, agreement with the shadow."""
    from gr_platform.evaluation.plots import served as picture
    from gr_platform.evaluation.served import WINDOW_DAYS, served_outcomes

    stage = Stage("served")
    result = served_outcomes(platform.folder(), platform.dataset_name())
    facts = result.manifest.facts
    return stage.finish(
        digest=result.manifest.digest,
        reused=result.reused,
        figures={"window_days": WINDOW_DAYS, **_figures(facts)},
        preview=_by_model(facts["models"]),
        plot=picture(facts["days"], facts["positions"]) if facts["num_requests"] else None,
    )


def _figures(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the counts, and the rates as far as there is anything to tell."""
    return {name: value for name, value in facts.items() if isinstance(value, int | float)}


def _by_model(models: list[dict[str, Any]]) -> str:
    columns = ["retriever_digest", "ranker_digest", "num_requests", "hit_rate"]
    rows = [[str(model[name])[:16] if name.endswith("digest") else model[name] for name in columns] for model in models]
    return table(columns, rows[-PREVIEW_ROWS:])

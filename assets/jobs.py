"""The jobs, and what a run of each is configured with: the same whether `gr`, the UI, a schedule or a sensor asks.

Invariant: what an operator sets in `lifecycle.toml` is read when a run is asked for, except a default in the UI, which
is as old as the loaded code location.
"""

from collections.abc import Sequence
from typing import Any, Literal

import dagster as dg

from assets import evaluation, experiments, inbox
from assets.runs import DEPLOYING, FULL_PIPELINE, LANDING_DAY, REASON, RECIPE, RETRAINING, START
from gr_platform.lifecycle.options import LifecycleOptions

TRAINED = ("retrieval_model", "ranking_model")
Start = Literal["warm", "scratch"]
# How long a run that nobody watches waits for a training in a terminal, say.
WAIT_S = 4 * 3600.0
# A run whose process is killed is done again, once: its stages take up what the first one finished. One that a stage
# failed is not: it would fail again.
_AGAIN = {"dagster/max_retries": "1", "dagster/retry_strategy": "ALL_STEPS"}

_landing = dg.AssetSelection.assets(inbox.landed_day)
_pipeline = (
    dg.AssetSelection.all()
    - dg.AssetSelection.groups(experiments.GROUP)
    - dg.AssetSelection.assets(evaluation.comparison)
    - _landing
)


def jobs(options: LifecycleOptions) -> list[Any]:
    """Return the jobs of the code location."""
    return [
        dg.define_asset_job(
            FULL_PIPELINE,
            selection=_pipeline,
            tags=_AGAIN,
            description="From landed files to the served pair of models and what it served; finished stages are "
            "reused. Judged on each user's last exposure.",
        ),
        dg.define_asset_job(
            RETRAINING,
            selection=_pipeline,
            tags=_AGAIN,
            config=retraining_config(options, "warm", wait_s=WAIT_S),
            description="New data in, and the better pair of models served: trained on all but the newest days, "
            "judged on them beside the champion, which serves on unless the challenger passes every gate.",
        ),
        dg.define_asset_job(
            LANDING_DAY,
            selection=_landing,
            tags=_AGAIN,
            description="Lands what lies in the inbox for the days of its partitions; passes a training.",
        ),
        dg.define_asset_job(
            DEPLOYING,
            selection=dg.AssetSelection.assets("deployment"),
            tags={"gr/at_once": DEPLOYING},
            config=deploying_config(),
            description="Serves the pair that the alias champion names, within seconds; passes a training.",
        ),
    ]


def pipeline_config(recipe: str, selection: Sequence[str] = TRAINED, **platform: Any) -> dict[str, Any]:
    """Return the run config of `full_pipeline`. platform: fields of the resource `Platform`."""
    return _config({name: {"recipe": recipe} for name in TRAINED if name in selection}, platform)


def retraining_config(options: LifecycleOptions, start: Start, **platform: Any) -> dict[str, Any]:
    """Return the run config of `retraining`. platform: fields of the resource `Platform`."""
    chosen = options.retraining
    trained = {"recipe": chosen.recipe, "num_processes": chosen.num_processes, "split": "time", "start": start}
    return _config(dict.fromkeys(TRAINED, trained), platform)


def deploying_config(*, champion_only: bool = True, **platform: Any) -> dict[str, Any]:
    """Return the run config of `deploying`. platform: fields of the resource `Platform`."""
    return _config({"deployment": {"champion_only": champion_only}}, {"alone": False} | platform)


def retraining_tags(options: LifecycleOptions, start: Start, reason: str) -> dict[str, str]:
    """Return what a retraining is tagged with when it is asked for; the run adds what it learns."""
    return {RECIPE: options.retraining.recipe, START: start, REASON: reason}


def _config(ops: dict[str, dict[str, Any]], platform: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in platform.items() if value != ""}
    config: dict[str, Any] = {"ops": {name: {"config": each} for name, each in ops.items()}}
    return config | ({"resources": {"platform": {"config": given}}} if given else {})

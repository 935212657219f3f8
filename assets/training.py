"""The stages that train: one asset a model, both on the same sequences."""

import json

import dagster as dg

from assets.materialization import Stage, table
from assets.resources import Platform, Training
from gr_platform.errors import UserError
from gr_platform.models.config import Kind


def _train(platform: Platform, config: Training, kind: Kind) -> dg.MaterializeResult:
    from gr_platform.evaluation.plots import learning_curve
    from gr_platform.training.epoch import NonFiniteLoss
    from gr_platform.training.loop import train_model

    stage = Stage(f"{kind}_model")
    ds = platform.dataset_name()
    try:
        result = train_model(platform.folder(), ds, kind, config.recipe_for(ds))
    except NonFiniteLoss as error:
        raise UserError(str(error)) from error
    curves = json.loads((result.folder / "curves.json").read_text(encoding="utf-8"))
    facts = result.manifest.facts
    figures = {name: facts[name] for name in ("num_parameters", "num_users", "epochs", "best_epoch")}
    best = {f"validation_{name}": v for name, v in facts["best"].items() if isinstance(v, float)}
    return stage.finish(
        digest=result.manifest.digest,
        reused=result.reused,
        figures={"recipe": result.manifest.spec["recipe"]["name"], **figures, **best},
        preview=table(list(curves[0]), [list(row.values()) for row in curves]),
        plot=learning_curve(curves),
    )


@dg.asset(group_name="models", kinds={"pytorch"}, deps=["sequences"])
def retrieval_model(platform: Platform, config: Training) -> dg.MaterializeResult:
    """The HSTU retrieval model: next-time queries against all items, trained with sampled softmax."""
    return _train(platform, config, "retrieval")


@dg.asset(group_name="models", kinds={"pytorch"}, deps=["sequences"])
def ranking_model(platform: Platform, config: Training) -> dg.MaterializeResult:
    """The HSTU ranking model: items and actions interleaved, one head a task, target-aware."""
    return _train(platform, config, "ranking")

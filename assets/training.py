"""The stages that train: one asset a model, both on the same sequences."""

import json
from typing import Literal

import dagster as dg
from dagster._core.errors import DagsterPipesExecutionError

from assets.materialization import UNTRACKED, Stage, table
from assets.resources import PIPELINE, Platform, Training
from gr_platform.models.config import Kind


class TrainingRun(Training):
    """A recipe, in how many processes it is trained (with GPUs, as many as there are), and the options of `gr train`.

    seed: instead of the recipe's; warm_start: the run whose weights to start from, as `gr train --warm-start` takes it.
    split: what is held out, each user's last exposures or the log's newest days; start: with the latter, from which
    weights: the champion's or none.
    """

    num_processes: int = 1
    seed: int | None = None
    warm_start: str = ""
    split: Literal["leave_one_out", "time"] = "leave_one_out"
    start: Literal["warm", "scratch"] = "scratch"


def _train(
    context: dg.AssetExecutionContext, platform: Platform, config: TrainingRun, kind: Kind
) -> dg.MaterializeResult:
    from gr_platform.evaluation.plots import learning_curve
    from gr_platform.lifecycle.retrain import retrain
    from gr_platform.registry import retrainings
    from gr_platform.registry.names import run_folder
    from gr_platform.registry.tracking import try_log_run
    from gr_platform.training.launch import Job, launching
    from gr_platform.training.loop import named_recipe, train_model

    def start(job: Job, num_processes: int) -> None:
        with launching(job, num_processes, "assets.training_process") as started:
            try:
                dg.PipesSubprocessClient().run(context=context, command=started.command, env=started.environment)
            except DagsterPipesExecutionError as error:
                raise started.failed() from error

    stage = Stage(f"{kind}_model")
    home, ds = platform.folder(), platform.dataset_name()
    recipe = named_recipe(config.recipe_for(ds), kind)
    if config.seed is not None:
        recipe = recipe.with_training(seed=config.seed)
    if config.split == "time":
        result, plan = retrain(
            home, ds, recipe, start=config.start, num_processes=config.num_processes, launching=start
        )
        why = plan.why
        parent = retrainings.for_model(home, ds, result.manifest, start=config.start, recipe=recipe.name)
    else:
        older = run_folder(home, ds, config.warm_start).name if config.warm_start else None
        result = train_model(home, ds, kind, recipe, num_processes=config.num_processes, warm_start=older, start=start)
        why, parent = f"warm: from {older}" if older else "from scratch", None
    begun = config.start if config.split == "time" else ""
    platform.record(recipe=recipe.name, dataset_digest=result.manifest.spec["sequences"], start=begun)
    tracked = try_log_run(home, ds, result.folder, parent=parent) or UNTRACKED
    curves = json.loads((result.folder / "curves.json").read_text(encoding="utf-8"))
    facts = result.manifest.facts
    figures = {name: facts[name] for name in ("num_parameters", "num_users", "epochs", "best_epoch", "refit_epochs")}
    best = {f"validation_{name}": v for name, v in facts["best"].items() if isinstance(v, float)}
    return stage.finish(
        digest=result.manifest.digest,
        reused=result.reused,
        figures={
            "recipe": recipe.name,
            "start": why,
            "seed": recipe.training.seed,
            "mlflow_run": tracked,
            **figures,
            **best,
        },
        preview=table(list(curves[0]), [[row.get(name, "") for name in curves[0]] for row in curves]),
        plot=learning_curve(curves),
    )


@dg.asset(group_name="models", pool=PIPELINE, kinds={"pytorch"}, deps=["sequences"])
def retrieval_model(context: dg.AssetExecutionContext, platform: Platform, config: TrainingRun) -> dg.MaterializeResult:
    """The HSTU retrieval model: next-time queries against all items, trained with sampled softmax."""
    return _train(context, platform, config, "retrieval")


@dg.asset(group_name="models", pool=PIPELINE, kinds={"pytorch"}, deps=["sequences"])
def ranking_model(context: dg.AssetExecutionContext, platform: Platform, config: TrainingRun) -> dg.MaterializeResult:
    """The HSTU ranking model: items and actions interleaved, one head a task, target-aware."""
    return _train(context, platform, config, "ranking")

"""The experiments as assets: one partition a cell, one report an experiment, one chart over all runs.

Invariant: none is part of the full pipeline: they take hours, and are there to be run by name or by partition.
"""

from pathlib import Path

import dagster as dg

from assets import runs
from assets.materialization import Stage, table
from gr_platform import settings
from gr_platform.experiments.catalogue import experiments, named
from gr_platform.experiments.experiment import Experiment, Scale

GROUP = "experiments"


class Experiments(dg.ConfigurableResource):
    """Where experiments keep their results (default: GR_HOME), where real data sets lie, and at which scale to run."""

    home: str = ""
    data: str = ""
    scale: str = "full"

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Tag the run."""
        runs.mark(context)

    def folder(self) -> Path:
        """Return the absolute state folder."""
        return Path(self.home) if self.home else settings.home()

    def data_folder(self) -> Path | None:
        """Return the folder of real data sets, or None where they are imported already."""
        return Path(self.data) if self.data else None

    def experiment(self, name: str) -> Experiment:
        """Return the experiment of that name at the configured scale."""
        size: Scale = "smoke" if self.scale == "smoke" else "full"
        return named(name, size)


def _run_cell(name: str, partition: str, lab: Experiments) -> dg.MaterializeResult:
    from gr_platform.evaluation.plots import metric_bars
    from gr_platform.experiments.run import run_cell
    from gr_platform.registry.experiments import log_cell

    stage = Stage(f"{name}_cells")
    experiment = lab.experiment(name)
    cell = experiment.cell(partition)
    result = run_cell(lab.folder(), experiment, cell, folder=lab.data_folder())
    run_id = log_cell(lab.folder(), experiment, cell, result)
    figures = {k: v for k, v in result.manifest.facts["figures"].items() if isinstance(v, int | float)}
    shown = [figure for each in experiment.tables if each.group == cell.group for figure in each.columns]
    return stage.finish(
        digest=result.manifest.digest,
        reused=result.reused,
        figures={"run": run_id, "label": cell.label, **figures},
        preview=table(["figure", "value"], list(figures.items())),
        plot=metric_bars({cell.label: figures}, [each for each in shown if abs(figures.get(each) or 0.0) <= 1]),
    )


def _report(name: str, lab: Experiments) -> dg.MaterializeResult:
    from gr_platform.experiments import render
    from gr_platform.experiments.report import report, write
    from gr_platform.experiments.run import results
    from gr_platform.registry.experiments import log_report
    from gr_platform.storage import digest_of

    stage = Stage(f"{name}_report")
    experiment = lab.experiment(name)
    found = report(lab.folder(), experiment)
    write(found, results(lab.folder()) / f"{name}.json")
    return stage.finish(
        digest=digest_of(found),
        reused=False,
        figures={"run": log_report(lab.folder(), experiment, found), "missing": len(found["missing"])},
        preview="\n\n".join([*render.tables(found), *found["derived"].get("lines", []), render.shortfall(found)]),
        plot=render.plot(found),
    )


def _assets(experiment: Experiment) -> list[dg.AssetsDefinition]:
    """Return the partitioned asset of an experiment's cells and the report made of them."""
    name = experiment.name

    def run(context: dg.AssetExecutionContext, lab: Experiments) -> dg.MaterializeResult:
        return _run_cell(name, context.partition_key, lab)

    cells = dg.asset(
        name=f"{name}_cells",
        group_name=GROUP,
        kinds={"pytorch", "mlflow"},
        partitions_def=dg.StaticPartitionsDefinition([cell.name for cell in experiment.cells]),
        description=f"{experiment.question}\n\n{experiment.protocol}",
    )(run)

    def report(lab: Experiments) -> dg.MaterializeResult:
        return _report(name, lab)

    summary = dg.asset(
        name=f"{name}_report",
        group_name=GROUP,
        kinds={"mlflow"},
        deps=[cells],
        description=f"The table and the plot of: {experiment.title}. Cells that did not run are named as missing.",
    )(report)
    return [cells, summary]


experiment_assets = [asset for each in experiments().values() for asset in _assets(each)]


@dg.asset(group_name=GROUP, kinds={"mlflow"}, deps=[f"{name}_report" for name in experiments()])
def compute_against_quality(lab: Experiments) -> dg.MaterializeResult:
    """Training compute in PFLOP/s-days against NDCG@10 or NE on the test, over all runs of the registry."""
    from gr_platform.experiments.render import compute_plot
    from gr_platform.registry.experiments import compute_against_quality as spent
    from gr_platform.storage import digest_of

    stage = Stage("compute_against_quality")
    found = spent(lab.folder())
    rows = [[each.dataset, each.name, each.pflops_days, each.measure, each.quality] for each in found]
    return stage.finish(
        digest=digest_of(rows),
        reused=False,
        figures={"num_runs": len(found)},
        preview=table(["data set", "model", "PFLOP/s-days", "measure", "quality"], rows),
        plot=compute_plot([(e.dataset, e.name, e.pflops_days, e.measure, e.quality) for e in found]),
    )

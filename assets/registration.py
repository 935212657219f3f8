"""The stage that records the models in the registry and makes them challengers."""

import dagster as dg

from assets.materialization import Stage, table
from assets.resources import PIPELINE, Platform


@dg.asset(group_name="release", pool=PIPELINE, kinds={"mlflow"}, deps=["evaluation"])
def registration(platform: Platform) -> dg.MaterializeResult:
    """One MLflow run and one registered version a model; versions that are not champion become challenger."""
    from gr_platform.registry.versions import register_current
    from gr_platform.storage import digest_of

    stage = Stage("registration")
    found = register_current(platform.folder(), platform.dataset_name())
    rows = [[v.name, v.version, ", ".join(v.aliases), v.run_id] for v in found.values()]
    return stage.finish(
        digest=digest_of([[v.name, v.version, v.run_digest] for v in found.values()]),
        reused=all(v.reused for v in found.values()),
        figures={f"{kind}_version": v.version for kind, v in found.items()},
        preview=table(["model", "version", "aliases", "run"], rows),
    )

"""The last stages: models as bundles, and the better pair in front of the model server."""

import dagster as dg

from assets.materialization import Stage, table
from assets.resources import PIPELINE, Platform
from gr_platform.registry.versions import KINDS
from gr_platform.storage import Result


@dg.asset(
    group_name="release", pool=PIPELINE, kinds={"onnx"}, deps=["retrieval_model", "ranking_model", "registration"]
)
def bundle(platform: Platform) -> dg.MaterializeResult:
    """Both models as self-contained folders: graphs, weights, vocabulary, constants and golden requests."""
    from gr_platform.bundle.export import export
    from gr_platform.storage import digest_of

    stage = Stage("bundle")
    results: dict[str, Result] = {kind: export(platform.folder(), platform.dataset_name(), kind) for kind in KINDS}
    rows = [
        (kind, name, (result.folder / name).stat().st_size)
        for kind, result in results.items()
        for name in sorted(result.manifest.files)
    ]
    return stage.finish(
        digest=digest_of({kind: result.manifest.digest for kind, result in results.items()}),
        reused=all(result.reused for result in results.values()),
        figures={f"{kind}_digest": r.manifest.facts["model_digest"][:16] for kind, r in results.items()}
        | {"size_bytes": sum(row[2] for row in rows)},
        preview=table(["bundle", "file", "bytes"], rows),
    )


class Deploying(dg.Config):
    """champion_only: serve what the alias champion names, and judge nobody."""

    champion_only: bool = False


# In no pool: with `deploying` it passes a training, and everything it does has a lock of its own.
@dg.asset(group_name="release", kinds={"mlflow"}, deps=["bundle", "judgement"])
def deployment(platform: Platform, config: Deploying) -> dg.MaterializeResult:
    """The pair that may serve, in the model repository and loaded by the model server if one runs; then the aliases."""
    from gr_platform.lifecycle.release import reconcile, release

    stage = Stage("deployment")
    result = (reconcile if config.champion_only else release)(platform.folder(), platform.dataset_name())
    rows = [[v.name, v.version, ", ".join(v.aliases)] for v in result.champions.values()]
    reasons = "\n".join(f"- {reason}" for reason in result.reasons)
    return stage.finish(
        digest=result.digest,
        reused=result.outcome == "already champion",
        figures={
            "outcome": result.sentence,
            "server": "loaded" if result.server_loaded else "not running: gr serve or make up will serve it",
        },
        preview=table(["model", "version", "aliases"], rows) + (f"\n\n{reasons}" if reasons else ""),
    )

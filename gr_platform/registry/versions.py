"""Registered models: one name a data set and kind, a version for each distinct model, aliases for their roles.

Invariant: a model digest is registered at most once; aliases (`challenger`, `champion`, `previous`) are the only roles.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gr_platform import storage
from gr_platform.models.config import Kind
from gr_platform.registry import tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

log = logging.getLogger(__name__)

KINDS: tuple[Kind, ...] = ("retrieval", "ranking")
CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One registered version; `aliases` are its roles, `tags` what was recorded with it."""

    name: str
    version: str
    run_id: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    reused: bool = False

    @property
    def run_digest(self) -> str:
        """Digest of the run folder this version was made from."""
        return self.tags.get(tracking.RUN_DIGEST, "")


def model_name(ds: str, kind: str) -> str:
    """Return the registered model's name of a data set and kind."""
    return f"{ds}-{kind}"


def register(home: Path, ds: str, run: tracking.TrackedRun) -> Version:
    """Register a run's model and make it the challenger, unless its digest is registered already.

    The alias `challenger` moves to it except where it is the champion. Returns the version with `reused` set when it
    was there.
    """
    client, name = tracking.connect(home), model_name(ds, run.kind)
    known = [v for v in versions(home, ds, run.kind) if v.run_digest == run.run_digest]
    if known:
        number = known[0].version
    else:
        number = _create(client, home, ds, run, name)
        log.info("event=version_registered name=%s version=%s", name, number)
    if not known or CHAMPION not in known[0].aliases:
        client.set_registered_model_alias(name, CHALLENGER, number)
    elif stale := by_alias(home, ds, run.kind, CHALLENGER):
        # The current model already reigns: an older challenger must not be promoted in its place.
        client.delete_registered_model_alias(stale.name, CHALLENGER)
    return _version(client, name, number, reused=bool(known))


def by_alias(home: Path, ds: str, kind: str, alias: str) -> Version | None:
    """Return the version that holds `alias`, or None where no version does."""
    client, name = tracking.connect(home), model_name(ds, kind)
    held = client.get_registered_model(name).aliases if _exists(client, name) else {}
    return _version(client, name, held[alias]) if alias in held else None


def numbered(home: Path, name: str, number: str) -> Version:
    """Return a registered model's version of that number."""
    return _version(tracking.connect(home), name, number)


def versions(home: Path, ds: str, kind: str) -> list[Version]:
    """Return all registered versions of a kind, newest first."""
    client, name = tracking.connect(home), model_name(ds, kind)
    if not _exists(client, name):
        return []
    found = client.search_model_versions(f"name='{name}'")
    return sorted((_version(client, name, v.version) for v in found), key=lambda v: -int(v.version))


def set_tags(home: Path, version: Version, tags: Mapping[str, str]) -> None:
    """Record `tags` on a version."""
    client = tracking.connect(home)
    for key, value in tags.items():
        client.set_model_version_tag(version.name, version.version, key, value)


def drop_tag(home: Path, version: Version, key: str) -> None:
    """Remove a tag from a version, if it has it."""
    if key in version.tags:
        tracking.connect(home).delete_model_version_tag(version.name, version.version, key)


def move_alias(home: Path, version: Version, alias: str) -> None:
    """Give `alias` to this version; whoever held it loses it."""
    tracking.connect(home).set_registered_model_alias(version.name, alias, version.version)


def drop_alias(home: Path, version: Version, alias: str) -> None:
    """Take `alias` from its holder."""
    tracking.connect(home).delete_registered_model_alias(version.name, alias)


def _exists(client: "MlflowClient", name: str) -> bool:
    return bool(client.search_registered_models(f"name='{name}'", max_results=1))


def _version(client: "MlflowClient", name: str, number: str, *, reused: bool = False) -> Version:
    found = client.get_model_version(name, str(number))
    return Version(
        name=name,
        version=str(found.version),
        run_id=str(found.run_id),
        aliases=tuple(sorted(found.aliases)),
        tags=dict(found.tags),
        reused=reused,
    )


def _create(client: "MlflowClient", home: Path, ds: str, run: tracking.TrackedRun, name: str) -> str:
    import mlflow

    if not _exists(client, name):
        client.create_registered_model(name, tags={"gr.dataset": ds, "gr.kind": run.kind})
    sequences = storage.current(home / "sequences" / ds, "sequences")
    made_of = storage.read_manifest(sequences).spec
    vocabulary = sequences.parent / made_of["vocabulary_folder"] / "vocabulary.parquet"
    with mlflow.start_run(run_id=run.run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"run": str(run.folder), "vocabulary": str(vocabulary)},
            pip_requirements=["gr-platform"],
            signature=_signature(run.kind, made_of["declaration"]["item_id_type"]),
        )
    created = client.create_model_version(
        name,
        source=logged.model_uri,
        run_id=run.run_id,
        model_id=logged.model_id,
        tags={tracking.RUN_DIGEST: run.run_digest, "gr.run_folder": run.folder.name},
    )
    return str(created.version)


def _signature(kind: str, item_id_type: str) -> "ModelSignature":
    """Return the columns of a request table, so that MLflow shows and checks what the model takes."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import Array

    ids = Array(DataType.string if item_id_type == "string" else DataType.long)
    longs = Array(DataType.long)
    columns: list[ColSpec | TensorSpec] = [
        ColSpec(ids, "history_items"),
        ColSpec(longs, "history_actions"),
        ColSpec(longs, "history_times"),
        ColSpec(DataType.long, "request_time"),
    ]
    if kind == "ranking":
        return ModelSignature(inputs=Schema([*columns, ColSpec(ids, "candidates")]))
    return ModelSignature(inputs=Schema(columns), params=ParamSchema([ParamSpec("k", DataType.long, 10)]))


def register_current(home: Path, ds: str) -> dict[Kind, Version]:
    """Log and register the data set's current models; return the version of each kind that there is a model of.

    Raises UserError if there is none, or the evaluation is of other ones.
    """
    return {kind: register(home, ds, tracking.log_current(home, ds, kind)) for kind in trained_kinds(home, ds)}


def trained_kinds(home: Path, ds: str) -> tuple[Kind, ...]:
    """Return the kinds that a data set has a current model of; without any the first, whose absence its reader says."""
    runs = home / "runs" / ds
    return tuple(kind for kind in KINDS if (runs / f"{kind}_model.current").is_file()) or KINDS[:1]

"""What of the registry nobody needs any more: versions without a role whose model is gone, runs that grew old.

Invariant: a version with an alias, its run and the run above it are never among it. Files go first and the entry last,
so that a deletion that was killed is found again; nothing outside the state folder is touched.

What MLflow forgets it keeps as a hidden row of its database, without files; `mlflow gc` takes those out as well.
"""

import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from gr_platform.registry import tracking, versions
from gr_platform.registry.tracking import PARENT, RUN_DIGEST

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry of the registry and the folder of its files, None where it has none in the state folder.

    run_id: of a run; else it is the version `version` of the registered model `name`.
    """

    name: str
    created_ms: int
    folder: Path | None
    version: str = ""
    model_id: str = ""
    run_id: str = ""


def roles(home: Path, ds: str) -> dict[str, tuple[str, ...]]:
    """Return run digest -> aliases of every version of a data set that has a role; {} without a registry."""
    if not tracking.exists(home):
        return {}
    found = [version for kind in versions.KINDS for version in versions.versions(home, ds, kind)]
    return {version.run_digest: version.aliases for version in found if version.aliases}


def old_versions(home: Path, ds: str, kept_runs: Collection[str], before_ms: float) -> list[Entry]:
    """Return the versions from before a time (ms UTC) that have no role and whose run is not among `kept_runs`."""
    if not tracking.exists(home):
        return []
    client, found = tracking.connect(home), []
    for kind in versions.KINDS:
        for version in versions.versions(home, ds, kind):
            registered = client.get_model_version(version.name, version.version)
            created = int(registered.creation_timestamp or 0)
            if version.aliases or version.run_digest in kept_runs or created > before_ms:
                continue
            model_id = registered.model_id or _model_id(str(registered.source))
            folder = _model_folder(client, home, model_id) if model_id else None
            named = {"name": version.name, "version": version.version, "model_id": model_id or ""}
            found.append(Entry(created_ms=created, folder=folder, **named))
    return found


def old_runs(
    home: Path, ds: str, kept_runs: Collection[str], dropped: Collection[Entry], before_ms: float
) -> list[Entry]:
    """Return the runs of a data set's experiment that started before a time (ms UTC) and that nothing needs.

    Needed: the run of a model among `kept_runs`, of a version that is not `dropped`, and the run above a needed one.
    """
    if not tracking.exists(home):
        return []
    client = tracking.connect(home)
    gone = {(entry.name, entry.version) for entry in dropped}
    registered = [version for kind in versions.KINDS for version in versions.versions(home, ds, kind)]
    needed = {version.run_id for version in registered if (version.name, version.version) not in gone}
    runs = list(_runs(client, ds))
    kept = [
        run
        for run in runs
        if run.info.run_id in needed
        or run.info.start_time > before_ms
        or run.data.tags.get(RUN_DIGEST) in set(kept_runs)
    ]
    needed = {str(run.info.run_id) for run in kept} | {run.data.tags.get(PARENT, "") for run in kept}
    return [
        Entry(
            name=str(run.info.run_name),
            created_ms=int(run.info.start_time),
            folder=_run_folder(home, run),
            run_id=str(run.info.run_id),
        )
        for run in runs
        if run.info.run_id not in needed
    ]


def drop(home: Path, entry: Entry) -> None:
    """Delete an entry and its files."""
    client = tracking.connect(home)
    if entry.folder is not None and entry.folder.is_dir():
        shutil.rmtree(entry.folder)
    if entry.run_id:
        client.delete_run(entry.run_id)
        return
    if entry.model_id and _has_model(client, entry.model_id):
        client.delete_logged_model(entry.model_id)
    client.delete_model_version(entry.name, entry.version)


def _runs(client: "MlflowClient", ds: str) -> Iterator["Run"]:
    experiment = client.get_experiment_by_name(ds)
    token: str | None = None
    while experiment is not None:
        page = client.search_runs([experiment.experiment_id], max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _model_id(source: str) -> str:
    """Return the id in `models:/m-...`, the source of a version; "" of any other."""
    name = source.removeprefix("models:/")
    return name if source.startswith("models:/m-") else ""


def _has_model(client: "MlflowClient", model_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_logged_model(model_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def _model_folder(client: "MlflowClient", home: Path, model_id: str) -> Path | None:
    if not _has_model(client, model_id):
        return None
    return _own_folder(home, str(client.get_logged_model(model_id).artifact_location), model_id)


def _run_folder(home: Path, run: "Run") -> Path | None:
    return _own_folder(home, str(run.info.artifact_uri), str(run.info.run_id))


def _own_folder(home: Path, uri: str, name: str) -> Path | None:
    """Return the folder called `name` that artifacts at `uri` lie in, if it is one of the state folder's."""
    parts = urlsplit(uri)
    folder = Path(unquote(parts.path)).parent
    ours = (home / "mlartifacts").resolve()
    # A link may lead anywhere, and an older place of the state folder may be somebody else's now.
    is_ours = parts.scheme in ("", "file") and folder.name == name and folder.resolve().is_relative_to(ours)
    return folder if is_ours and not folder.is_symlink() else None

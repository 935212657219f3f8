"""Which run a person means: by folder, by digest, by its name in MLflow, or simply the current one.

Invariant: reading only; a name that fits several runs is refused, never guessed.
"""

from pathlib import Path

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.registry import tracking
from gr_platform.registry.versions import KINDS

MIN_DIGEST = 4


def run_folder(home: Path, ds: str, run: str) -> Path:
    """Return the folder of a trained model of a data set.

    run: its folder's name, `retrieval_model` or `ranking_model` for the current one, the first 4 or more digits of its
    digest or of those in its folder's name, or its name in MLflow. Raises UserError if it fits no run, or several.
    """
    runs = home / "runs" / ds
    if run in {f"{kind}_model" for kind in KINDS}:
        return storage.current(runs, run)
    folders = {
        folder: storage.read_manifest(folder).digest
        for kind in KINDS
        for folder in sorted(runs.glob(f"{kind}_model-*"))
        if (folder / storage.MANIFEST).is_file()
    }
    found = [folder for folder in folders if folder.name == run]
    if not found and len(run) >= MIN_DIGEST:
        found = [f for f, digest in folders.items() if digest.startswith(run) or f.name.split("-")[-1].startswith(run)]
    if not found:
        digests = _digests_named(home, run)
        found = [folder for folder, digest in folders.items() if digest in digests]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{run!r} fits several runs of {ds}: {', '.join(f.name for f in found)}; name one of them")
    known = ", ".join(folder.name for folder in folders) or "none yet"
    raise UserError(
        f"data set {ds} has no run {run!r}; name a run's folder, digest or MLflow name, or retrieval_model or "
        f"ranking_model for the current one (runs: {known})"
    )


def _digests_named(home: Path, name: str) -> set[str]:
    """Return the digests of the models that MLflow has runs of this name for."""
    if "'" in name or not (home / "mlflow.db").is_file():
        return set()
    client = tracking.connect(home)
    experiments = [str(each.experiment_id) for each in client.search_experiments()]
    found = client.search_runs(experiments, filter_string=f"attributes.run_name = '{name}'")
    return {each.data.tags[tracking.RUN_DIGEST] for each in found if tracking.RUN_DIGEST in each.data.tags}

"""Which run a person means: by folder, by digest, by its name in MLflow, or simply the current one.

Invariant: reading only; a name that fits several runs is refused, never guessed.
"""

import logging
from pathlib import Path

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.registry import tracking
from gr_platform.registry.versions import KINDS

logger = logging.getLogger(__name__)

MIN_DIGEST = 4


def run_folder(home: Path, ds: str, run: str) -> Path:
    """Return the folder of a trained model of a data set.

    run: its folder's name, `retrieval_model` or `ranking_model` for the current one, the first 4 or more digits of its
    digest or of those in its folder's name, or its name in MLflow. Raises UserError if it fits no run, or several, and
    for a damaged manifest in the folder that is asked for.
    """
    runs = home / "runs" / ds
    if run in {f"{kind}_model" for kind in KINDS}:
        return storage.current(runs, run)
    folders = _digests(runs, run)
    found = [folder for folder in folders if folder.name == run]
    if not found and len(run) >= MIN_DIGEST:
        found = [folder for folder, digest in folders.items() if digest.startswith(run) or _is_called(folder, run)]
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


def _digests(runs: Path, run: str) -> dict[Path, str]:
    """Return the digest of each run. One that cannot be read is left out, unless it is the one asked for."""
    digests = {}
    for kind in KINDS:
        for folder in sorted(runs.glob(f"{kind}_model-*")):
            if not (folder / storage.MANIFEST).is_file():
                continue
            try:
                digests[folder] = storage.read_manifest(folder).digest
            except UserError as error:
                if _is_called(folder, run):
                    raise
                logger.warning("event=run_left_out folder=%s reason=%s", folder.name, error)
    return digests


def _is_called(folder: Path, run: str) -> bool:
    """Return whether `run` is the folder's name or the first digits in it."""
    return folder.name == run or (len(run) >= MIN_DIGEST and folder.name.split("-")[-1].startswith(run))


def _digests_named(home: Path, name: str) -> set[str]:
    """Return the digests of the models that MLflow has runs of this name for."""
    if "'" in name or not tracking.exists(home):
        return set()
    client = tracking.connect(home)
    experiments = [str(each.experiment_id) for each in client.search_experiments()]
    found = client.search_runs(experiments, filter_string=f"attributes.run_name = '{name}'")
    return {each.data.tags[tracking.RUN_DIGEST] for each in found if tracking.RUN_DIGEST in each.data.tags}

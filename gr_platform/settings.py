"""Every environment variable of the platform, read here and nowhere else.

Invariant: no other module reads `os.environ` for a `GR_` name, so this file is the whole list.
"""

import os
import shutil
from pathlib import Path

from gr_platform.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parent.parent


def home() -> Path:
    """Return the absolute folder of all state: `GR_HOME`, or `var/` in the project. Raises UserError."""
    folder = Path(os.environ.get("GR_HOME") or PROJECT_ROOT / "var").resolve()
    if set("%?") & set(str(folder)):
        raise UserError("GR_HOME has a % or ? in its path, which the address of a database cannot hold; choose another")
    return folder


def dagster_home() -> Path:
    """Return the absolute Dagster instance folder, with its dagster.yaml in place.

    `DAGSTER_HOME` if set; the project's `dagster_home/` for the default state folder; else a copy inside `GR_HOME`,
    so that two state folders never share a run history.
    """
    committed = PROJECT_ROOT / "dagster_home"
    if configured := os.environ.get("DAGSTER_HOME"):
        return Path(configured).resolve()
    if not os.environ.get("GR_HOME") and committed.is_dir():
        return committed
    folder = home() / "dagster_home"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "dagster.yaml").exists():
        shutil.copy(committed / "dagster.yaml", folder / "dagster.yaml")
    return folder


def serving_python() -> Path:
    """Return the Python of the model server's environment: `GR_SERVING_VENV` or `.venv-serving` in the project."""
    return Path(os.environ.get("GR_SERVING_VENV") or PROJECT_ROOT / ".venv-serving") / "bin" / "python"


def server_admin_key() -> str:
    """Return the key of the model control of a server that somebody else runs (`GR_SERVER_ADMIN_KEY`), '' for none."""
    return os.environ.get("GR_SERVER_ADMIN_KEY") or ""


def peer_python() -> Path | None:
    """Return the Python of the environment with the libraries that `gr bench train` compares with, or None.

    `GR_PEERS` names the environment's folder. Raises UserError if there is no Python in it.
    """
    configured = os.environ.get("GR_PEERS")
    if not configured:
        return None
    python = Path(configured).absolute() / "bin" / "python"
    if not python.exists():
        raise UserError("GR_PEERS names a folder without bin/python; make it with: python3 -m venv")
    return python


def perf_analyzer() -> Path | None:
    """Return the load tool that `gr bench serving` runs beside its own, or None: `GR_PERF_ANALYZER` names its folder.

    Raises UserError if it is not in there.
    """
    configured = os.environ.get("GR_PERF_ANALYZER")
    if not configured:
        return None
    binary = Path(configured).absolute() / "perf_analyzer"
    if not os.access(binary, os.X_OK):
        raise UserError(
            "GR_PERF_ANALYZER names a folder without an executable perf_analyzer; docs/benchmarks says where it comes "
            "from"
        )
    return binary


def dataset() -> str | None:
    """Return the data set that `GR_DATASET` names, or None: then the one imported last is meant."""
    return os.environ.get("GR_DATASET") or None


def num_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0))


def num_threads() -> int:
    """Return the number of compute threads: `GR_THREADS`, or one less than there are cores. Raises UserError.

    OpenMP threads spin while they wait for each other, so where every core has one, any other busy program stops them
    all: on two cores a training step then took 939 ms with two threads and 106 ms with one (undisturbed 69 and 88 ms).
    """
    configured = os.environ.get("GR_THREADS")
    if not configured:
        return max(1, num_cores() - 1)
    if not configured.isdecimal() or int(configured) < 1:
        raise UserError(f"GR_THREADS is {configured!r}, must be a whole number from 1; unset it for the default")
    return int(configured)


def device() -> str:
    """Return where models are trained and judged, `cpu` or `cuda`: `GR_DEVICE`, or a GPU if torch sees one (`auto`).

    Raises UserError for another word, and for `cuda` where torch sees no GPU.
    """
    configured = os.environ.get("GR_DEVICE") or "auto"
    if configured not in ("auto", "cpu", "cuda"):
        raise UserError(f"GR_DEVICE is {configured!r}, must be auto, cpu or cuda; unset it for auto")
    if configured == "cpu":
        return "cpu"
    # Not at the top: whoever only looks for a folder need not wait for torch.
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if configured == "cuda":
        raise UserError(
            f"GR_DEVICE is cuda, but torch {torch.__version__} sees no GPU; install torch's CUDA build and a driver, "
            "or set GR_DEVICE to cpu"
        )
    return "cpu"


def test_data() -> Path | None:
    """Return the folder of real data sets for tests (`GR_TEST_DATA`), or None."""
    configured = os.environ.get("GR_TEST_DATA")
    return Path(configured) if configured else None

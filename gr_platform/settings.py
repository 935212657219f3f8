"""Every environment variable of the platform, read here and nowhere else.

Invariant: no other module reads `os.environ` for a `GR_` name, so this file is the whole list.
"""

import os
import re
import tempfile
from pathlib import Path

from gr_platform.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
MLFLOW_DB, DAGSTER_DB = "GR_MLFLOW_DB", "GR_DAGSTER_DB"
# Strict, so that no piece of a password with a bare @ : or / is taken for the host, which error texts name.
_POSTGRES = re.compile(
    r"postgresql(\+psycopg2)?://[^\s@:/?#]+(:[^\s@:/?#]*)?@"
    r"([\w.-]*|\[[0-9a-fA-F:.]+\])(:\d{1,5})?/[\w.~%-]+(\?[\w.~%&=/+-]*)?"
)
# Names the variable instead of its value: neither the file nor Dagster's UI shows the password.
_DAGSTER_STORAGE = f"storage:\n  postgres:\n    postgres_url:\n      env: {DAGSTER_DB}\n"


def home() -> Path:
    """Return the absolute folder of all state: `GR_HOME`, or `var/` in the project. Raises UserError."""
    folder = Path(os.environ.get("GR_HOME") or PROJECT_ROOT / "var").resolve()
    if set("%?") & set(str(folder)):
        raise UserError("GR_HOME has a % or ? in its path, which the address of a database cannot hold; choose another")
    return folder


def mlflow_db() -> str | None:
    """Return the PostgreSQL address of MLflow's store (`GR_MLFLOW_DB`), or None: SQLite in the state folder.

    With the driver's name, `postgresql+psycopg2://...`, as SQLAlchemy takes it. Raises UserError, without the address,
    if it is none.
    """
    return _postgres(MLFLOW_DB)


def dagster_db() -> str | None:
    """Return the PostgreSQL address of Dagster's storage (`GR_DAGSTER_DB`), or None: SQLite. Raises as `mlflow_db`."""
    return _postgres(DAGSTER_DB)


def _postgres(name: str) -> str | None:
    address = os.environ.get(name)
    if not address:
        return None
    if not _POSTGRES.fullmatch(address):
        raise UserError(
            f"{name} is no address of a PostgreSQL database; write postgresql://USER:PASSWORD@HOST:PORT/NAME, with "
            "every @ : / ? # and space of the password percent-encoded (@ is %40)"
        )
    # SQLAlchemy would take another driver; Dagster knows the errors of this one.
    return "postgresql+psycopg2://" + address.partition("://")[2]


def dagster_home() -> Path:
    """Return the absolute Dagster instance folder, with its dagster.yaml in place.

    `DAGSTER_HOME` if set; the project's `dagster_home/` for the default state folder; else a folder inside `GR_HOME`,
    so that two state folders never share a run history. The dagster.yaml in there is kept equal to the project's, with
    PostgreSQL as its storage where `GR_DAGSTER_DB` is set. Raises UserError if `DAGSTER_HOME` contradicts that.
    """
    committed = PROJECT_ROOT / "dagster_home"
    database = dagster_db()
    if configured := os.environ.get("DAGSTER_HOME"):
        return _own_instance(Path(configured).resolve(), asked=database is not None)
    folder = home() / "dagster_home"
    if not os.environ.get("GR_HOME") and database is None and committed.is_dir() and not folder.is_dir():
        return committed
    if database:
        # Dagster reads the variable itself, here and in the programs that we start.
        os.environ[DAGSTER_DB] = database
    own = "# Kept equal to dagster_home/dagster.yaml of the project by gr; to have your own, set DAGSTER_HOME.\n"
    wanted = own + (committed / "dagster.yaml").read_text(encoding="utf-8") + (_DAGSTER_STORAGE if database else "")
    _keep(folder / "dagster.yaml", wanted)
    return folder


def _own_instance(folder: Path, *, asked: bool) -> Path:
    written = folder / "dagster.yaml"
    if asked and not (written.is_file() and DAGSTER_DB in written.read_text(encoding="utf-8")):
        raise UserError(
            f"{DAGSTER_DB} is set, but the dagster.yaml in DAGSTER_HOME does not use it; unset DAGSTER_HOME, or write "
            f"there: storage: {{postgres: {{postgres_url: {{env: {DAGSTER_DB}}}}}}}"
        )
    return folder


def _keep(path: Path, text: str) -> None:
    """Make a small file hold `text`: by one rename, and only where it differs, since other programs read it."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, written = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
    os.replace(written, path)


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


def run_id() -> str:
    """Return the run that this process was started for (`GR_RUN_ID`), '' for none: its log lines carry it."""
    return os.environ.get("GR_RUN_ID") or ""


def log_format() -> str:
    """Return how lines of the log are written (`GR_LOG_FORMAT`), `text` or `json`. Raises UserError for another."""
    configured = os.environ.get("GR_LOG_FORMAT") or "text"
    if configured not in ("text", "json"):
        raise UserError(f"GR_LOG_FORMAT is {configured!r}, must be text or json; unset it for text")
    return configured


def alert_command() -> str:
    """Return the command line to run when something is wrong (`GR_ALERT_COMMAND`), '' for none."""
    return os.environ.get("GR_ALERT_COMMAND") or ""


def alert_url() -> str:
    """Return the address to post to when something is wrong (`GR_ALERT_URL`, a secret), '' for none."""
    return os.environ.get("GR_ALERT_URL") or ""


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

"""Every prerequisite, checked, each with what to do about it.

Invariant: checks only look; the one thing written is a probe file under GR_HOME, removed at once.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gr_platform import databases, settings
from gr_platform.commands.services import Ports, require_free, running_services
from gr_platform.errors import UserError

NEEDED_DISK_GB = 2.0
NEEDED_MEMORY_GB = 4.0
NEEDED_SHM_MB = 64.0
PLATFORM_IMPORTS = "torch, dagster, dagster_webserver, mlflow, duckdb, polars, onnx, onnxruntime, tritonclient.grpc"
SERVING_IMPORTS = "torch, onnxruntime, safetensors, pyarrow, gr_platform.bundle.load, serving"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One prerequisite: what was found and, where it is not `ok`, what to do. Only a `needed` one fails the doctor."""

    name: str
    ok: bool
    found: str
    advice: str = ""
    needed: bool = True


def examine(home: Path) -> list[Check]:
    """Return all checks, in the order in which one would mend them."""
    probes: list[Callable[[], Check]] = [
        _python,
        _system,
        lambda: _disk(home),
        _memory,
        lambda: _writable("GR_HOME writable", home),
        lambda: _writable("DAGSTER_HOME writable", settings.dagster_home()),
        _databases,
        _platform_environment,
        _serving_environment,
        _server_binary,
        _shared_memory,
        lambda: _ports(home),
    ]
    return [probe() for probe in probes]


def _python() -> Check:
    ok = (3, 11) <= sys.version_info[:2] < (3, 13)
    return Check(
        name="Python 3.11 or 3.12",
        ok=ok,
        found=platform.python_version(),
        advice="" if ok else "install Python 3.11 and run make setup PYTHON=/path/to/python3.11",
    )


def _system() -> Check:
    found = f"{platform.system()} on {platform.machine()}"
    ok = found == "Linux on x86_64"
    advice = "" if ok else "the model server's wheel exists for Linux on x86_64 only: use such a machine or container"
    return Check(name="Linux on x86_64", ok=ok, found=found, advice=advice)


def _disk(home: Path) -> Check:
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(there).free / 1e9
    ok = free >= NEEDED_DISK_GB
    advice = "" if ok else "free some, or set GR_HOME to a folder on another disk"
    return Check(name=f"{NEEDED_DISK_GB:.0f} GB of free disk", ok=ok, found=f"{free:.1f} GB", advice=advice)


def _memory() -> Check:
    import psutil

    free = psutil.virtual_memory().available / 1e9
    ok = free >= NEEDED_MEMORY_GB
    advice = "" if ok else "stop other programs, or train on a smaller data set"
    return Check(
        name=f"{NEEDED_MEMORY_GB:.0f} GB of free memory", ok=ok, found=f"{free:.1f} GB", advice=advice, needed=False
    )


def _writable(name: str, folder: Path) -> Check:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check(
            name=name, ok=False, found=error.strerror or "no", advice="choose a folder of yours by the variable's name"
        )
    return Check(name=name, ok=True, found="yes")


def _databases() -> Check:
    name = "databases of Dagster and MLflow"
    try:
        databases.require()
    except UserError as error:
        return Check(name=name, ok=False, found=str(error), advice="or unset the variable: then SQLite does it")
    named = ", ".join(databases.configured())
    return Check(name=name, ok=True, found=f"PostgreSQL of {named}" if named else "SQLite in the state folder")


def _imports(python: Path, modules: str) -> str:
    """Return '' if the Python imports all the modules, else the last line of what it said."""
    try:
        done = subprocess.run(
            [python, "-c", f"import {modules}"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=settings.PROJECT_ROOT,
            env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return type(error).__name__
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no reason given"])[-1]


def _platform_environment() -> Check:
    fault = _imports(Path(sys.executable), PLATFORM_IMPORTS)
    return Check(
        name="platform environment",
        ok=not fault,
        found=fault or "imports work",
        advice="remove .venv and run make setup" if fault else "",
    )


def _serving_environment() -> Check:
    python = settings.serving_python()
    if not python.exists():
        return Check(name="serving environment", ok=False, found="missing", advice="run make setup")
    code = (
        f"{SERVING_IMPORTS}; import numpy; assert numpy.__version__ < '2', 'numpy ' + numpy.__version__ + ' is not < 2'"
    )
    fault = _imports(python, code)
    return Check(
        name="serving environment",
        ok=not fault,
        found=fault or "imports work, numpy < 2",
        advice="remove .venv-serving and run make setup" if fault else "",
    )


def _server_binary() -> Check:
    root = settings.serving_python().parent.parent
    ok = any(root.glob("lib/python3*/site-packages/pytriton/tritonserver/bin/tritonserver"))
    advice = "" if ok else "remove .venv-serving and run make setup"
    return Check(name="tritonserver", ok=ok, found="there" if ok else "missing", advice=advice)


def _shared_memory() -> Check:
    shm = Path("/dev/shm")
    free = shutil.disk_usage(shm).free / 1e6 if shm.is_dir() else 0.0
    ok = free >= NEEDED_SHM_MB
    advice = "" if ok else "give the container more shared memory (docker: --shm-size=1g)"
    return Check(name=f"{NEEDED_SHM_MB:.0f} MB of shared memory", ok=ok, found=f"{free:,.0f} MB", advice=advice)


def _ports(home: Path) -> Check:
    ours = running_services(home)
    if ours:
        return Check(name="ports", ok=True, found="in use by services that gr up started")
    taken = []
    ports = Ports()
    for port in (ports.dagster, ports.mlflow, ports.http, ports.grpc, ports.metrics):
        try:
            require_free(port, "a service")
        except UserError:
            taken.append(str(port))
    return Check(
        name="ports",
        ok=not taken,
        found=f"{', '.join(taken)} in use" if taken else "free",
        advice="stop what listens there or pass other ports to gr up" if taken else "",
        needed=False,
    )

"""The long-running programs beside the platform: Dagster's UI and daemon, MLflow's UI, metrics, the model server.

Invariant: `home/services.json` names exactly what `up` started (pid and creation time, so a reused pid is never taken
for ours); `down` stops those process trees and nothing else.
"""

import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from gr_platform import processes, settings, storage
from gr_platform.errors import UserError
from gr_platform.registry import tracking
from serving.handle import ServerHandle, attach

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
RECORD = "services.json"
MODEL_SERVER = "model-server"
PLATFORM_METRICS = "platform-metrics"
# The pages of the two UIs that a person wants first; their roots open on empty ones.
PAGES = {"dagster-webserver": "/asset-groups", "mlflow": "/#/experiments?workflowType=machine_learning"}
READY_S = 120.0
# The model server drains requests for up to 30 s when it is told to stop.
STOP_S = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where each service listens, all on loopback."""

    dagster: int = 3000
    mlflow: int = 5000
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002
    platform_metrics: int = 8003


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A program to run: `address` is what a person opens, `ready_url` answers 200 once it works ('' if it has none)."""

    name: str
    command: tuple[str, ...]
    ports: tuple[int, ...] = ()
    address: str = ""
    ready_url: str = ""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A started service as services.json records it; `create_time` in seconds since the epoch."""

    name: str
    pid: int
    create_time: float
    address: str


def platform_services(home: Path, dagster_home: Path, ports: Ports) -> list[Service]:
    """Return the services of a state folder in starting order.

    The model server is one of them where a pair is deployed that no `gr serve` serves already.
    """
    bin_folder = Path(sys.executable).parent
    code = ("-m", "gr_platform.definitions")
    dagster_env = {"DAGSTER_HOME": str(dagster_home)}
    web, ui = f"http://{HOST}:{ports.dagster}", f"http://{HOST}:{ports.mlflow}"
    services = [
        Service(
            name="dagster-webserver",
            command=(str(bin_folder / "dagster-webserver"), *code, "-h", HOST, "-p", str(ports.dagster)),
            ports=(ports.dagster,),
            address=web,
            ready_url=f"{web}/server_info",
            environment=dagster_env,
        ),
        Service(
            name="dagster-daemon",
            command=(str(bin_folder / "dagster-daemon"), "run", *code),
            environment=dagster_env,
        ),
        Service(
            name="mlflow",
            command=(
                *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(ports.mlflow)),
                *("--workers", "1", "--artifacts-destination", str(home / "mlartifacts")),
            ),
            ports=(ports.mlflow,),
            address=ui,
            ready_url=f"{ui}/health",
            # The address by environment: it may hold a password, and commands are for all to see.
            environment={
                "MLFLOW_BACKEND_STORE_URI": tracking.tracking_uri(home),
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                "MLFLOW_DISABLE_TELEMETRY": "true",
            },
        ),
    ]
    served = foreign_server(home)
    # One whose program was killed has nobody who watches it: it is ended and started again.
    serve = has_models(home) and (served is None or served.orphaned)
    return [*services, _platform_metrics(ports), *([_model_server(ports)] if serve else [])]


def has_models(home: Path) -> bool:
    """Return whether a pair is deployed that a model server can load."""
    return any((home / "model_repository").glob("*/config.pbtxt"))


def _platform_metrics(ports: Ports) -> Service:
    address = f"http://{HOST}:{ports.platform_metrics}/metrics"
    return Service(
        name=PLATFORM_METRICS,
        command=(sys.executable, "-m", "gr_platform.cli", "metrics", "--port", str(ports.platform_metrics)),
        ports=(ports.platform_metrics,),
        address=address,
        ready_url=address,
    )


def _model_server(ports: Ports) -> Service:
    options = ("--http-port", str(ports.http), "--grpc-port", str(ports.grpc), "--metrics-port", str(ports.metrics))
    return Service(
        name=MODEL_SERVER,
        command=(sys.executable, "-m", "gr_platform.cli", "serve", *options),
        ports=(ports.http, ports.grpc, ports.metrics),
        address=f"grpc://{HOST}:{ports.grpc}  http://{HOST}:{ports.http}  http://{HOST}:{ports.metrics}/metrics",
        ready_url=f"http://{HOST}:{ports.http}/v2/health/ready",
    )


def up(home: Path, services: Sequence[Service], *, timeout_s: float = READY_S) -> list[Running]:
    """Start the services that are not running and return all of them once each answers.

    Raises UserError if a port is taken or named twice, a running service has another address, or one does not come up;
    then nothing this call started is left.
    """
    ports = [port for service in services for port in service.ports]
    if twice := [port for port in ports if ports.count(port) > 1]:
        raise UserError(f"port {twice[0]} is named for two services; give each its own (see --help)")
    with storage.exclusive(home, "services"):
        known = {running.name: running for running in running_services(home)}
        for service in services:
            if service.name in known and known[service.name].address != service.address:
                raise UserError(f"{service.name} runs already at {known[service.name].address}; run gr down first")
        missing = [service for service in services if service.name not in known]
        for service in missing:
            for port in service.ports:
                require_free(port, service.name)
        (home / "logs").mkdir(parents=True, exist_ok=True)
        started: dict[str, Running] = {}
        try:
            for service in missing:
                started[service.name] = _start(home, service)
                _record(home, [*known.values(), *started.values()])
            for service in services:
                _wait_ready((known | started)[service.name], service, timeout_s)
        except BaseException:
            _stop(list(started.values()))
            _record(home, list(known.values()))
            raise
        return [(known | started)[service.name] for service in services]


def down(home: Path) -> list[str]:
    """Stop what `up` started and return the names of what was still running; calling it again does nothing.

    A model server whose program was killed is nobody's any more: it is stopped too.
    """
    with storage.exclusive(home, "services", wait_s=READY_S):
        running = running_services(home)
        _stop(running)
        (home / RECORD).unlink(missing_ok=True)
        stopped = [service.name for service in running]
        server = attach(home)
        if server is not None and server.orphaned:
            server.stop()
            stopped.append(MODEL_SERVER)
        return stopped


def foreign_server(home: Path) -> ServerHandle | None:
    """Return the model server that runs but that `up` did not start: one of `gr serve`."""
    ours = any(service.name == MODEL_SERVER for service in running_services(home))
    return None if ours else attach(home)


def running_services(home: Path) -> list[Running]:
    """Return the recorded services whose process still lives."""
    try:
        recorded = json.loads((home / RECORD).read_text(encoding="utf-8"))
        services = [Running(**fields) for fields in recorded]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError):
        raise UserError(
            f"$GR_HOME/{RECORD} is damaged, so what gr up started is unknown; end those programs by hand and delete it"
        ) from None
    return [service for service in services if _process(service) is not None]


def require_free(port: int, name: str) -> None:
    """Raise UserError if something listens on a loopback port already."""
    with socket.socket() as probe:
        # Without this a port that only waits for old connections to time out would look taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise UserError(
                f"port {port} is in use, {name} needs it; stop what listens there or choose another port (see --help)"
            ) from None


def _start(home: Path, service: Service) -> Running:
    with (home / "logs" / f"{service.name}.log").open("ab") as output:
        child = subprocess.Popen(
            service.command,
            cwd=settings.PROJECT_ROOT,
            env=os.environ | {"GR_HOME": str(home)} | service.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    log.info("event=service_started name=%s pid=%d", service.name, child.pid)
    created = psutil.Process(child.pid).create_time()
    return Running(name=service.name, pid=child.pid, create_time=created, address=service.address)


def _wait_ready(running: Running, service: Service, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        ready = not service.ready_url or answers(service.ready_url)
        # Asked after the address: something else may answer there.
        if _process(running) is None:
            raise UserError(f"{service.name} stopped before it answered; see $GR_HOME/logs/{service.name}.log")
        if ready:
            return
        if time.monotonic() > deadline:
            raise UserError(f"{service.name} gave no answer in {timeout_s:.0f} s; see $GR_HOME/logs/{service.name}.log")
        time.sleep(0.2)


def answers(url: str) -> bool:
    """Return whether a loopback address answers 200, going past any configured proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _process(running: Running) -> psutil.Process | None:
    return processes.find(running.pid, running.create_time)


def _stop(services: Sequence[Running]) -> None:
    roots = [process for service in services if (process := _process(service)) is not None]
    processes.stop(roots, grace_s=STOP_S)


def _record(home: Path, services: Sequence[Running]) -> None:
    storage.write_text(home / RECORD, json.dumps([asdict(service) for service in services], indent=1) + "\n")

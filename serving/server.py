"""The model server on this machine: start it, find it again, stop it with everything it leaves behind.

Invariant: `serving/server.json` is written when the server is ready and removed when it has stopped; one that names a
dead process is recognised by pid and start time. What is removed is found by the instance's own random name alone.
"""

import os
import secrets
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
import tritonclient.grpc as grpcclient

from gr_platform import settings, storage
from gr_platform.errors import UserError
from serving import repository
from serving.handle import LOG, ServerHandle, attach, last_useful_line, read_record, record_path, remove_leftovers
from serving.installation import find_installation

READY_TIMEOUT_S = 60.0
_RESTRICTED = "model-repository,shared-memory,trace,logging"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Ports to listen on; 0 = any free one."""

    grpc: int = 0
    http: int = 0
    metrics: int = 0


class EmbeddedServer:
    """A model server of one state folder: `with EmbeddedServer(home) as handle:`, or `start`, later `handle.stop()`."""

    def __init__(self, home: Path, *, ports: Ports | None = None, python: Path | None = None) -> None:
        """`python` is the serving environment's interpreter, by default the configured one."""
        self._home = home
        self._ports = ports or Ports()
        self._python = python or settings.serving_python()
        self._handle: ServerHandle | None = None

    def __enter__(self) -> ServerHandle:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, timeout_s: float = READY_TIMEOUT_S) -> ServerHandle:
        """Return the handle of the server once all its models are ready.

        Raises UserError if one runs already, a port is taken, or it does not come up in time (with the logged reason).
        """
        # Two starts at once would both find no server, and the one recorded first would be lost.
        with storage.exclusive(self._home, "model-server"):
            return self._start(timeout_s)

    def _start(self, timeout_s: float) -> ServerHandle:
        if running := attach(self._home):
            raise UserError(
                f"a model server of this state folder runs already (gRPC at {running.grpc_address}); end it first: "
                + ("gr down" if running.orphaned else "gr down, or Ctrl-C where gr serve runs")
            )
        if stale := read_record(self._home):
            remove_leftovers(self._home, stale)
        installation = find_installation(self._python)
        models = repository.ensure_repository(self._home)
        instance = f"gr-{secrets.token_hex(6)}"
        grpc, http, metrics = (f"127.0.0.1:{port}" for port in _choose_ports(self._ports))
        handle = ServerHandle(
            home=self._home,
            pid=0,
            create_time=0.0,
            instance=instance,
            grpc_address=grpc,
            http_address=http,
            metrics_address=metrics,
            admin_key=secrets.token_urlsafe(24),
            owner_pid=os.getpid(),
            owner_create_time=psutil.Process().create_time(),
        )
        command = [str(installation.binary), *_arguments(handle, installation.tree / "caches", models)]
        self._handle = handle
        try:
            installation.link_backends(handle.backend_folder)
            process = _spawn(command, installation.environment(), self._home)
            self._handle = handle.with_process(process.pid)
            _wait_until_ready(process, self._handle, models, timeout_s)
            storage.write_text(record_path(self._home), self._handle.to_json())
        except BaseException:
            self.stop()
            raise
        return self._handle

    def stop(self, grace_s: float = 20.0) -> None:
        """Stop the server that `start` started, if any."""
        if self._handle is not None:
            self._handle.stop(grace_s)
            self._handle = None


def load_models(home: Path, timeout_s: float = READY_TIMEOUT_S) -> tuple[str, ...]:
    """Load the models of the current repository into the running server and return their names.

    A model whose files have not changed is left as it is. Raises UserError if no server runs or a model does not load;
    the models that were serving then go on serving.
    """
    handle = attach(home)
    if handle is None:
        raise UserError("no model server runs; start it with gr serve or make up")
    models = repository.ensure_repository(home)
    with grpcclient.InferenceServerClient(handle.grpc_address) as client:
        for model in models:
            try:
                client.load_model(model, headers=handle.admin_headers, client_timeout=timeout_s)
            except grpcclient.InferenceServerException as error:
                reason = last_useful_line(error.message()) or "no reason given"
                raise UserError(
                    f"the model server did not load {model}: {reason}; what served before goes on"
                ) from None
    return models


def deploy(home: Path, retrieval: Path, ranking: Path, options: repository.ServingOptions | None = None) -> bool:
    """Publish two bundle folders and load them if a server runs; return whether one does.

    If they do not load, the repository points back at the previous pair, the server serves it, and UserError is raised.
    """
    published = repository.publish(home, retrieval, ranking, options)
    if attach(home) is None:
        return False
    try:
        load_models(home)
    except UserError:
        if published.changed and published.previous is not None:
            repository.point_to(home, published.previous)
            load_models(home)
        raise
    return True


def _arguments(handle: ServerHandle, caches: Path, models: tuple[str, ...]) -> list[str]:
    options = {
        "model-repository": handle.home / repository.LINK,
        "backend-directory": handle.backend_folder,
        "cache-directory": caches,
        "allow-gpu-metrics": "false",
        "pinned-memory-pool-byte-size": 0,
        "model-control-mode": "explicit",
        "strict-readiness": "false",
        # A model that once failed to load never counts as gone, so this much is waited at every stop after it.
        "exit-timeout-secs": 10,
        "backend-config": f"python,shm-region-prefix-name={handle.instance}",
        "grpc-restricted-protocol": f"{_RESTRICTED}:admin-key={handle.admin_key}",
        "http-restricted-api": f"{_RESTRICTED}:admin-key={handle.admin_key}",
    }
    addresses = {"grpc": handle.grpc_address, "http": handle.http_address, "metrics": handle.metrics_address}
    for name, address in addresses.items():
        options[f"{name}-address"], options[f"{name}-port"] = address.split(":")
    loads = [f"--load-model={model}" for model in models]
    return ["--disable-auto-complete-config", *(f"--{name}={value}" for name, value in options.items()), *loads]


def _spawn(command: list[str], environment: dict[str, str], home: Path) -> subprocess.Popen[bytes]:
    log = home / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        os.replace(log, log.with_suffix(".log.1"))
    with log.open("wb") as stream:
        # A session of its own: Ctrl-C in a terminal reaches the caller, which then stops the server in order.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment, start_new_session=True
        )


def _wait_until_ready(
    process: subprocess.Popen[bytes], handle: ServerHandle, models: tuple[str, ...], timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        if handle.is_ready(models):
            return
        time.sleep(0.05)
    what = f"exited with status {process.poll()}" if process.poll() is not None else f"was not ready in {timeout_s:g} s"
    reason = last_useful_line((handle.home / LOG).read_text(encoding="utf-8", errors="replace"))
    raise UserError(f"the model server {what}: {reason or 'it logged no reason'} (see $GR_HOME/{LOG})")


def _choose_ports(wanted: Ports) -> list[int]:
    """Return the three ports. Raises UserError if a requested one is taken."""
    sockets: list[socket.socket] = []
    try:
        for port in (wanted.grpc, wanted.http, wanted.metrics):
            listener = socket.socket()
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
                listener.listen()
            except OSError:
                raise UserError(f"port {port} is in use; choose another one or stop what listens there") from None
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()

"""The model server on this machine: start it, start it again, stop it with everything it leaves behind.

Invariant: `serving/server.json` is written when the server is ready and removed when it has stopped; one that names a
dead process is recognised by pid and start time. What is removed is found by the instance's own random name alone. A
server started again has the ports and the key of the first one, so whoever knows it reaches it.
"""

import logging
import os
import secrets
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from gr_platform import settings, storage
from gr_platform.errors import UserError
from serving import repository
from serving.handle import LOG, ServerHandle, attach, last_useful_line, record_path, sweep
from serving.installation import find_installation

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 120.0
# Held by whoever starts, stops or changes the models of the server of a state folder.
LOCK = "model-server"
# What is left of a server that is given up gets this long for the requests it may still answer.
RESTART_GRACE_S = 3.0
# The server's threads read JSON on their stacks, which in release 24.10 five megabytes of it overflow: 256 MiB, in KiB.
STACK_KB = 262_144
_KEPT_LOGS = 3
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
        self._admin_key = secrets.token_urlsafe(24)
        self._handle: ServerHandle | None = None
        self._process: subprocess.Popen[bytes] | None = None

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
        with storage.exclusive(self._home, LOCK):
            return self._start(timeout_s)

    def restart(self, timeout_s: float = READY_TIMEOUT_S) -> ServerHandle:
        """Give up the server that `start` started, whatever state it is in, and start one at the same ports.

        Raises UserError as `start` does; then none runs, and it may be called again.
        """
        with storage.exclusive(self._home, LOCK):
            self.stop(RESTART_GRACE_S)
            return self._start(timeout_s)

    def exit_status(self) -> int | None:
        """Return the status with which the server's process ended (-9: killed by signal 9), None while it runs."""
        return self._process.poll() if self._process is not None else None

    def stop(self, grace_s: float = 20.0) -> None:
        """Stop the server that `start` started, if any."""
        if self._handle is not None:
            self._handle.stop(grace_s)
            self._handle = None

    def _start(self, timeout_s: float) -> ServerHandle:
        if running := attach(self._home):
            if not running.orphaned:
                raise UserError(
                    f"a model server of this state folder runs already (gRPC at {running.grpc_address}); end it first: "
                    "gr down, or Ctrl-C where gr serve runs"
                )
            # Nobody watches it any more, and its models may be others than the repository's.
            running.stop(RESTART_GRACE_S)
        for instance in sweep(self._home):
            log.warning("event=swept instance=%s reason=left_behind_by_a_killed_program", instance)
        installation = find_installation(self._python)
        models = repository.ensure_repository(self._home)
        self._ports = _choose_ports(self._ports)
        handle = self._new_handle()
        command = [str(installation.binary), *_arguments(handle, installation.tree / "caches", models)]
        self._handle = handle
        try:
            installation.link_backends(handle.backend_folder)
            self._process = _spawn(command, installation.environment() | {"GR_HOME": str(self._home)}, self._home)
            self._handle = handle.with_process(self._process.pid)
            _wait_until_ready(self._process, self._handle, models, timeout_s)
            storage.write_text(record_path(self._home), self._handle.to_json())
        except BaseException:
            self.stop()
            raise
        log.info("event=server_started pid=%d grpc=%s models=%s", self._handle.pid, handle.grpc_address, models)
        return self._handle

    def _new_handle(self) -> ServerHandle:
        return ServerHandle(
            home=self._home,
            pid=0,
            create_time=0.0,
            instance=f"gr-{secrets.token_hex(6)}",
            grpc_address=f"127.0.0.1:{self._ports.grpc}",
            http_address=f"127.0.0.1:{self._ports.http}",
            metrics_address=f"127.0.0.1:{self._ports.metrics}",
            admin_key=self._admin_key,
            owner_pid=os.getpid(),
            owner_create_time=psutil.Process().create_time(),
        )


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
        # Requests kept for use again are as large as the largest ones that came, and never shrink.
        "grpc-infer-allocation-pool-size": 0,
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
    file = home / LOG
    file.parent.mkdir(parents=True, exist_ok=True)
    _rotate(file)
    with file.open("wb") as stream:
        # A session of its own: Ctrl-C in a terminal reaches the caller, which then stops the server in order.
        return subprocess.Popen(
            ["/bin/sh", "-c", f'ulimit -S -s {STACK_KB}; exec "$@"', "sh", *command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=environment,
            start_new_session=True,
        )


def _rotate(file: Path) -> None:
    """Keep the logs of the last starts: after a restart the reason stands in the one before."""
    for number in range(_KEPT_LOGS, 0, -1):
        older = file if number == 1 else file.with_suffix(f".log.{number - 1}")
        if older.exists():
            os.replace(older, file.with_suffix(f".log.{number}"))


def _wait_until_ready(
    process: subprocess.Popen[bytes], handle: ServerHandle, models: tuple[str, ...], timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        if handle.is_ready(models) and _listens(handle.http_address) and _listens(handle.metrics_address):
            return
        time.sleep(0.05)
    what = f"exited with status {process.poll()}" if process.poll() is not None else f"was not ready in {timeout_s:g} s"
    reason = last_useful_line((handle.home / LOG).read_text(encoding="utf-8", errors="replace"))
    raise UserError(f"the model server {what}: {reason or 'it logged no reason'} (see $GR_HOME/{LOG})")


def _listens(address: str) -> bool:
    """Return whether somebody takes connections there: the server opens its other ports after the gRPC one."""
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def _choose_ports(wanted: Ports) -> Ports:
    """Return the ports with a free one for each 0. Raises UserError if a requested one is taken."""
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
        grpc, http, metrics = (listener.getsockname()[1] for listener in sockets)
        return Ports(grpc=grpc, http=http, metrics=metrics)
    finally:
        for listener in sockets:
            listener.close()

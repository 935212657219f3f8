"""A model server that somebody else runs, with this state folder's repository or one of its own.

Invariant: its record is there while the program that watches it runs, so that `deploy` and `gr recommend` find it; the
server itself is neither started nor stopped.
"""

import logging
import os
import secrets
from pathlib import Path
from types import TracebackType

import psutil
import tritonclient.grpc as grpcclient

from gr_platform import storage
from gr_platform.errors import UserError
from serving.handle import ServerHandle, attach, record_path, sweep
from serving.server import LOCK, Ports

log = logging.getLogger(__name__)

_TIMEOUT_S = 10.0


class ExternalServer:
    """The server at an address, on record for a block: `with ExternalServer(home, "10.0.0.7:8001", ...) as handle:`."""

    def __init__(self, home: Path, address: str, ports: Ports, admin_key: str) -> None:
        """`address` is HOST:PORT of its gRPC endpoint; HTTP and metrics are at the same host. Raises UserError."""
        host, colon, port = address.rpartition(":")
        if not colon or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise UserError(f"--attach is {address!r}, must be HOST:PORT of the server's gRPC endpoint")
        self._handle = ServerHandle(
            home=home,
            pid=0,
            create_time=0.0,
            instance=f"external-{secrets.token_hex(6)}",
            grpc_address=address,
            http_address=f"{host}:{ports.http}",
            metrics_address=f"{host}:{ports.metrics}",
            admin_key=admin_key,
            owner_pid=os.getpid(),
            owner_create_time=psutil.Process().create_time(),
            external=True,
        )

    def __enter__(self) -> ServerHandle:
        """Put the server on record. Raises UserError if it does not answer or refuses the key, or another is there."""
        home = self._handle.home
        with storage.exclusive(home, LOCK):
            if (running := attach(home)) and not running.orphaned:
                raise UserError(f"this state folder has a model server already (gRPC at {running.grpc_address})")
            if running:
                running.stop()
            sweep(home)
            self._require_access()
            storage.write_text(record_path(home), self._handle.to_json())
        log.info("event=attached grpc=%s", self._handle.grpc_address)
        return self._handle

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.stop()

    def _require_access(self) -> None:
        try:
            with self._handle.connect() as client:
                client.get_model_repository_index(headers=self._handle.admin_headers, client_timeout=_TIMEOUT_S)
        except grpcclient.InferenceServerException as error:
            if "restricted" in (error.message() or ""):
                raise UserError(
                    "the model server refuses the admin key; set GR_SERVER_ADMIN_KEY to the key it was started with"
                ) from None
            raise UserError(f"no model server answers at {self._handle.grpc_address}") from None

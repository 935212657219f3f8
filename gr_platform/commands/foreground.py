"""The model server in the foreground, watched: what `gr serve` runs and `gr up` starts.

Invariant: however it is told to end (Ctrl-C, SIGTERM), the server is stopped in order and nothing of it is left; one
that it only watches runs on.
"""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gr_platform import settings

if TYPE_CHECKING:
    from serving.handle import ServerHandle
    from serving.server import Ports

Say = Callable[[str], None]


def serve_until_signal(home: Path, ports: "Ports", say: Say) -> None:
    """Start the model server, tell its addresses, and keep it answering. Raises UserError if it does not stay up."""
    from serving.server import EmbeddedServer
    from serving.supervisor import Supervisor

    signal.signal(signal.SIGTERM, _interrupt)
    server = EmbeddedServer(home, ports=ports)
    try:
        with server as handle:
            _introduce(handle, say)
            say("Ctrl-C stops it")
            Supervisor(handle, server).run()
    except KeyboardInterrupt:
        say("stopped")


def watch_until_signal(home: Path, address: str, ports: "Ports", say: Say) -> None:
    """Watch a model server that runs elsewhere; `address` is its gRPC endpoint. Raises UserError if it cannot begin."""
    from serving.external import ExternalServer
    from serving.supervisor import Supervisor

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with ExternalServer(home, address, ports, settings.server_admin_key()) as handle:
            _introduce(handle, say)
            say("Ctrl-C ends the watch, not the server")
            Supervisor(handle, None).run()
    except KeyboardInterrupt:
        say("the server is no longer watched")


def _introduce(handle: "ServerHandle", say: Say) -> None:
    from serving.repository import ensure_repository

    say(f"gRPC     {handle.grpc_address}")
    say(f"HTTP     http://{handle.http_address}")
    say(f"metrics  http://{handle.metrics_address}/metrics")
    say(f"models   {', '.join(ensure_repository(handle.home)) or 'none yet: gr materialize deploys them here'}")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt

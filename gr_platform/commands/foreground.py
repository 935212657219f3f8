"""The model server in the foreground: what `gr serve` runs and `gr up` starts.

Invariant: however it is told to end (Ctrl-C, SIGTERM), the server is stopped in order and nothing of it is left.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gr_platform.errors import UserError

if TYPE_CHECKING:
    from serving.server import Ports

POLL_S = 0.5


def serve_until_signal(home: Path, ports: "Ports", say: Callable[[str], None]) -> None:
    """Start the model server, tell its addresses, and wait. Raises UserError if it fails or ends by itself."""
    from serving.repository import ensure_repository
    from serving.server import EmbeddedServer

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with EmbeddedServer(home, ports=ports) as handle:
            say(f"gRPC     {handle.grpc_address}")
            say(f"HTTP     http://{handle.http_address}")
            say(f"metrics  http://{handle.metrics_address}/metrics")
            say(f"models   {', '.join(ensure_repository(home)) or 'none yet: gr materialize deploys them here'}")
            say("Ctrl-C stops it")
            while handle.alive:
                time.sleep(POLL_S)
            raise UserError("the model server ended by itself; see $GR_HOME/logs/tritonserver.log")
    except KeyboardInterrupt:
        say("stopped")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt

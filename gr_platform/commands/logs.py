"""Where the logs of all libraries go: a file, because the screen is for results.

Invariant: only light modules are imported, since every command begins here.
"""

import logging
import secrets
from pathlib import Path

from gr_platform import run_log


def to_file(home: Path) -> None:
    """Send logs and warnings of all libraries to `home/logs/gr.log`, with an id of this command.

    Raises UserError if that cannot be written.
    """
    run_log.begin_command(secrets.token_hex(4))
    logging.basicConfig(handlers=[run_log.handler(home)], level=logging.INFO, force=True)
    logging.captureWarnings(True)
    # A log that cannot be written (a full disk) must not bury the one sentence under tracebacks.
    logging.raiseExceptions = False
    # torch writes this one past the handlers above: it misses an optional package that no model here uses.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)

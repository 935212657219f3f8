"""Where the logs of all libraries go: a file, because the screen is for results.

Invariant: only light modules are imported, since every command begins here.
"""

import logging
from pathlib import Path

from gr_platform.errors import UserError


def to_file(home: Path) -> None:
    """Send logs and warnings of all libraries to `home/logs/gr.log`. Raises UserError if that cannot be written."""
    folder = home / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / "gr.log", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write to the state folder ({error.strerror}); set GR_HOME to a folder of yours"
        ) from None
    logging.basicConfig(
        handlers=[handler], level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True
    )
    logging.captureWarnings(True)
    # A log that cannot be written (a full disk) must not bury the one sentence under tracebacks.
    logging.raiseExceptions = False
    # torch writes this one past the handlers above: it misses an optional package that no model here uses.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)

"""How the model server was when its supervisor last looked: `serving/health.json`, for `gr status` and alarms.

Invariant: the file is replaced whole, so a reader sees one moment. Times are seconds since the epoch.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gr_platform import storage

log = logging.getLogger(__name__)

FILE = "serving/health.json"
# What was seen so long ago says nothing of now.
STALE_AFTER_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelHealth:
    """One model: its last canary's outcome, when it answered last (0 = never), how long that took, what it said."""

    outcome: str
    answered_at: float
    milliseconds: float
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The server as a whole; reason and acted_at: of what was last done to it.

    state: serving, degraded (a model does not answer), unreachable, restarting, failed (given up).
    """

    state: str
    checked_at: float
    models: Mapping[str, ModelHealth] = field(default_factory=dict)
    num_restarts: int = 0
    num_reloads: int = 0
    reason: str = ""
    acted_at: float = 0.0

    @property
    def stale(self) -> bool:
        """Whether nobody has looked for so long that nobody looks any more."""
        return time.time() - self.checked_at > STALE_AFTER_S


def write(home: Path, health: Health) -> None:
    """Replace the file; a disk that is full is logged, not raised: the server can still be watched."""
    try:
        storage.write_text(home / FILE, json.dumps(asdict(health), indent=1) + "\n")
    except OSError as error:
        log.warning("event=health_not_written reason=%s", error.strerror)


def read(home: Path) -> Health | None:
    """Return what was written last; None if there is nothing, or nothing that can be read."""
    try:
        fields = storage.read_object(home / FILE)
        models = {name: ModelHealth(**each) for name, each in fields.pop("models").items()}
        return Health(models=models, **fields)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def forget(home: Path) -> None:
    """Remove the file: there is no server to speak of."""
    (home / FILE).unlink(missing_ok=True)

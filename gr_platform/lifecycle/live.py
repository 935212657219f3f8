"""Who is in the shadow now, and how many live requests it has scored: asked often, so it costs little.

Invariant: reading only, of the repository that the server loads from and of the served log.
"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr_platform import serving_state, storage

_BUNDLE = "model_repository/gr_ranker_shadow/1/bundle"


@dataclass(frozen=True, slots=True, kw_only=True)
class InTheShadow:
    """A challenger's data set, model digest, and the number of live requests in the served log that it was asked."""

    dataset: str
    digest: str
    num_requests: int


def in_the_shadow(home: Path) -> InTheShadow | None:
    """Return the challenger that is loaded beside the champion, None where there is none. Raises UserError."""
    folder = home / _BUNDLE
    if not (folder / storage.MANIFEST).is_file():
        return None
    facts = storage.read_manifest(folder).facts
    ds, digest = str(facts["declaration"]["name"]), str(facts["model_digest"])
    parts = serving_state.log_parts(serving_state.served_folder(home, ds))
    # The link is new since the shadow is loaded: what it was asked before counts as evidence, not as waiting.
    since = (home / "model_repository").lstat().st_mtime
    asked = sum(_num_asked(part, digest) for part in parts if _written_after(part, since))
    return InTheShadow(dataset=ds, digest=digest, num_requests=asked)


def _written_after(part: Path, since_s: float) -> bool:
    try:
        return part.stat().st_mtime >= since_s
    except FileNotFoundError:
        # The server has just deleted it for room.
        return False


def _num_asked(part: Path, digest: str) -> int:
    try:
        column = pq.ParquetFile(part).read(columns=["shadow_digest"])["shadow_digest"]
    except (OSError, pa.ArrowInvalid, KeyError):
        return 0
    return int(pc.sum(pc.equal(column, digest)).as_py() or 0)

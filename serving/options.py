"""What the operator of a model server sets: `serving.toml` in the state folder, defaults for the rest.

Invariant: an option decides speed, memory and what is kept, never what a score is (`cache_dtype` but for its rounding).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from gr_platform import option_files
from gr_platform.bundle.compute import CacheType, ComputePath
from serving.engine.requests import MAX_CANDIDATES

FILE = "serving.toml"
_CHOICES = {"compute": get_args(ComputePath), "cache_dtype": get_args(CacheType)}
_FROM_ZERO = ("cache_bytes", "num_threads", "log_bytes", "log_seconds", "history_bytes", "max_wait_s")
_FROM_ONE = ("retrieval_depth", "max_batch_size", "max_queue", "max_in_flight")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    """cache_bytes: bound of each model's K/V cache; num_threads: 0 = what the machine has.

    compute: what computes, "auto", "torch" or "onnx" (`Bundle.compute`); cache_dtype: what K/V are kept in, fp16 and
    bf16 on a GPU alone. max_batch_size: users of one step; max_queue: requests in one model, above which more are
    refused; max_wait_s: the same of the time they are expected to take; max_in_flight: the same of recommendations;
    retrieval_depth: items that a recommendation ranks. shadow_share: of recommendations that the challenger scores too,
    0 to 1. log_bytes: of the served log on disk, 0 = none is kept; log_seconds: how long a row may wait to be written.
    history_bytes: of events appended to histories.
    """

    cache_bytes: int = 256 << 20
    num_threads: int = 0
    compute: ComputePath = "auto"
    cache_dtype: CacheType = "fp32"
    max_batch_size: int = 32
    max_queue: int = 256
    max_wait_s: float = 0.5
    max_in_flight: int = 256
    retrieval_depth: int = 50
    shadow_share: float = 0.0
    log_bytes: int = 1 << 30
    log_seconds: float = 60.0
    history_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"ServingOptions.{name} is {getattr(self, name)!r}, must be one of {', '.join(allowed)}"
                )
        for names, least in ((_FROM_ZERO, 0), (_FROM_ONE, 1)):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"ServingOptions.{name} is {getattr(self, name)}, must be at least {least}")
        if self.retrieval_depth > MAX_CANDIDATES:
            raise ValueError(
                f"ServingOptions.retrieval_depth is {self.retrieval_depth}, must be at most {MAX_CANDIDATES}, which is "
                "what can be ranked"
            )
        if not 0.0 <= self.shadow_share <= 1.0:
            raise ValueError(f"ServingOptions.shadow_share is {self.shadow_share}, must be from 0 to 1")


def read(home: Path) -> ServingOptions:
    """Return the options in `serving.toml` of a state folder, or the defaults. Raises UserError naming the option."""
    return option_files.read(home / FILE, ServingOptions)

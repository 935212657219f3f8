"""What encoders take by length: the measurements of `gr bench encoders`, one variant a cell.

Invariant: at full scale each length is measured in a process of its own, whose peak memory is its own.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from gr_platform import settings
from gr_platform.experiments.run import Work
from gr_platform.training import bench_encoders
from gr_platform.training.bench_encoders import Measured, measure

FIGURES = ("train_ms", "infer_ms", "train_mb", "infer_mb")


def encoders(work: Work) -> dict[str, Any]:
    """Return milliseconds and peak MB of a training step and of inference at each length (`train_ms_<length>`).

    options: variant, lengths, batch_tokens, repeats, own_process. Raises RuntimeError if a process fails.
    """
    options = work.cell.options
    variant, size = options["variant"], {name: options[name] for name in ("batch_tokens", "repeats")}
    take = _apart if options["own_process"] else measure
    found = [take(variant, length, **size) for length in options["lengths"]]
    figures: dict[str, Any] = {f"{name}_{one.length}": getattr(one, name) for one in found for name in FIGURES}
    figures["num_parameters"] = found[0].num_parameters
    return {"figures": figures, "curve": [asdict(one) for one in found]}


def _apart(variant: str, length: int, *, batch_tokens: int, repeats: int) -> Measured:
    """Return what `measure` does in a process of its own, which takes the benchmark's own batch and repeats."""
    if (batch_tokens, repeats) != (bench_encoders.BATCH_TOKENS, bench_encoders.REPEATS):
        raise ValueError(f"batch_tokens {batch_tokens} and repeats {repeats} must be the benchmark's own")
    command = [sys.executable, "-m", bench_encoders.__name__, variant, str(length)]
    done = subprocess.run(
        command,
        cwd=settings.PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=bench_encoders.DEADLINE_S,
    )
    if done.returncode:
        raise RuntimeError(f"{variant} at {length} tokens failed: {done.stderr.strip()[-400:]}")
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))

"""What encoders take by length: the measurements of `gr bench encoders`, one variant a cell.

Invariant: at full scale each length is measured in a process of its own, whose peak memory is its own.
"""

from dataclasses import asdict
from typing import Any

from gr_platform.experiments.run import Work
from gr_platform.training.bench_encoders import measure, measure_apart

FIGURES = ("train_ms", "infer_ms", "train_mb", "infer_mb")


def encoders(work: Work) -> dict[str, Any]:
    """Return milliseconds and peak MB of a training step and of inference at each length (`train_ms_<length>`).

    options: variant, lengths; own_process: as the benchmark measures, else here with batch_tokens and repeats. Raises
    RuntimeError if a process fails.
    """
    options = work.cell.options
    variant, lengths = options["variant"], options["lengths"]
    if options["own_process"]:
        found = [measure_apart(variant, length) for length in lengths]
    else:
        size = {name: options[name] for name in ("batch_tokens", "repeats")}
        found = [measure(variant, length, **size) for length in lengths]
    figures: dict[str, Any] = {f"{name}_{one.length}": getattr(one, name) for one in found for name in FIGURES}
    figures["num_parameters"] = found[0].num_parameters
    return {"figures": figures, "curve": [asdict(one) for one in found]}

"""What a judgement measures beside the evaluations: differences by slice, and what scoring costs.

Invariant: both sides are measured in turns in one process, so that whatever else the machine does meets both.
"""

import time
from typing import Any

import numpy as np
import pyarrow as pa

from gr_platform.bundle.compute import most_tokens, page_bytes, pages_for
from gr_platform.bundle.load import Bundle
from gr_platform.bundle.verify import parity
from gr_platform.evaluation.popularity import train_counts
from gr_platform.evaluation.significance import compare_tables
from gr_platform.evaluation.slices import slice_bins
from gr_platform.lifecycle.gates import Cost
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.splits import leave_one_out
from gr_platform.sequences.time_split import TimeSplit

NUM_TURNS = 25
# Where they are apart after that, it may be what else the machine did: so many times as many turns settle it.
PATIENCE, APART = 4, 1.2
NUM_RESAMPLES = 2_000
_WEIGHTS = ("model.safetensors", "item_vectors.safetensors")


def scoring_cost(bundle: Bundle, beside: Bundle | None) -> tuple[Cost, Cost | None]:
    """Return what the golden requests cost with a bundle and, in turns with it, with another one.

    Time: the least of NUM_TURNS, of more where the two are apart. Memory: weights, item vectors and the K/V of one full
    history; counted, not sampled.
    """
    bundles = [bundle] if beside is None else [bundle, beside]
    computes = [each.compute(4 * pages_for(most_tokens(each.config))) for each in bundles]
    best = [float("inf")] * len(bundles)
    for turn in range(NUM_TURNS * (1 + PATIENCE)):
        if turn >= NUM_TURNS and max(best) <= APART * min(best):
            break
        for number, (each, compute) in enumerate(zip(bundles, computes, strict=True)):
            began = time.perf_counter()
            parity(each, compute)
            best[number] = min(best[number], 1e3 * (time.perf_counter() - began))
    costs = [Cost(milliseconds=ms, num_bytes=_bytes(each)) for ms, each in zip(best, bundles, strict=True)]
    return costs[0], costs[1] if beside is not None else None


def _bytes(bundle: Bundle) -> int:
    weights = sum(file.stat().st_size for name in _WEIGHTS if (file := bundle.folder / name).is_file())
    return weights + pages_for(most_tokens(bundle.config)) * page_bytes(bundle.config)


def slice_differences(
    dataset: SequenceDataset, champion: pa.Table, challenger: pa.Table, split: TimeSplit | None
) -> list[dict[str, Any]]:
    """Return a row for each bin of each slice of two ranked tables of the same targets, challenger minus champion.

    Columns: slice, bin, lower, upper (as `slice_table`), num_users, champion and challenger (HR@10), difference and its
    95 % interval low .. high.
    """
    holdout = leave_one_out(dataset, "test") if split is None else split.window(dataset)
    counts = train_counts(dataset, holdout.ends)
    users = champion["user_id"].to_numpy(zero_copy_only=False)
    rows = []
    for slice_name, labels, bins, values in slice_bins(champion, counts):
        for place in np.unique(bins):
            inside = np.flatnonzero(bins == place)
            found = compare_tables(champion.take(inside), challenger.take(inside), num_resamples=NUM_RESAMPLES)
            line = next(each for each in found if each.figure == "hr_at_10")
            row: dict[str, Any] = {"slice": slice_name, "bin": labels[place]}
            row |= {"lower": float(values[inside].min()), "upper": float(values[inside].max())}
            row |= {"num_users": len(np.unique(users[inside]))}
            row |= {"champion": line.a, "challenger": line.b, "difference": line.difference}
            rows.append(row | {"low": line.low, "high": line.high})
    return rows

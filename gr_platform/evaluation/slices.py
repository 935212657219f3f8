"""For whom a retrieval model works: quality by length of the history, popularity of the item and age of the user.

Invariant: the bins of a slice hold every target once, so their figures, weighted by targets, average to the whole's.
"""

import numpy as np
import pyarrow as pa

from gr_platform.evaluation.metrics import gains

NUM_BINS = 5
FIGURES = ("hr_at_10", "ndcg_at_10")
# Slice -> what `lower` and `upper` of its bins count.
SLICES = {"history_length": "events known", "item_popularity": "events of the item", "user_age": "days known"}
# An item is of the head while more popular ones hold less than this share of all training exposures, then the torso.
SHARES = {"head": 0.5, "torso": 0.8, "tail": 1.0}
SCHEMA = pa.schema(
    [("slice", pa.string()), ("bin", pa.string()), ("lower", pa.float64()), ("upper", pa.float64())]
    + [("num_users", pa.int64())]
    + [(name, pa.float64()) for figure in FIGURES for name in (figure, f"{figure}_error")]
)


def slice_table(table: pa.Table, counts: np.ndarray) -> pa.Table:
    """Return a row for each bin of each of SLICES of a ranked table (tables.py), lowest values or head first.

    counts: training exposures of each vocabulary row, int64 [num_rows], of what the judged model may know.
    Columns: slice, bin, lower and upper (smallest and largest value inside, in the units of SLICES), num_users
    (targets), hr_at_10, ndcg_at_10 and their standard errors `<figure>_error` (None for a single target). Bins without
    a target are left out.
    """
    values = {figure: gains(table["rank"].to_numpy(), figure) for figure in FIGURES}
    rows = []
    for slice_name, labels, bins, of in slice_bins(table, counts):
        for place in np.unique(bins):
            inside = bins == place
            row = {"slice": slice_name, "bin": labels[place], "lower": of[inside].min(), "upper": of[inside].max()}
            rows.append(row | {"num_users": int(inside.sum())} | _figures(values, inside))
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def slice_bins(table: pa.Table, counts: np.ndarray) -> list[tuple[str, list[str], np.ndarray, np.ndarray]]:
    """Return of each of SLICES the labels of its bins, the bin of each target, int64 [T], and its value in the units.

    table and counts: as of `slice_table`.
    """
    known, age, items = (table[name].to_numpy() for name in ("known", "age_days", "item"))
    names = [f"{number + 1} of {NUM_BINS}" for number in range(NUM_BINS)]
    return [
        ("history_length", names, _quantile_bins(known), known),
        ("item_popularity", list(SHARES), popularity_bins(counts)[items], counts[items]),
        ("user_age", names, _quantile_bins(age), age),
    ]


def popularity_bins(counts: np.ndarray) -> np.ndarray:
    """Return the place in SHARES of each item by its training exposures, int64 [num_rows]; equal counts share one."""
    descending = np.sort(counts)[::-1]
    before = np.concatenate([np.zeros(1), np.cumsum(descending)])
    more_popular = before[np.searchsorted(-descending, -counts, side="left")] / max(1, counts.sum())
    return np.searchsorted(list(SHARES.values())[:-1], more_popular, side="right")


def _quantile_bins(values: np.ndarray) -> np.ndarray:
    """Return bins 0..NUM_BINS-1 of about equally many values; equal values share one."""
    if not len(values):
        return np.zeros(0, np.int64)
    edges = np.quantile(values, np.arange(1, NUM_BINS) / NUM_BINS)
    return np.searchsorted(edges, values, side="left")


def _figures(values: dict[str, np.ndarray], inside: np.ndarray) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    for name, all_values in values.items():
        mine = all_values[inside]
        figures[name] = float(mine.mean())
        figures[f"{name}_error"] = float(mine.std(ddof=1) / np.sqrt(len(mine))) if len(mine) > 1 else None
    return figures

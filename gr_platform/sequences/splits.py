"""Leave-one-out: which exposures of a user are trained on, validated on and tested on; and the check that none leaks.

Invariant: the history of a target is every exposure before it in the total order, so a target is never part of its own
history, even where times are equal.

Legend: U users, n a user's exposures.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from gr_platform.sequences.dataset import SequenceDataset

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")
MIN_LENGTH = 3
_FROM_END = {"validation": 2, "test": 1}


def train_ends(lengths: np.ndarray) -> np.ndarray:
    """Return how many exposures of each user are trained on, int64 [U]: all but two; all of fewer than 3."""
    n = np.asarray(lengths, np.int64)
    return np.where(n >= MIN_LENGTH, n - 2, n)


def target_positions(lengths: np.ndarray, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return the user rows that have a target in `split` and its position in their sequence, int64 [users with one].

    test: the last exposure; validation: the one before it. Users with fewer than 3 exposures have neither.
    """
    n = np.asarray(lengths, np.int64)
    rows = np.flatnonzero(n >= MIN_LENGTH)
    return rows, n[rows] - _FROM_END[split]


def describe_targets(dataset: "SequenceDataset") -> dict[str, dict[str, int]]:
    """Return for each split its number of targets, of ties (same time as the exposure before: source order decides) and
    of repeats (the item stands in the history too, so it cannot be recommended where seen items are excluded)."""
    figures: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        rows, positions = target_positions(dataset.lengths, split)
        target, before = dataset.at(rows, positions), dataset.at(rows, positions - 1)
        asked = np.full(dataset.num_users, -1, np.int64)
        ends = np.zeros(dataset.num_users, np.int64)
        asked[rows], ends[rows] = target.items, positions
        repeats = 0
        for users, history in dataset.blocks(ends=ends):
            owner = history.owner
            repeats += len(np.unique(owner[history.items == asked[users][owner]]))
        ties = int((target.times == before.times).sum())
        figures[str(split)] = {"targets": len(rows), "ties": ties, "repeats": repeats}
    return figures


def check_no_leak(dataset: "SequenceDataset", *, ends: np.ndarray | None = None) -> list[str]:
    """Return one sentence for each way in which a target could be known before it is asked for; [] if there is none.

    ends: how many exposures of each user training reads, int64 [U], where that is not `train_ends`. Looks at the split
    (no target is trained on) and at the sequences (times never decrease, no exposure stands twice).
    """
    trained = train_ends(dataset.lengths) if ends is None else np.asarray(ends, np.int64)
    problems = []
    for split in SPLITS:
        rows, positions = target_positions(dataset.lengths, split)
        if bad := int((trained[rows] > positions).sum()):
            problems.append(f"{bad} users' {split} targets are among their training exposures")
    older = twice = 0
    for _, block in dataset.blocks():
        owner = block.owner
        older += int(((owner[1:] == owner[:-1]) & (block.times[1:] < block.times[:-1])).sum())
        order = np.lexsort((block.times, block.items, owner))
        owner, items, times = owner[order], block.items[order], block.times[order]
        twice += int(((owner[1:] == owner[:-1]) & (items[1:] == items[:-1]) & (times[1:] == times[:-1])).sum())
    if older:
        problems.append(
            f"{older} exposures are older than the one before them, so histories hold events after the target"
        )
    if twice:
        problems.append(f"{twice} exposures stand twice, so a target may be part of its own history")
    return problems

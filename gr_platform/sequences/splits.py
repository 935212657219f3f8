"""Which exposures of a user are trained on and which are asked for: leave-one-out or by time; and that none leaks.

Invariant: what is known at a target is a beginning of its user's sequence that ends before the target. Leave-one-out:
every exposure before it in the total order, even where times are equal. By time: every exposure strictly before the
cut, so nothing that was logged at the cut or later is known to a model or to a baseline; or, as a server knows it that
goes on while the model stays, every exposure strictly before the target's own time.

Legend: U users, T targets, n a user's exposures.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import numpy as np

from gr_platform.errors import UserError

if TYPE_CHECKING:
    from gr_platform.sequences.dataset import Jagged, SequenceDataset
    from gr_platform.sequences.k_core import CoreMask

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")
MIN_LENGTH = 3
_FROM_END = {"validation": 2, "test": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What is asked for, int64 [T] each: the dataset row, the target's position in that user's sequence, and how many
    of the user's first exposures are known when it is asked (`known` <= `positions`)."""

    rows: np.ndarray
    positions: np.ndarray
    known: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: np.ndarray | slice) -> "Targets":
        """Return the chosen targets: a mask, indices or a slice."""
        return Targets(rows=self.rows[chosen], positions=self.positions[chosen], known=self.known[chosen])


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdout:
    """ends: how many exposures of each user are trained on, int64 [U]; targets: what is held out, ascending by row.

    window: [cut, end) in ms UTC where the split is by time, None for leave-one-out. online: whether histories go on in
    the window, up to each target.
    """

    name: str
    ends: np.ndarray
    targets: Targets
    window: tuple[int, int] | None = None
    online: bool = False


def train_ends(lengths: np.ndarray, *, refit: bool = False) -> np.ndarray:
    """Return how many exposures of each user leave-one-out trains on, int64 [U]: all but two; all of fewer than 3.

    refit: all but one, since only the test target is still held out.
    """
    n = np.asarray(lengths, np.int64)
    return np.where(n >= MIN_LENGTH, n - _FROM_END["test" if refit else "validation"], n)


def target_positions(lengths: np.ndarray, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return the user rows that have a target in `split` and its position in their sequence, int64 [users with one].

    test: the last exposure; validation: the one before it. Users with fewer than 3 exposures have neither.
    """
    n = np.asarray(lengths, np.int64)
    rows = np.flatnonzero(n >= MIN_LENGTH)
    return rows, n[rows] - _FROM_END[split]


def leave_one_out(dataset: "SequenceDataset", split: Split, *, refit: bool = False) -> Holdout:
    """Return the holdout of `train_ends` and `target_positions`; every exposure before a target is known.

    refit: what is trained on reaches up to the test target, the paper's training part, as after the number of epochs
    was chosen on validation. Raises ValueError for the refit validation split, whose targets are then trained on.
    """
    if refit and split != "test":
        raise ValueError(f"split is {split!r}, must be 'test' after a refit: validation targets are trained on")
    rows, positions = target_positions(dataset.lengths, split)
    targets = Targets(rows=rows, positions=positions, known=positions)
    return Holdout(name=split, ends=train_ends(dataset.lengths, refit=refit), targets=targets)


def is_refit(dataset: "SequenceDataset", trained: np.ndarray) -> bool:
    """Return whether training on each user's first `trained` exposures, int64 [U], saw a validation target.

    Then the model may be asked for the test targets alone. Raises UserError if it saw one of those too.
    """
    if num_leaks := int((trained > train_ends(dataset.lengths, refit=True)).sum()):
        raise UserError(
            f"the model was trained on the test targets of {num_leaks} users of {dataset.declaration.name}, so its "
            "figures would say nothing; train it again"
        )
    return bool((trained > train_ends(dataset.lengths)).any())


def by_time(
    dataset: "SequenceDataset",
    cut: int,
    end: int | None = None,
    *,
    targets: Literal["first", "all", "online"] = "first",
) -> Holdout:
    """Return the holdout of a window [cut, end) in ms UTC; without `end` it reaches past the newest exposure.

    Trained on and known: the exposures strictly before the cut. Targets: each user's first exposure in the window, or
    all of them, every one asked with what was known at the cut; "online": all of them, each asked with what is strictly
    older than itself. A user without history has targets too.
    Raises ValueError unless cut < end.
    """
    end = max(newest_time(dataset), cut) + 1 if end is None else end
    if cut >= end:
        raise ValueError(f"the window must have cut < end, got cut {cut} and end {end}")
    before, held = np.zeros(dataset.num_users, np.int64), np.zeros(dataset.num_users, np.int64)
    for rows, block in dataset.blocks():
        before[rows] = _count(block, block.times < cut)
        held[rows] = _count(block, block.times < end) - before[rows]
    if targets == "first":
        held = np.minimum(held, 1)
    rows = np.repeat(np.arange(dataset.num_users), held)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(held) - held, held)
    positions, known = before[rows] + place, before[rows]
    if targets == "online":
        times = dataset.at(rows, positions).times
        # Where the run of targets of one user and one time begins: its first one and those after it know as much.
        same = np.concatenate([[False], (rows[1:] == rows[:-1]) & (times[1:] == times[:-1])]) if len(rows) else rows
        known = positions - (np.arange(len(rows)) - np.maximum.accumulate(np.where(same, 0, np.arange(len(rows)))))
    asked = Targets(rows=rows, positions=positions, known=known)
    return Holdout(name="window", ends=before, targets=asked, window=(cut, end), online=targets == "online")


def last_cut(dataset: "SequenceDataset", span: timedelta) -> int:
    """Return the cut in ms UTC that leaves the last `span` of the log, its newest exposure included, to the window.

    Raises UserError if no exposure is older than that.
    """
    cut = newest_time(dataset) + 1 - round(span / timedelta(milliseconds=1))
    rows = np.flatnonzero(dataset.lengths > 0)
    if not len(rows) or int(dataset.at(rows, np.zeros_like(rows)).times.min()) >= cut:
        raise UserError(
            f"no exposure of {dataset.declaration.name} is older than its last {span}, so there would be nothing to "
            "train on; hold out a shorter time or import a longer log"
        )
    return cut


def newest_time(dataset: "SequenceDataset", ends: np.ndarray | None = None) -> int:
    """Return the time of the newest of each user's first `ends` exposures (default all), ms UTC; -1 if none."""
    return max((int(block.times.max(initial=-1)) for _, block in dataset.blocks(ends=ends)), default=-1)


def require_trained_before(dataset: "SequenceDataset", ends: np.ndarray, start: int) -> int:
    """Return max(train event_ts) in ms UTC, that of each user's first `ends` exposures.

    Raises RuntimeError unless it is before `start`, the beginning of the window that the model is judged on.
    """
    newest = newest_time(dataset, ends)
    if newest >= start:
        raise RuntimeError(
            f"training exposures reach {newest} ms, the window they are judged on starts at {start} ms: "
            "max(train event_ts) must be before it"
        )
    return newest


def describe_holdout(dataset: "SequenceDataset", holdout: Holdout, core: "CoreMask | None" = None) -> dict[str, int]:
    """Return the number of targets, of ties (same time as the last known exposure: source order decides) and of repeats
    (the item is known, so it cannot be recommended where seen items are excluded).

    By time also `cold` (nothing is known); with `core` also `outside_core`.
    """
    asked = holdout.targets
    items = dataset.at(asked.rows, asked.positions).items
    keys = asked.rows * dataset.vocabulary.num_rows + items
    known = np.zeros(dataset.num_users, np.int64)
    known[asked.rows] = asked.known
    repeats = 0
    for rows, history in dataset.blocks(ends=known):
        mine = slice(*np.searchsorted(asked.rows, [rows[0], rows[-1] + 1]))
        seen = rows[history.owner] * dataset.vocabulary.num_rows + history.items
        repeats += int(np.isin(keys[mine], seen).sum())
    warm = asked[asked.known > 0]
    times = dataset.at(warm.rows, warm.positions).times
    ties = int((times == dataset.at(warm.rows, warm.known - 1).times).sum())
    figures = {"targets": len(asked), "ties": ties, "repeats": repeats}
    if holdout.window is not None:
        figures["cold"] = len(asked) - len(warm)
    if core is not None:
        figures["outside_core"] = int((~core.holds(asked.rows, items)).sum())
    return figures


def describe_targets(dataset: "SequenceDataset", core: "CoreMask | None" = None) -> dict[str, dict[str, int]]:
    """Return `describe_holdout` of both splits of leave-one-out."""
    return {str(split): describe_holdout(dataset, leave_one_out(dataset, split), core) for split in SPLITS}


def check_no_leak(
    dataset: "SequenceDataset", *, ends: np.ndarray | None = None, holdout: Holdout | None = None
) -> list[str]:
    """Return one sentence for each way in which a target could be known before it is asked for; [] if there is none.

    holdout: the split that is judged on, else both of leave-one-out (for a refit only the test split is sound). ends:
    how many exposures of each user training reads, int64 [U], where that is not the split's. Looks at the split (no
    target is trained on or known, nothing at or after the cut is) and at the sequences (times never decrease, no
    exposure stands twice).
    """
    holdouts = [leave_one_out(dataset, split) for split in SPLITS] if holdout is None else [holdout]
    trained = holdouts[0].ends if ends is None else np.asarray(ends, np.int64)
    problems = []
    if bad := int((trained > dataset.lengths).sum()):
        problems.append(f"{bad} users have more training exposures than exposures")
        trained = np.minimum(trained, dataset.lengths)
    for each in holdouts:
        problems += _split_leaks(dataset, trained, each)
    return problems + _sequence_leaks(dataset)


def _split_leaks(dataset: "SequenceDataset", trained: np.ndarray, holdout: Holdout) -> list[str]:
    asked, name = holdout.targets, holdout.name
    found = [
        (len(np.unique(asked.rows[trained[asked.rows] > asked.positions])),
         f"users' {name} targets are among their training exposures"),
        (int((asked.known > asked.positions).sum()), f"{name} targets are part of their own history"),
    ]  # fmt: skip
    if holdout.window is not None:
        cut, end = holdout.window
        known = np.zeros(dataset.num_users, np.int64)
        # A user may have several targets: the one that knows most counts.
        np.maximum.at(known, asked.rows, np.minimum(asked.known, dataset.lengths[asked.rows]))
        times = dataset.at(asked.rows, asked.positions).times
        found += [
            (_num_from(dataset, trained, cut), "training exposures are not before the cut"),
            (_num_too_new(dataset, holdout, known), f"exposures of histories are not before the {_limit(holdout)}"),
            (int(((times < cut) | (times >= end)).sum()), f"{name} targets are outside the window"),
        ]
    return [f"{number} {what}" for number, what in found if number]


def _sequence_leaks(dataset: "SequenceDataset") -> list[str]:
    older = twice = 0
    for _, block in dataset.blocks():
        owner = block.owner
        older += int(((owner[1:] == owner[:-1]) & (block.times[1:] < block.times[:-1])).sum())
        order = np.lexsort((block.times, block.items, owner))
        owner, items, times = owner[order], block.items[order], block.times[order]
        twice += int(((owner[1:] == owner[:-1]) & (items[1:] == items[:-1]) & (times[1:] == times[:-1])).sum())
    found = [
        (older, "exposures are older than the one before them, so histories hold events after the target"),
        (twice, "exposures stand twice, so a target may be part of its own history"),
    ]
    return [f"{number} {what}" for number, what in found if number]


def _num_from(dataset: "SequenceDataset", ends: np.ndarray, cut: int) -> int:
    """Return how many of each user's first `ends` exposures together are at or after the cut."""
    return sum(int(np.count_nonzero(block.times >= cut)) for _, block in dataset.blocks(ends=ends))


def _limit(holdout: Holdout) -> str:
    return "target" if holdout.online else "cut"


def _num_too_new(dataset: "SequenceDataset", holdout: Holdout, known: np.ndarray) -> int:
    """Return how many exposures of histories are not strictly older than they must be; known: the most a user's has."""
    if not holdout.online:
        return _num_from(dataset, known, holdout.window[0] if holdout.window else 0)
    asked = holdout.targets[(holdout.targets.known > 0) & (holdout.targets.known <= holdout.targets.positions)]
    newest = dataset.at(asked.rows, asked.known - 1).times
    return int(np.count_nonzero(newest >= dataset.at(asked.rows, asked.positions).times))


def _count(block: "Jagged", chosen: np.ndarray) -> np.ndarray:
    """Return how many exposures of each user of a block are chosen (bool [its exposures]), int64 [its users]."""
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(chosen)])
    return np.diff(total[block.offsets])

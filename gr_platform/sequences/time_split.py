"""Where the end of a log is cut for a scheduled training: what it learns from, chooses by and is judged on.

Invariant: what is judged on came after everything that was trained on, and what the number of epochs is chosen by
came before that and after everything that was trained on while it was chosen.
"""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gr_platform.errors import UserError
from gr_platform.sequences.splits import Holdout, by_time, newest_time
from gr_platform.training.seeds import generator

if TYPE_CHECKING:
    from gr_platform.sequences.dataset import SequenceDataset

DAY_MS = 86_400_000
# Of a window with more, so many of a sample of its users are asked: a judgement ends in minutes whatever the log.
MAX_TARGETS = 20_000
MAX_VALIDATION_TARGETS = 5_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSplit:
    """Times in ms UTC. Trained on: before `cut`; judged on: [cut, end). While the number of epochs is chosen: trained
    on before `validation_cut`, judged on [validation_cut, cut)."""

    validation_cut: int
    cut: int
    end: int

    def __post_init__(self) -> None:
        if not self.validation_cut < self.cut < self.end:
            raise ValueError(
                f"the cuts must ascend, got {self.validation_cut}, {self.cut} and {self.end}: validation, test, end"
            )

    def to_json(self) -> dict[str, int]:
        """Return the fields as JSON has them."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any] | None) -> "TimeSplit | None":
        """Return what `to_json` gave; None of None."""
        return None if fields is None else TimeSplit(**fields)

    def window(self, dataset: "SequenceDataset") -> Holdout:
        """Return the holdout that models are judged on: every exposure in the window, asked as a server would be that
        serves this model on that day; of more than MAX_TARGETS those of a sample of users."""
        return _sampled(by_time(dataset, self.cut, self.end, targets="online"), MAX_TARGETS)

    def validation(self, dataset: "SequenceDataset") -> Holdout:
        """Return the holdout that the number of epochs is chosen on."""
        return _sampled(by_time(dataset, self.validation_cut, self.cut, targets="online"), MAX_VALIDATION_TARGETS)


def newest_split(dataset: "SequenceDataset", *, days: int = 1, min_users: int = 100) -> TimeSplit:
    """Return the split whose window is the newest `days` whole UTC days, and whose validation the days before.

    Either is widened, twice as many days at a time, until at least `min_users` users have something in it. Raises
    UserError if the log is too short for that.
    """
    newest = newest_time(dataset)
    end = (newest // DAY_MS + 1) * DAY_MS
    cut = _widened(dataset, end, days, min_users)
    return TimeSplit(validation_cut=_widened(dataset, cut, days, min_users), cut=cut, end=end)


def _sampled(holdout: Holdout, max_targets: int) -> Holdout:
    """Return the holdout with whole users drawn, always the same ones, until they have about `max_targets` targets."""
    rows = holdout.targets.rows
    if len(rows) <= max_targets:
        return holdout
    users, counts = np.unique(rows, return_counts=True)
    order = generator(0, "sample").permutation(len(users))
    chosen = users[order[: np.searchsorted(np.cumsum(counts[order]), max_targets) + 1]]
    return replace(holdout, targets=holdout.targets[np.isin(rows, chosen)])


def _widened(dataset: "SequenceDataset", end: int, days: int, min_users: int) -> int:
    """Return the beginning of the window before `end`."""
    while True:
        cut = end - days * DAY_MS
        active, older = 0, False
        for _, block in dataset.blocks():
            inside = (block.times >= cut) & (block.times < end)
            active += len(np.unique(block.owner[inside]))
            older = older or bool((block.times < cut).any())
        if not older:
            raise UserError(
                f"the log of {dataset.declaration.name} is too short to hold out its end: no {min_users} users have "
                "events in its newest days and others before; import a longer log"
            )
        if active >= min_users:
            return cut
        days *= 2

"""How many candidates go through the model at once: a table measured while the model warms up.

Invariant: the table decides speed alone; a score does not depend on the microbatch it was computed in.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from gr_platform.bundle.compute import TUNING_CALLS, least_seconds

SIZES = (64, 128, 256, 512, 1024)
# Of sizes that are as fast as the best but for this share the smallest is taken: a step ends sooner.
SLACK = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatches:
    """sizes: for histories of up to so many tokens, ascending, the number of candidates of a step."""

    sizes: tuple[tuple[int, int], ...]

    def size(self, num_past: int) -> int:
        """Return how many candidates a step takes beside histories of up to `num_past` tokens."""
        for limit, size in self.sizes:
            if num_past <= limit:
                return size
        return self.sizes[-1][1]

    @staticmethod
    def fixed(size: int) -> "Microbatches":
        """Return a table of one size."""
        return Microbatches(sizes=((0, size),))

    @staticmethod
    def measured(score: Callable[[int, int], object], lengths: Iterable[int]) -> "Microbatches":
        """Return the table with which `score(num_candidates, num_past)` takes least time, for each length of a past."""
        found = []
        for num_past in lengths:
            seconds = {
                size: least_seconds(partial(score, size, num_past), num_calls=TUNING_CALLS) / size for size in SIZES
            }
            enough = min(seconds.values()) * (1 + SLACK)
            found.append((num_past, next(size for size in SIZES if seconds[size] <= enough)))
        return Microbatches(sizes=tuple(found))

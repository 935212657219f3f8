"""How many candidates go through the model at once: a table measured while the model warms up.

Invariant: the table decides speed alone; a score does not depend on the microbatch it was computed in.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

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
            seconds = {size: _seconds(score, size, num_past) / size for size in SIZES}
            enough = min(seconds.values()) * (1 + SLACK)
            found.append((num_past, next(size for size in SIZES if seconds[size] <= enough)))
        return Microbatches(sizes=tuple(found))


def _seconds(score: Callable[[int, int], object], num_candidates: int, num_past: int) -> float:
    """Return the least time of two calls, after one that pays for what is made once."""
    score(num_candidates, num_past)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        score(num_candidates, num_past)
        seconds.append(time.perf_counter() - began)
    return min(seconds)

"""Which users' candidates a graph scores in one call: those so close in size that padding costs less than calls.

Invariant: every ask with candidates is in one group; which group decides speed, never a score.

Legend: B users of a group, C the most candidates and P the most past tokens of one of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gr_platform.bundle.compute import Ask
from gr_platform.models.config import ModelConfig

# A call costs about as much as so many pairs of a candidate and a past token: it is worth some padding.
CALL_PAIRS = 4096
# K/V and weights of attention of a group. What is more falls out of the caches: at 8 MB a user a group of 8 takes 1.1
# to 1.6 times as long as 8 calls, at .5 MB half to two thirds (4 and 16 candidates, AMD EPYC, one thread).
GROUP_BYTES = 6 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Asks by their place in the step, and how large the largest of them are; num_pairs: what they need unpadded."""

    places: tuple[int, ...] = ()
    num_candidates: int = 0
    num_past: int = 0
    num_pairs: int = 0

    def with_ask(self, place: int, ask: Ask) -> "Group":
        """Return the group with one more ask."""
        return Group(
            places=(*self.places, place),
            num_candidates=max(self.num_candidates, len(ask.candidates)),
            num_past=max(self.num_past, ask.past),
            num_pairs=self.num_pairs + len(ask.candidates) * ask.past,
        )

    def is_worth_it(self, config: ModelConfig) -> bool:
        """Return whether one call is faster than one for each ask."""
        num_users = len(self.places)
        token_bytes = 4 * config.num_layers * config.num_heads * (config.qk_dim + config.v_dim)
        own_bytes = self.num_past * (token_bytes + 4 * config.num_heads * self.num_candidates)
        padding = num_users * self.num_candidates * self.num_past - self.num_pairs
        return num_users * own_bytes <= GROUP_BYTES and padding <= CALL_PAIRS * (num_users - 1)


def groups(asks: Sequence[Ask], config: ModelConfig) -> Iterator[Group]:
    """Yield the asks that have candidates in groups of similar sizes."""
    group = Group()
    for place in sorted(range(len(asks)), key=lambda place: (len(asks[place].candidates), asks[place].past)):
        if not len(asks[place].candidates):
            continue
        larger = group.with_ask(place, asks[place])
        if group.places and not larger.is_worth_it(config):
            yield group
            larger = Group().with_ask(place, asks[place])
        group = larger
    if group.places:
        yield group

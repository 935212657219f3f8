"""How long a request has lately taken, by which the engine knows what it cannot answer in time.

Invariant: one step that took long, a hiccup of the machine, hardly moves it.
"""

from dataclasses import dataclass

PACE_WEIGHT, PACE_MOST = 0.1, 4.0


@dataclass(slots=True)
class Pace:
    """How long the engine has lately worked for a request: a running mean that one hiccup hardly moves."""

    seconds_a_job: float = 0.0
    _unshared: float = 0.0

    def add(self, seconds: float, num_ended: int) -> None:
        """Take in a step's time and how many requests ended with it; if none did, the next ones bear it."""
        self._unshared += seconds
        if num_ended:
            each, self._unshared = self._unshared / num_ended, 0.0
            usual = self.seconds_a_job or each
            self.seconds_a_job = usual + PACE_WEIGHT * (min(each, PACE_MOST * usual) - usual)

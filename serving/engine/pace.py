"""What work costs here, measured as it is done, and so how long one more request would wait.

Invariant: one step that took long, a hiccup of the machine, hardly moves it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from serving.engine.jobs import Job
from serving.engine.scheduler import OLDEST_SHARE

# Of what is known, kept with each step; and how many times what is usual one step may count.
KEPT, MOST = 0.95, 4.0


@dataclass(slots=True)
class Ratio:
    """How much a unit of something costs of late: the ratio of two sums that forget."""

    _cost: float = 0.0
    _amount: float = 0.0

    def add(self, cost: float, amount: float) -> None:
        """Take in that `amount` cost so much; without an amount it says nothing."""
        if amount > 0:
            if self._cost:
                cost = min(cost, MOST * self.value * amount)
            self._cost, self._amount = KEPT * self._cost + cost, KEPT * self._amount + amount

    @property
    def value(self) -> float:
        """The cost of one; 0 before anything is known."""
        return self._cost / self._amount if self._amount else 0.0


@dataclass(slots=True)
class Pace:
    """Seconds of one new token, of one answer and of one request beside them; share of a history not in the cache."""

    token: Ratio = field(default_factory=Ratio)
    answer: Ratio = field(default_factory=Ratio)
    request: Ratio = field(default_factory=Ratio)
    missed: Ratio = field(default_factory=Ratio)

    def work_s(self, job: Job) -> float:
        """Return the seconds that are left to do for a job; one without pages may find its history in the cache."""
        num_tokens = job.tokens_left if job.lease is not None else job.tokens_left * self.missed.value
        return self.request.value + self.token.value * num_tokens + self.answer.value * job.answers_left

    def wait_s(self, job: Job, others: Iterable[Job]) -> float:
        """Return the seconds that a job is expected to wait for those of `others` that are as urgent.

        A longer one counts by what it may take from this one's steps, so a short request is not refused for it.
        """
        most = OLDEST_SHARE * self.work_s(job)
        own = job.terms.priority
        return sum(
            self.work_s(other) if other.terms.priority < own else min(self.work_s(other), most)
            for other in others
            if other.terms.priority <= own
        )

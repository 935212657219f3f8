"""Who gets how much of a step: short requests first, and always something for the one that waits longest.

Invariant: every step moves the oldest job on, so nobody starves; the rest of its budget goes to priorities, then to the
jobs with least left, so a short request passes one of 10,000 candidates.
"""

from collections.abc import Callable, Sequence

from serving.engine.jobs import Job

# The share of a step that is the oldest job's, one in this many.
OLDEST_SHARE = 4


def share(
    jobs: Sequence[Job], left: Callable[[Job], int], budget: int, most_jobs: int = 1 << 30
) -> list[tuple[Job, int]]:
    """Return (job, how much of it) with a sum of at most `budget`; jobs in order of arrival, each with something left.

    At most `most_jobs` of them; where that is one, it is the oldest.

    left: how much of a job there is to do, in the unit of the budget (tokens, candidates).
    """
    if not jobs:
        return []
    oldest = jobs[0]
    shares = {id(oldest): min(left(oldest), max(1, budget // OLDEST_SHARE))}
    rest = budget - shares[id(oldest)]
    for job in sorted(jobs, key=lambda job: (job.terms.priority, left(job))):
        if len(shares) >= most_jobs and id(job) not in shares:
            continue
        taken = shares.get(id(job), 0)
        more = min(left(job) - taken, rest)
        if more > 0:
            shares[id(job)] = taken + more
            rest -= more
    return [(job, shares[id(job)]) for job in jobs if id(job) in shares]

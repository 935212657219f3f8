"""When a model is to be loaded again: what a row of canaries says, and what it does not.

Invariant: a slow model is not a dead one. Only the server's own word that a process died counts at once; canaries that
go unanswered count when, for as long as `stalled_s`, the model finished no work for anybody else either.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serving.canary import Check, Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How patient the supervisor is. Times in seconds; reloads and restarts are counted within `window_s`.

    canary_s, live_s: deadlines of a canary, and of the question whether the server lives. num_failed: canaries in a row
    that end in an error of the model, or find it not loaded. num_missed, stalled_s: canaries in a row without an
    answer, and for how long no work was done; blind_s: the same where no metrics tell of work. A model that needed
    max_reloads has the server restarted, a server that needed max_restarts is given up. Between restarts the pause
    doubles from backoff_s to max_backoff_s.
    """

    interval_s: float = 1.0
    canary_s: float = 2.0
    live_s: float = 2.0
    num_failed: int = 3
    num_missed: int = 5
    stalled_s: float = 20.0
    blind_s: float = 120.0
    load_s: float = 120.0
    max_reloads: int = 3
    max_restarts: int = 8
    window_s: float = 600.0
    backoff_s: float = 1.0
    max_backoff_s: float = 30.0


class ModelWatch:
    """The canaries of one model since it last answered."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.forget()

    def forget(self) -> None:
        """Begin anew: the model was loaded again."""
        self._num_unanswered = 0
        self._num_other = 0
        self._done: float | None = None
        self._still_since = 0.0

    def judge(
        self, found: Check, wanted: Mapping[str, str] | None, now: float, work: Callable[[], float | None]
    ) -> str | None:
        """Return why the model must be loaded again, or None if it may be left alone.

        wanted: the parameters it should be served with (None: any). now: a clock in seconds. work: `canary.work_done`.
        """
        if found.outcome is Outcome.ANSWERS:
            other = wanted is not None and found.parameters != wanted
            num_other = self._num_other + 1 if other else 0
            self.forget()
            self._num_other = num_other
            # Not at once: a deployment may be at this model.
            return "other_model_than_the_repository" if num_other >= self._policy.num_failed else None
        self._num_unanswered += 1
        if found.outcome is Outcome.DEAD:
            return "stub_died"
        if found.outcome is Outcome.LATE:
            return self._stalled(now, work())
        enough = self._num_unanswered >= self._policy.num_failed
        return ("not_loaded" if found.outcome is Outcome.ABSENT else "internal_errors") if enough else None

    def _stalled(self, now: float, done: float | None) -> str | None:
        if self._num_unanswered == 1 or done != self._done:
            self._still_since, self._done = now, done
        patience = self._policy.blind_s if done is None else self._policy.stalled_s
        enough = self._num_unanswered >= self._policy.num_missed and now - self._still_since >= patience
        return "stalled" if enough else None

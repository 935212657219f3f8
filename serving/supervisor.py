"""Keeps a model server answering: looks at every model each second, loads a dead one again, restarts a dead server.

Invariant: it acts only while nobody else changes the server's models (one lock), and never for ever: what needed too
many reloads is restarted, what needed too many restarts ends in one error. An external server is never stopped.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import tritonclient.grpc as grpcclient

from gr_platform import storage
from gr_platform.errors import UserError, sentence_for
from serving import canary, health, repository, swap, verification
from serving.canary import Check, Outcome
from serving.handle import LOG, ServerHandle
from serving.health import Health, ModelHealth
from serving.server import LOCK, RESTART_GRACE_S, EmbeddedServer
from serving.watch import ModelWatch, Policy

log = logging.getLogger(__name__)

_NUM_CANARIES_AT_ONCE = 4
_WRITE_S = 5.0


class Supervisor:
    """Watches the server behind a handle; `server` is what restarts it, None for an external one."""

    def __init__(self, handle: ServerHandle, server: EmbeddedServer | None, policy: Policy | None = None) -> None:
        self._home: Path = handle.home
        self._handle = handle
        self._server = server
        self._policy = policy or Policy()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(_NUM_CANARIES_AT_ONCE, thread_name_prefix="canary")
        self._client = handle.connect()
        self._watches: dict[str, ModelWatch] = {}
        self._reloads: dict[str, list[float]] = defaultdict(list)
        self._restarts: list[float] = []
        self._gone_since: float | None = None
        # Models whose files were found damaged: said once.
        self._damaged: set[str] = set()
        self._quiet_until: dict[str, float] = defaultdict(float)
        self._health = Health(state="serving", checked_at=0.0)
        self._written_at = 0.0

    def run(self) -> None:
        """Watch until `stop`. Raises UserError when the server does not stay up."""
        try:
            while not self._stop.is_set():
                try:
                    self.tick()
                except OSError as error:
                    # A full disk, a file that goes while it is read: the server is better watched than left alone.
                    log.error("event=not_looked_at reason=%r", error)
                self._stop.wait(self._policy.interval_s)
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._client.close()
            if self._health.state != "failed":
                health.forget(self._home)

    def stop(self) -> None:
        """Have `run` return; safe from any thread."""
        self._stop.set()

    def tick(self) -> None:
        """Look once and do what is needed. Raises UserError as `run` does."""
        if self._server is not None and not self._handle.alive:
            self._restart(_ended(self._server.exit_status()))
        elif not self._is_live():
            self._wait_or_restart()
        elif not self._undo_killed_deployment():
            self._look_at_models()

    def _is_live(self) -> bool:
        try:
            return bool(self._client.is_server_live(client_timeout=self._policy.live_s))
        except grpcclient.InferenceServerException:
            return False

    def _wait_or_restart(self) -> None:
        now = time.monotonic()
        if self._gone_since is None:
            self._gone_since = now
            log.warning("event=server_unreachable grpc=%s", self._handle.grpc_address)
        self._write(state="unreachable", models={})
        if self._server is not None and now - self._gone_since >= self._policy.stalled_s:
            self._restart("the server does not answer")

    def _undo_killed_deployment(self) -> bool:
        """Return whether there was one to undo: then the models are looked at next time."""
        if not (self._home / swap.JOURNAL).exists():
            return False
        with self._alone() as alone:
            if not alone or time.monotonic() < self._quiet_until[swap.JOURNAL]:
                return False
            try:
                return swap.undo_interrupted(self._home)
            except UserError as error:
                reason = str(error)
        self._restart_or_rest(swap.JOURNAL, reason)
        return True

    def _look_at_models(self) -> None:
        if self._gone_since is not None:
            log.info("event=server_reachable grpc=%s", self._handle.grpc_address)
            self._gone_since = None
        wanted = self._wanted()
        look = partial(canary.check, self._client, deadline_s=self._policy.canary_s)
        checks = list(self._pool.map(look, wanted))
        answers = all(each.outcome is Outcome.ANSWERS for each in checks)
        self._write(state="serving" if answers else "degraded", models={c.model: self._health_of(c) for c in checks})
        for found in checks:
            watch = self._watches.setdefault(found.model, ModelWatch(self._policy))
            work = partial(canary.work_done, self._handle.metrics_address, found.model)
            reason = watch.judge(found, wanted[found.model], time.monotonic(), work)
            if reason and time.monotonic() >= self._quiet_until[found.model]:
                # One at a time: a model that calls a dead one comes back with it.
                self._heal(found.model, reason)
                return

    def _wanted(self) -> Mapping[str, Mapping[str, str] | None]:
        """Return the models to watch, in the order in which they are mended, with what they should be served with."""
        folder = repository.current(self._home)
        models = swap.in_swap_order(swap.models_in(folder)) if folder is not None else ()
        if folder is None or not models:
            # An external server may have a repository of its own, and what is loaded outlives a folder that is gone.
            return dict.fromkeys(swap.known(self._client))
        return {model: self._wanted_of(folder, model) for model in models}

    def _wanted_of(self, folder: Path, model: str) -> Mapping[str, str] | None:
        try:
            return verification.wanted_parameters(folder, model)
        except UserError as error:
            # What is loaded serves on, whatever has become of its files.
            if model not in self._damaged:
                log.error("event=repository_damaged model=%s reason=%r", model, str(error))
            self._damaged.add(model)
            return None

    def _heal(self, model: str, reason: str) -> None:
        with self._alone() as alone:
            if not alone:
                return
            failure = self._reload(model, reason)
        # With the lock given back: a deployment need not wait for a server that comes back slowly.
        if failure is not None:
            self._restart_or_rest(model, failure)

    def _reload(self, model: str, reason: str) -> str | None:
        """Return why loading the model again did not help, or None if it did."""
        recent = self._reloads[model] = _within(self._reloads[model], self._policy.window_s)
        if len(recent) >= self._policy.max_reloads:
            return f"{model} was loaded again {len(recent)} times, now {reason}"
        recent.append(time.monotonic())
        log.warning("event=reload model=%s reason=%s number=%d", model, reason, len(recent))
        self._note(f"{reason} {model}", num_reloads=self._health.num_reloads + 1)
        try:
            for each in (model, *(caller for caller in swap.CALLERS.get(model, ()) if caller in self._watches)):
                swap.reload(self._handle, each, self._policy.load_s)
        except UserError as error:
            return str(error)
        log.info("event=reloaded model=%s seconds=%.1f", model, time.monotonic() - recent[-1])
        self._forget_canaries()
        return None

    def _restart_or_rest(self, what: str, reason: str) -> None:
        """Restart our own server; leave somebody else's alone for a while, and ours where only a challenger suffers."""
        if self._server is not None and what != repository.SHADOW:
            self._restart(reason)
            return
        log.error("event=given_up_for_now what=%s reason=%r", what, reason)
        self._note(reason)
        self._quiet_until[what] = time.monotonic() + self._policy.max_backoff_s

    def _restart(self, reason: str) -> None:
        """Bring the server back, however often that takes. Raises UserError when it was often enough."""
        assert self._server is not None
        while not self._stop.is_set():
            self._restarts = _within(self._restarts, self._policy.window_s)
            number = len(self._restarts)
            if number >= self._policy.max_restarts:
                self._write(state="failed", models={}, reason=reason)
                raise UserError(
                    f"the model server was restarted {number} times in {self._policy.window_s / 60:.0f} minutes and is "
                    f"given up, at last because: {reason}; see $GR_HOME/{LOG} and, for the starts before, {LOG}.1"
                )
            pause_s = min(self._policy.backoff_s * 2 ** (number - 1), self._policy.max_backoff_s) if number else 0.0
            self._restarts.append(time.monotonic())
            log.warning("event=server_restart number=%d pause_s=%.1f reason=%r", number + 1, pause_s, reason)
            self._note(reason, state="restarting", num_restarts=self._health.num_restarts + 1)
            if self._stop.wait(pause_s):
                return
            try:
                self._start_again()
                return
            except (UserError, OSError) as error:
                reason = sentence_for(error) or type(error).__name__

    def _start_again(self) -> None:
        assert self._server is not None
        with storage.exclusive(self._home, LOCK, wait_s=swap.WAIT_S):
            # Stopped first: a killed deployment is then undone by the repository's link alone.
            self._server.stop(RESTART_GRACE_S)
            swap.undo_interrupted(self._home)
            self._handle = self._server.restart()
        self._client.close()
        self._client = self._handle.connect()
        self._gone_since = None
        self._reloads.clear()
        self._forget_canaries()

    def _forget_canaries(self) -> None:
        for watch in self._watches.values():
            watch.forget()

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Yield whether nobody else works on the server; nobody will while the block runs."""
        with ExitStack() as stack:
            try:
                stack.enter_context(storage.exclusive(self._home, LOCK))
                alone = True
            except UserError:
                alone = False
            yield alone

    def _health_of(self, found: Check) -> ModelHealth:
        before = self._health.models.get(found.model)
        if before is None or before.outcome != found.outcome:
            log.info("event=canary model=%s outcome=%s error=%r", found.model, found.outcome, found.error[:200])
        answered_at = time.time() if found.outcome is Outcome.ANSWERS else (before.answered_at if before else 0.0)
        return ModelHealth(
            outcome=found.outcome.value, answered_at=answered_at, milliseconds=found.milliseconds, error=found.error
        )

    def _note(self, reason: str, **changes: object) -> None:
        self._write(reason=reason, acted_at=time.time(), **changes)

    def _write(self, **changes: object) -> None:
        before = self._health
        self._health = replace(before, checked_at=time.time(), **changes)  # type: ignore[arg-type]
        same = (before.state, before.acted_at) == (self._health.state, self._health.acted_at) and [
            (name, each.outcome) for name, each in before.models.items()
        ] == [(name, each.outcome) for name, each in self._health.models.items()]
        if not same or self._health.checked_at - self._written_at >= _WRITE_S:
            health.write(self._home, self._health)
            self._written_at = self._health.checked_at


def _within(moments: list[float], window_s: float) -> list[float]:
    return [moment for moment in moments if time.monotonic() - moment < window_s]


def _ended(status: int | None) -> str:
    if status is None:
        return "the server is gone"
    return f"the server was killed by signal {-status}" if status < 0 else f"the server ended with status {status}"

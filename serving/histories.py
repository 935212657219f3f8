"""Users' histories on the server's side: the last sequences, and behind them the events appended since.

Invariant: a user's history is what sequences made of the same events would hold: one order, one exposure for each
(user, item, time), no event twice, whichever of the two holds it. `offset` counts every event before the first returned
one, so a longer history keeps the prefix that the K/V cache knows.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gr_platform import serving_state
from serving.engine.requests import MAX_APPENDED, MAX_EVENTS, MAX_TIME, History, InvalidRequestError, first_true
from serving.history_base import Base, BaseHistory, CurrentBase
from serving.history_store import Appended, Bounds, HistoryStore

log = logging.getLogger(__name__)
# A clock may be ahead of ours by this much; an event from beyond would stand before every request for as long.
MAX_AHEAD_MS = 60_000
# Other processes may still read the sequences before: until then they need the events that the new ones hold.
PRUNE_AFTER_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvents:
    """Exposures to append for one user: raw item ids [n], int64 masks [n], int64 ms [n], in any order."""

    user: int | str
    items: np.ndarray
    actions: np.ndarray
    times: np.ndarray


class Histories:
    """All users of a data set. Safe to share between threads; other processes may have the same histories open."""

    def __init__(
        self, home: Path, ds: str, *, user_id_type: str, item_id_type: str, bounds: Bounds | None = None
    ) -> None:
        """Id types are `int64` or `string`. Raises UserError or sqlite3.Error if the store cannot be opened."""
        types = f"{user_id_type} users, {item_id_type} items"
        self._store = HistoryStore(serving_state.histories_file(home, ds), id_types=types, bounds=bounds)
        self._base = CurrentBase(home, ds, user_id_type=user_id_type, item_id_type=item_id_type)
        self._is_text = item_id_type == "string"
        self._pruning = threading.Lock()
        self._pruned = ""

    def history(self, user: int | str, *, limit: int = MAX_EVENTS, until: int | None = None) -> History:
        """Return the last `limit` events of a user that are not later than `until` (ms); none for an unknown user.

        Of events that were dropped for room the later ones are returned, and `offset` counts the others. Raises
        sqlite3.Error if the store cannot be read now.
        """
        base = self._base.get()
        num_base, last = base.find(user)
        tail = self._store.tail(user, limit, after=last, until=until)
        count = len(tail.items)
        if count == limit or (tail.num_dropped and count):
            # Before the stored events are some that nobody has any more, or none are asked for.
            first = self._none()
            offset = num_base + tail.num_dropped + tail.num_before
        else:
            first = base.tail(user, limit - count, until)
            offset = first.num_before
        return History(
            items=np.concatenate([first.items.astype(self._dtype), np.array(tail.items, self._dtype)]),
            actions=np.concatenate([first.actions, tail.actions]),
            times=np.concatenate([first.times, tail.times]),
            offset=offset,
        )

    def append(self, batch: Sequence[NewEvents]) -> list[Appended]:
        """Store checked events of several calls in one transaction; return what became of each call's.

        Events not after the user's last in the sequences are known there, and dropped; so are those older than what
        was dropped for room. Raises sqlite3.Error if nothing could be stored.
        """
        base = self._base.get()
        rows = [(new.user, _rows(new), base.find(new.user)) for new in batch]
        now_ms = time.time_ns() // 1_000_000
        done = self._store.append_all([(user, events, last) for user, events, (_, last) in rows], now_ms)
        self._prune_after_switch(base)
        return [
            Appended(
                num_kept=each.num_kept,
                num_known=each.num_known,
                num_late=each.num_late,
                length=each.length + num_base,
            )
            for each, (_, _, (num_base, _)) in zip(done, rows, strict=True)
        ]

    def prune(self) -> int:
        """Delete appended events that the current sequences hold; return how many."""
        self._base.wait()
        base = self._base.get()
        return self._store.prune(base.digest, base.last_times) if base.digest else 0

    def close(self) -> None:
        """Close the store, after pruning if that goes on."""
        with self._pruning:
            self._store.close()

    @property
    def _dtype(self) -> type:
        return object if self._is_text else np.int64

    def _none(self) -> BaseHistory:
        nothing = np.zeros(0, np.int64)
        return BaseHistory(items=nothing, actions=nothing, times=nothing, num_before=0)

    def _prune_after_switch(self, base: Base) -> None:
        due = base.digest not in ("", self._pruned) and time.time() - base.since_s > PRUNE_AFTER_S
        if due and self._pruning.acquire(blocking=False):
            threading.Thread(target=self._prune, args=(base,), name="history-prune", daemon=True).start()

    def _prune(self, base: Base) -> None:
        try:
            deleted = self._store.prune(base.digest, base.last_times)
            log.info("event=histories_pruned deleted=%d", deleted)
        except sqlite3.Error as error:
            log.warning("event=histories_not_pruned reason=%s", error)
        finally:
            # Not tried again for these sequences by this process: the rows take room, and are never read.
            self._pruned = base.digest
            self._pruning.release()


def check_new_events(new: NewEvents, *, num_actions: int, now_ms: int) -> None:
    """Raise InvalidRequestError naming the field and the index unless the events may be appended."""
    lengths = (len(new.items), len(new.actions), len(new.times))
    if max(lengths) > MAX_APPENDED:
        raise InvalidRequestError(f"ITEMS holds {max(lengths)} entries, at most {MAX_APPENDED} may be appended at once")
    if len(set(lengths)) != 1:
        raise InvalidRequestError("ITEMS, ACTIONS and TIMES must be equally long, got {}, {} and {}".format(*lengths))
    if (bad := first_true((new.actions >> num_actions) != 0)) is not None:
        raise InvalidRequestError(
            f"ACTIONS[{bad}] is {new.actions[bad]}, must be a bitmask of the data set's {num_actions} actions"
        )
    if (bad := first_true(new.times < -MAX_TIME)) is not None:
        raise InvalidRequestError(f"TIMES[{bad}] is {new.times[bad]}, which is no time in milliseconds")
    if (bad := first_true(new.times > now_ms + MAX_AHEAD_MS)) is not None:
        raise InvalidRequestError(
            f"TIMES[{bad}] is {new.times[bad]}, more than {MAX_AHEAD_MS // 1000} s ahead of the server's clock "
            f"({now_ms})"
        )


def _rows(new: NewEvents) -> list[tuple[int | str, int, int]]:
    return list(zip(new.items.tolist(), new.actions.tolist(), new.times.tolist(), strict=True))

"""Asking the running model server about a known user: whose history, at what time, with which titles.

Invariant: the history comes from the current sequences of the data set that is served, so ids, masks and times
mean what they meant in training.
"""

import csv
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gr_platform.errors import UserError

if TYPE_CHECKING:
    from serving.client import Answer, History

MAX_HISTORY = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One line of an answer: raw id, title ('' if the data set has no catalogue), probabilities by task."""

    item: int | str
    title: str
    scores: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class UserAnswer:
    """An answer with what it cost: the round trip and how many tokens of the history were cached."""

    lines: list[Listed]
    milliseconds: float
    cached_tokens: int


class Asker:
    """Answers questions about users of the served data set; holds one connection. Use as a context manager."""

    def __init__(self, home: Path) -> None:
        """Raises UserError if no server runs, or its data set has no sequences here."""
        from gr_platform.events.landing import titles
        from gr_platform.sequences.dataset import SequenceDataset
        from serving.client import Client
        from serving.server import attach

        handle = attach(home)
        if handle is None:
            raise UserError("no model server runs; start it with gr serve or make up")
        self._client = Client(handle.grpc_address)
        metadata = self._client.metadata()
        self.tasks = metadata.tasks
        self.dataset = SequenceDataset.current(home, metadata.dataset)
        self._titles = titles(home, metadata.dataset)

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def recommend(self, user: int | str, k: int, at: int | None = None, *, server_history: bool = False) -> UserAnswer:
        """Return the best `k` items for a user at time `at` (ms; default: the time of the last event).

        server_history: by the history that the server has of the user, which need not be in the sequences yet; the
        default of `at` is then the time now.
        """
        if server_history:
            return self._recommend_by_id(user, k, at)
        history, last = self._history(user)
        started = time.perf_counter()
        answer = self._client.recommend(history, k=k, request_time=last if at is None else at)
        return self._listed(answer, time.perf_counter() - started)

    def score(self, user: int | str, items: list[str], at: int | None = None) -> UserAnswer:
        """Return the probabilities of `items`, in the order given."""
        history, last = self._history(user)
        ids = self._item_ids(items)
        known = self.dataset.vocabulary.lookup(ids) >= self.dataset.vocabulary.first_item
        started = time.perf_counter()
        answer = self._client.score(history, ids, request_time=last if at is None else at)
        listed = self._listed(answer, time.perf_counter() - started)
        lines = [
            line if is_known else replace(line, title="(not in the catalogue)")
            for line, is_known in zip(listed.lines, known, strict=True)
        ]
        return replace(listed, lines=lines)

    def _recommend_by_id(self, user: int | str, k: int, at: int | None) -> UserAnswer:
        declaration = self.dataset.declaration
        known = str(user) if declaration.user_id_type == "string" else _integer_id(str(user), declaration.name, "user")
        request_time = time.time_ns() // 1_000_000 if at is None else at
        started = time.perf_counter()
        answer = self._client.recommend_user(known, k=k, request_time=request_time)
        return self._listed(answer, time.perf_counter() - started)

    def _history(self, user: int | str) -> "tuple[History, int]":
        from serving.client import History

        row = self.dataset.find_user(user)
        end = int(self.dataset.lengths[row])
        items, actions, times = self.dataset.history(row, end)
        start = max(0, end - MAX_HISTORY)
        ids = self.dataset.vocabulary.ids(items[start:])
        return History(items=ids, actions=actions[start:], times=times[start:], offset=start), int(times[-1])

    def _item_ids(self, items: list[str]) -> list[int] | list[str]:
        if not items:
            raise UserError("no item is named; give at least one, for example --items 17,4,99")
        if self.dataset.declaration.item_id_type == "string":
            return items
        return [_integer_id(item, self.dataset.declaration.name, "item") for item in items]

    def _listed(self, answer: "Answer", seconds: float) -> UserAnswer:
        lines = [
            Listed(
                item=item, title=self._titles.get(item, ""), scores=dict(zip(self.tasks, map(float, row), strict=True))
            )
            for item, row in zip(answer.items.tolist(), answer.scores, strict=True)
        ]
        return UserAnswer(lines=lines, milliseconds=seconds * 1000, cached_tokens=answer.cached_tokens)


def split_ids(text: str) -> list[str]:
    """Return the ids of a comma-separated list; an id in double quotes may hold commas and outer spaces."""
    return [item for item in next(csv.reader([text], skipinitialspace=True), []) if item]


def _integer_id(text: str, ds: str, what: str) -> int:
    try:
        found = int(text)
    except ValueError:
        raise UserError(f"{what} {text!r} is not an integer, but the {what}s of {ds} are") from None
    if not -(1 << 63) <= found < 1 << 63:
        raise UserError(f"{what} {text} is beyond 64 bits, so {ds} has no such {what}")
    return found

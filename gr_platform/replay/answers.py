"""Which model gave an answer? Told by its scores, which the bundles' models give offline for the same request.

Invariant: what a model would answer comes from its bundle alone, never from the server: an answer taken from the wire
right after a deployment would call the old model new if the server had not changed. Probes ask the same of every model
at all times, so that an answer is the old model's, the new one's, or nobody's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gr_platform.bundle.load import load
from gr_platform.replay.load import Told
from gr_platform.replay.visitors import Lived
from serving.bench.generator import KINDS
from serving.bench.swap import TOLERANCE, Swap, stale
from serving.engine.engine import Engine
from serving.engine.ranker import Ranker
from serving.engine.requests import RankRequest, RetrieveRequest
from serving.engine.retriever import Retriever

NOBODY, SEVERAL = -1, -2
ASKED = {"score": "ranking", "recommend": "ranking", "retrieve": "retrieval"}
_CACHE_BYTES = 64 << 20
Scores = Mapping[Any, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Staleness:
    """Of probes: how many were answered, by an old model after the flip to a newer one, by none of the models served,
    and so that two of these fit."""

    num_probes: int
    num_stale: int
    num_of_no_model: int
    num_undecided: int


def staleness(told: Told) -> Staleness:
    """Return whose answers the probes of a load got. Raises UserError if a bundle that served is damaged or gone."""
    notes = [note for note in told.notes if note["probe"] >= 0]
    parts = [_of_kind(told, kind, notes) for kind in ASKED]
    names = ("num_probes", "num_stale", "num_of_no_model", "num_undecided")
    return Staleness(**{name: sum(part[name] for part in parts) for name in names})


def _of_kind(told: Told, kind: str, notes: Sequence[dict[str, Any]]) -> dict[str, int]:
    mine = [note for note in notes if told.probes[note["probe"]].kind == kind]
    folders, swaps = models_of(told, ASKED[kind])
    tables = expected(folders, told.probes, mine)
    seen = np.array([model_of(note, tables[note["probe"]]) for note in mine], int)
    records = told.records[[note["row"] for note in mine]]
    assert (records["kind"] == KINDS.index(kind)).all()
    told_apart = seen != SEVERAL
    num_stale, num_wrong = stale(records[told_apart], seen[told_apart], swaps)
    return {
        "num_probes": len(mine),
        "num_stale": num_stale,
        "num_of_no_model": num_wrong,
        "num_undecided": int(np.count_nonzero(~told_apart)),
    }


def models_of(told: Told, kind: str) -> tuple[list[Path], list[Swap]]:
    """Return the different bundles of one kind that were served, and the swaps from one of them to another."""
    folders = [getattr(told.first, kind)]
    swaps = []
    current = 0
    for swap in told.swaps:
        folder = getattr(swap.served, kind)
        if folder not in folders:
            folders.append(folder)
        if (number := folders.index(folder)) != current:
            swaps.append(Swap(to=number, began=swap.began, ended=swap.ended))
            current = number
    return folders, swaps


def expected(
    folders: Sequence[Path], probes: Sequence[Lived], notes: Sequence[dict[str, Any]]
) -> dict[int, list[Scores]]:
    """Return probe -> for each bundle its scores of all items that any answer to the probe has, by item."""
    items: dict[int, set[Any]] = {}
    for note in notes:
        items.setdefault(note["probe"], set()).update(note["items"])
    tables: dict[int, list[Scores]] = {probe: [] for probe in items}
    for folder in folders:
        model = _Offline(folder)
        for probe, asked in items.items():
            tables[probe].append(model.scores(probes[probe], sorted(asked)))
    return tables


def model_of(note: Mapping[str, Any], tables: Sequence[Scores]) -> int:
    """Return the number of the bundle whose scores an answer has; NOBODY's, or SEVERAL's."""
    scores = np.array(note["scores"], np.float64).reshape(len(note["items"]), -1)
    fitting = []
    for number, table in enumerate(tables):
        if not all(item in table for item in note["items"]):
            continue
        own = np.array([table[item] for item in note["items"]]).reshape(scores.shape)
        if np.max(np.abs(own - scores), initial=0.0) <= TOLERANCE * np.max(np.abs(own), initial=0.0):
            fitting.append(number)
    return fitting[0] if len(fitting) == 1 else SEVERAL if fitting else NOBODY


class _Offline:
    """A bundle's model in this process."""

    def __init__(self, folder: Path) -> None:
        bundle = load(folder)
        made = Ranker if bundle.kind == "ranking" else Retriever
        self._bundle, self._engine = bundle, Engine(made(bundle, cache_bytes=_CACHE_BYTES, path="onnx"))

    def scores(self, probe: Lived, items: Sequence[Any]) -> Scores:
        """Return the scores of items, by item; a retrieval model has none of items that it does not return."""
        if self._bundle.kind == "ranking":
            candidates = np.array(items, dtype=probe.history.items.dtype)
            request = RankRequest(history=probe.history, candidates=candidates, request_time=probe.request_time)
            return dict(zip(items, self._engine.ask(request).scores, strict=True))
        found = self._engine.ask(
            RetrieveRequest(
                history=probe.history,
                k=self._bundle.vocabulary.num_items,
                exclude=probe.history.items[:0],
                request_time=probe.request_time,
            )
        )
        scores = dict(zip(found.items.tolist(), found.scores, strict=True))
        return {item: scores[item] for item in items if item in scores}

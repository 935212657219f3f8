"""What a row of the served log is, and rows as an Arrow table.

Invariant: a row holds a user's keyed hash and never the id. Scores stand in the order of the items, and within an item
in the order of the tasks that the part's metadata names.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

_ENTRY_BYTES = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One answer. Times in ms UTC: served_ts by the server's clock, request_ts as asked for.

    items: raw ids [n]. scores: float32 [n, tasks]. shadow_scores: the same by the challenger, None if it was not asked
    or failed. shadow_ms: how long it took to answer or to fail, None if it was not asked. Digests: of the models that
    answered, "" for those of the log: a pair is swapped one model after the other.
    """

    request_id: str
    served_ts: int
    request_ts: int
    user: str | None
    items: np.ndarray
    scores: np.ndarray
    latency_ms: float
    retriever_digest: str = ""
    ranker_digest: str = ""
    shadow_digest: str = ""
    shadow_scores: np.ndarray | None = None
    shadow_ms: float | None = None

    @property
    def size_bytes(self) -> int:
        """Roughly what the entry takes in memory."""
        ids = 8 * len(self.items) if self.items.dtype.kind == "i" else sum(60 + len(item) for item in self.items)
        shadow = 0 if self.shadow_scores is None else self.shadow_scores.nbytes
        return _ENTRY_BYTES + len(self.request_id) + len(self.user or "") + ids + self.scores.nbytes + shadow


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedBy:
    """What rows of one log have in common: id type (int64 or string), task names, digests of the deployed models
    ("" = no shadow)."""

    item_id_type: str
    tasks: tuple[str, ...]
    retriever_digest: str
    ranker_digest: str
    shadow_digest: str = ""
    shadow_tasks: tuple[str, ...] = ()


def day_of(entry: Served) -> str:
    """Return the UTC day an answer was given on, YYYY-MM-DD."""
    return datetime.fromtimestamp(entry.served_ts / 1000, UTC).date().isoformat()


def schema_of(by: ServedBy) -> pa.Schema:
    """Return the columns of a part; the names of the tasks, as JSON, are among its metadata."""
    scores = pa.list_(pa.list_(pa.float32()))
    fields = {
        "request_id": pa.string(),
        "served_ts": pa.int64(),
        "request_ts": pa.int64(),
        "retriever_digest": pa.string(),
        "ranker_digest": pa.string(),
        "user_hash": pa.string(),
        "items": pa.list_(pa.string() if by.item_id_type == "string" else pa.int64()),
        "scores": scores,
        "latency_ms": pa.float32(),
        "shadow_digest": pa.string(),
        "shadow_scores": scores,
        "shadow_ms": pa.float32(),
    }
    facts = {"tasks": json.dumps(by.tasks), "shadow_tasks": json.dumps(by.shadow_tasks), "schema_version": "1"}
    return pa.schema(list(fields.items()), metadata=facts)


def table_of(rows: list[tuple[Served, str | None]], by: ServedBy) -> pa.Table:
    """Return answers, each with the hash of its user, as a table."""
    schema = schema_of(by)
    entries = [entry for entry, _ in rows]
    has_shadow = np.array([entry.shadow_scores is not None for entry in entries])
    was_asked = has_shadow | np.array([entry.shadow_ms is not None for entry in entries])
    none = np.zeros((0, len(by.shadow_tasks)), np.float32)
    columns = [
        pa.array([entry.request_id for entry in entries]),
        pa.array([entry.served_ts for entry in entries], pa.int64()),
        pa.array([entry.request_ts for entry in entries], pa.int64()),
        pa.array([entry.retriever_digest or by.retriever_digest for entry in entries]),
        pa.array([entry.ranker_digest or by.ranker_digest for entry in entries]),
        pa.array([hashed for _, hashed in rows], pa.string()),
        _lists(
            pa.array(np.concatenate([entry.items for entry in entries]), schema.field("items").type.value_type), entries
        ),
        _scores([entry.scores for entry in entries], np.ones(len(rows), bool)),
        pa.array([entry.latency_ms for entry in entries], pa.float32()),
        pa.array(
            [
                (entry.shadow_digest or by.shadow_digest) if asked else None
                for entry, asked in zip(entries, was_asked.tolist(), strict=True)
            ],
            pa.string(),
        ),
        _scores([none if e.shadow_scores is None else e.shadow_scores for e in entries], has_shadow),
        pa.array([entry.shadow_ms for entry in entries], pa.float32()),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _lists(values: pa.Array, entries: list[Served]) -> pa.Array:
    return pa.ListArray.from_arrays(_offsets([len(entry.items) for entry in entries]), values)


def _scores(scores: list[np.ndarray], there: np.ndarray) -> pa.Array:
    """Return list<list<float>> of matrices [n, tasks], null where `there` is False."""
    rows = np.concatenate([matrix.astype(np.float32, copy=False).reshape(-1) for matrix in scores])
    widths = [np.full(len(matrix), matrix.shape[1]) for matrix in scores]
    inner = pa.ListArray.from_arrays(_offsets(np.concatenate(widths)), pa.array(rows))
    return pa.ListArray.from_arrays(_offsets([len(matrix) for matrix in scores]), inner, mask=pa.array(~there))


def _offsets(lengths: Sequence[int] | np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))

"""What became of the recommendations that were served: the server's log joined with the events that followed.

Invariant: a request counts towards the hit rate only if its user is known and the events reach to the end of its
window, so a rate never rises by waiting. A hit is a positive event of that user on a served item after the request.
"""
# ruff: noqa: S608 - identifiers and strings are quoted by `quoted` and `literal`

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from gr_platform import serving_state, storage
from gr_platform.events.database import literal, parquet_of
from gr_platform.events.ingest import CleanEvents, clean_events

FILE = "outcomes.parquet"
VERSION = 1
WINDOW_DAYS = 7.0
NUM_POSITIONS = 20
_DAY_MS = 86_400_000
_USER_ROWS = 1 << 17

_HITS = """
CREATE TABLE hits AS
SELECT number, arg_min(position, (position, event_ts)) AS position, arg_min(event_ts, (position, event_ts)) AS hit_ts
FROM (
    SELECT number, user_hash, request_ts, unnest(items) AS item_id, generate_subscripts(items, 1) AS position
    FROM log WHERE user_hash IS NOT NULL
) JOIN people USING (user_hash) JOIN wanted USING (user_id, item_id)
WHERE event_ts > request_ts AND event_ts <= request_ts + {window}
GROUP BY number
"""
# Spearman's correlation of the two orders of a request's items; equal scores share their mean rank.
_AGREEMENT = """
CREATE TABLE agreement AS
WITH scored AS (
    SELECT number, list_avg(served) AS served, list_avg(shadow) AS shadow
    FROM (
        SELECT number, unnest(scores) AS served, unnest(shadow_scores) AS shadow
        FROM log WHERE shadow_digest IS NOT NULL
    )
), ranked AS (
    SELECT number,
        rank() OVER (PARTITION BY number ORDER BY served) + count(*) OVER (PARTITION BY number, served) / 2.0 AS served,
        rank() OVER (PARTITION BY number ORDER BY shadow) + count(*) OVER (PARTITION BY number, shadow) / 2.0 AS shadow
    FROM scored
)
SELECT number, corr(served, shadow) AS agreement FROM ranked
GROUP BY number HAVING count(DISTINCT served) > 1 AND count(DISTINCT shadow) > 1
"""
_OUTCOMES = """
CREATE TABLE outcomes AS
SELECT request_id, served_ts, request_ts, retriever_digest, ranker_digest,
    CASE WHEN shadow_scores IS NOT NULL THEN shadow_digest END AS shadow_digest, len(items) AS num_items,
    latency_ms, user_hash IS NOT NULL AS has_user,
    user_hash IS NOT NULL AND request_ts + {window} <= {last} AS is_judged,
    position, hit_ts, agreement
FROM log LEFT JOIN hits USING (number) LEFT JOIN agreement USING (number)
ORDER BY served_ts, number
"""
_FIGURES = """
SELECT count(*) AS num_requests, count(*) FILTER (has_user) AS num_with_user, count(*) FILTER (is_judged) AS num_judged,
    count(*) FILTER (is_judged AND position IS NOT NULL) AS num_hits,
    count(*) FILTER (is_judged AND position IS NOT NULL) / nullif(count(*) FILTER (is_judged), 0) AS hit_rate,
    avg(position) FILTER (is_judged) AS mean_position,
    count(shadow_digest) AS num_shadow, count(shadow_digest) / nullif(count(*), 0) AS shadow_share,
    avg(agreement) AS rank_agreement,
    median(latency_ms) AS latency_ms_p50, quantile_cont(latency_ms, 0.99) AS latency_ms_p99
FROM outcomes
"""
_RATE = "count(*) FILTER (is_judged AND position IS NOT NULL) / nullif(count(*) FILTER (is_judged), 0) AS hit_rate"


def served_outcomes(home: Path, ds: str, *, window_days: float = WINDOW_DAYS) -> storage.Result:
    """Return what became of every logged request, and make it the data set's current.

    Files: FILE, a row a request: request_id, served_ts, request_ts, the digests, num_items, latency_ms, has_user,
    is_judged, position (1 = first in the list) and hit_ts of the hit highest in the list, agreement (Spearman of
    served and shadow ranking). Facts: counts, hit_rate, shadow_share, rank_agreement and latencies (None where there is
    nothing to tell), days, positions, models. Raises UserError if no events were ingested.
    """
    events = clean_events(home, ds)
    folder = serving_state.served_folder(home, ds)
    parts = serving_state.log_parts(folder)
    window = round(window_days * _DAY_MS)
    spec = {
        "events": events.digest,
        "positives": list(events.declaration.positives),
        "parts": storage.digest_of([[part.name, *_state(part)] for part in parts]),
        "window_ms": window,
        "version": VERSION,
    }
    parent = folder / "outcomes"
    result = storage.ensure(parent, "served", spec, lambda built: _build(built, home, ds, events, parts, window))
    storage.point(parent, "served", result.folder)
    for old in parent.glob("served-*"):
        if old != result.folder:
            shutil.rmtree(old, ignore_errors=True)
    return result


def _state(part: Path) -> tuple[int, int]:
    try:
        found = part.stat()
    except FileNotFoundError:
        # The server has just deleted it for room.
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _build(built: Path, home: Path, ds: str, events: CleanEvents, parts: list[Path], window: int) -> dict[str, Any]:
    item_type = pa.int64() if events.declaration.item_id_type == "int64" else pa.string()
    readable = [part for part in parts if _item_type(part) == item_type]
    positives = ", ".join(map(literal, events.declaration.positives))
    with events.connect(none=_nothing(item_type)) as connection:
        source = parquet_of(readable, by_name=True) if readable else "none"
        connection.execute(f"CREATE TABLE log AS SELECT row_number() OVER () AS number, * FROM {source}")
        last = _value(connection, "SELECT max(event_ts) FROM events") or 0
        first, end = connection.sql("SELECT min(request_ts), max(request_ts) FROM log").fetchall()[0]
        connection.execute(
            "CREATE TABLE wanted AS SELECT user_id, item_id, event_ts FROM events "
            f"WHERE action IN ({positives}) AND event_ts > {first or 0} AND event_ts <= {(end or 0) + window}"
        )
        _hash_people(connection, home, ds, has_log=bool(readable))
        for statement in (_HITS, _AGREEMENT, _OUTCOMES):
            connection.execute(statement.format(window=window, last=last))
        connection.execute(f"COPY outcomes TO {literal(str(built / FILE))} (FORMAT parquet, COMPRESSION zstd)")
        facts = _facts(connection)
    return facts | {"num_parts": len(readable), "num_parts_left_out": len(parts) - len(readable)}


def _item_type(part: Path) -> pa.DataType | None:
    """Return the type of the items in a part; None for one that is damaged, or that the server has just deleted."""
    try:
        return pq.read_schema(part).field("items").type.value_type
    except (OSError, pa.ArrowInvalid, KeyError):
        return None


def _nothing(item_type: pa.DataType) -> pa.Table:
    """Return a log without rows."""
    scores = pa.list_(pa.list_(pa.float32()))
    texts = ("request_id", "retriever_digest", "ranker_digest", "user_hash", "shadow_digest")
    fields: dict[str, pa.DataType] = {name: pa.string() for name in texts}
    fields |= {"served_ts": pa.int64(), "request_ts": pa.int64(), "latency_ms": pa.float32()}
    fields |= {"items": pa.list_(item_type), "scores": scores, "shadow_scores": scores}
    return pa.schema(list(fields.items())).empty_table()


def _hash_people(connection: duckdb.DuckDBPyConnection, home: Path, ds: str, *, has_log: bool) -> None:
    """Make the table `people`: the users who did something in time, each with the hash that the log has of them."""
    connection.execute("CREATE TABLE people (user_id VARCHAR, user_hash VARCHAR)")
    if has_log:
        key = serving_state.hash_key(home)
        for users in _user_ids(connection):
            hashes = pa.array([serving_state.user_hash(key, ds, user) for user in users.to_pylist()])
            connection.register("hashed", pa.table({"user_id": users.cast(pa.string()), "user_hash": hashes}))
            connection.execute("INSERT INTO people FROM hashed WHERE user_hash IN (SELECT user_hash FROM log)")
    id_type = connection.sql("SELECT user_id FROM wanted LIMIT 0").types[0]
    connection.execute(f"ALTER TABLE people ALTER user_id TYPE {id_type}")


def _user_ids(connection: duckdb.DuckDBPyConnection) -> Iterator[pa.Array]:
    for batch in connection.cursor().sql("SELECT DISTINCT user_id FROM wanted").to_arrow_reader(_USER_ROWS):
        yield batch.column("user_id")


def _facts(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    figures = connection.sql(_FIGURES).to_arrow_table().to_pylist()[0]
    days = connection.sql(
        "SELECT strftime(make_timestamp(served_ts * 1000), '%Y-%m-%d') AS date, count(*) AS num_requests, "
        f"{_RATE} FROM outcomes GROUP BY date ORDER BY date"
    )
    models = connection.sql(
        f"SELECT retriever_digest, ranker_digest, count(*) AS num_requests, {_RATE} FROM outcomes "
        "GROUP BY ALL ORDER BY min(served_ts)"
    )
    hits = dict(
        connection.sql(
            f"SELECT position, count(*) FROM outcomes WHERE is_judged AND position <= {NUM_POSITIONS} GROUP BY position"
        ).fetchall()
    )
    return figures | {
        "days": days.to_arrow_table().to_pylist(),
        "models": models.to_arrow_table().to_pylist(),
        "positions": [hits.get(place, 0) for place in range(1, NUM_POSITIONS + 1)],
    }


def _value(connection: duckdb.DuckDBPyConnection, sql: str) -> Any:
    return connection.sql(sql).fetchall()[0][0]

"""Which rows say again what another row said: an event counts once, within an ingest date and across dates.

Invariant: of rows that are one event the first in source order counts, whichever ingest dates they have. Two rows are
one event if they have the same user and event id or, both without an id, are equal in user, item, action, value, time.
"""
# ruff: noqa: S608 - strings are quoted by `literal`

from collections.abc import Iterable, Iterator

import duckdb
import numpy as np
import pyarrow as pa

from gr_platform.events.moments import same_moment, tied, whole_moments

# With the value, which may be missing, what makes two rows without an event id one event.
_SAME = ("user_id", "item_id", "action", "event_ts")


def mark_repeats(connection: duckdb.DuckDBPyConnection, earlier: str, span: tuple[int, int], *, has_ids: bool) -> None:
    """Make the table `repeats` (source_file, source_row) of rows of the view `judged`: those whose event id came before
    here, or that files landed before theirs hold. What has no id and repeats here is found by `once`.

    earlier: SQL for the judged rows of files of other ingest dates, "" for none; span: first and last time (ms) of the
    valid rows; has_ids: some have an event id.
    """
    parts = ["SELECT 0::INTEGER AS source_file, 0::BIGINT AS source_row WHERE false"]
    valid = "FROM judged AS row WHERE rule IS NULL"
    if has_ids:
        twice = f"SELECT user_id, event_id {valid} AND event_id IS NOT NULL GROUP BY ALL HAVING count(*) > 1"
        parts.append(
            f"SELECT source_file, source_row FROM (SELECT user_id, event_id, source_file, source_row {valid}) "
            f"SEMI JOIN ({twice}) USING (user_id, event_id) "
            "QUALIFY row_number() OVER (PARTITION BY user_id, event_id ORDER BY source_file, source_row) > 1"
        )
    if earlier:
        old = f"SELECT 1 FROM ({earlier}) AS old WHERE rule IS NULL AND old.source_file < row.source_file"
        same = " AND ".join(f"old.{name} = row.{name}" for name in _SAME)
        parts.append(
            f"SELECT source_file, source_row {valid} AND event_id IS NULL AND EXISTS ({old} AND old.event_id IS NULL "
            f"AND event_ts BETWEEN {span[0]} AND {span[1]} AND {same} AND old.value IS NOT DISTINCT FROM row.value)"
        )
        if has_ids:
            same = "old.user_id = row.user_id AND old.event_id = row.event_id"
            parts.append(
                f"SELECT source_file, source_row {valid} AND event_id IS NOT NULL AND EXISTS ({old} AND {same})"
            )
    connection.execute(f"CREATE OR REPLACE TABLE repeats AS {' UNION '.join(parts)}")


def once(stream: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Yield rows sorted by (user_id, event_ts, source order) without repeats, those of one user and time together."""
    for rows in whole_moments(pa.Table.from_batches([batch]) for batch in stream):
        repeated = repeats_of(rows)
        yield rows.filter(pa.array(~repeated)) if repeated.any() else rows


def repeats_of(rows: pa.Table) -> np.ndarray:
    """Return which of the sorted rows without an event id equal an earlier one in user, item, action, value and time,
    bool [len]."""
    repeated = np.zeros(len(rows), bool)
    same = same_moment(rows)
    candidates = tied(same)
    if "event_id" in rows.column_names:
        candidates &= rows["event_id"].is_null().to_numpy()
    at = np.flatnonzero(candidates)
    if not len(at):
        return repeated
    moment = np.cumsum(np.concatenate([[True], ~same]))[at]
    few = rows.select(["item_id", "action", "value"]).take(pa.array(at)).combine_chunks()
    item = few["item_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    has_value = few["value"].is_valid().to_numpy()
    # Adding zero makes -0.0 the 0.0 that it equals.
    value = few["value"].fill_null(0.0).to_numpy() + 0.0
    keys = (has_value, value, few["action"].to_numpy(), item, moment)
    if not _may_repeat(moment, item, few["action"].to_numpy(), value):
        return repeated
    order = np.lexsort(keys)
    equal = np.ones(len(at) - 1, bool)
    for key in keys:
        equal &= key[order][1:] == key[order][:-1]
    repeated[at[order[1:][equal]]] = True
    return repeated


def _may_repeat(moment: np.ndarray, item: np.ndarray, action: np.ndarray, value: np.ndarray) -> bool:
    """Return False if no two rows agree, by a hash that equal rows share; far cheaper than sorting by every column."""
    mixed = item.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + action.astype(np.uint64)
    mixed = (mixed ^ value.view(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
    # Moments come in order, so the keys are nearly sorted, which a stable sort is fast on.
    keys = np.sort((moment.astype(np.uint64) << np.uint64(40)) | (mixed >> np.uint64(24)), kind="stable")
    return bool((keys[1:] == keys[:-1]).any())

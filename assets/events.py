"""The stage from landed files to clean events."""

import dagster as dg

from assets.materialization import PREVIEW_ROWS, Stage, preview_of, table
from assets.plots import histogram
from assets.resources import PIPELINE, Platform


@dg.asset(group_name="data", pool=PIPELINE, kinds={"duckdb", "parquet"}, deps=["landed_day"])
def events(platform: Platform) -> dg.MaterializeResult:
    """Clean events: landed files validated, de-duplicated, sorted by user; rows that broke a rule in quarantine."""
    from gr_platform.events.ingest import clean_events, ingest

    stage = Stage("events")
    home, ds = platform.folder(), platform.dataset_name()
    result = ingest(home, ds)
    clean = clean_events(home, ds)
    head = clean.query("SELECT user_id, item_id, action, value, event_ts FROM events LIMIT 8")
    days = clean.query("SELECT event_ts / 86400000.0 AS day FROM events USING SAMPLE 20000 ROWS (reservoir, 1)")
    partitions = [
        [p.ingest_date, p.manifest.facts["rows_in"], p.manifest.facts["rows_kept"], p.manifest.facts["duplicates"]]
        for p in result.partitions[-PREVIEW_ROWS:]
    ]
    return stage.finish(
        digest=result.digest,
        reused=result.reused,
        figures={
            "rows_in": result.rows_in,
            "rows_kept": result.rows_kept,
            "duplicates": result.duplicates,
            "quarantined": sum(result.quarantined.values()),
            **{f"quarantined_{rule}": count for rule, count in result.quarantined.items()},
        },
        preview=f"{preview_of(head)}\n\n{table(['ingest date', 'rows in', 'kept', 'duplicates'], partitions)}",
        plot=histogram(days["day"].to_numpy(), "event time (days since 1970)"),
    )

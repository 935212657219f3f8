"""What must hold of events and sequences; blocking, because a later stage would train on garbage.

Invariant: a check reads finished results only, and its description is the sentence a person needs when it fails.
"""

import dagster as dg

from assets.materialization import verdict
from assets.resources import Platform
from gr_platform import storage


@dg.asset_check(asset="events", name="schema", blocking=True)
def events_schema(platform: Platform) -> dg.AssetCheckResult:
    """Clean events have the contract's columns and types, no NULL in them, and declared actions only."""
    from gr_platform.events.ingest import clean_events

    clean = clean_events(platform.folder(), platform.dataset_name())
    id_types = {"int64": "BIGINT", "string": "VARCHAR"}
    wanted = {
        "user_id": id_types[clean.declaration.user_id_type],
        "item_id": id_types[clean.declaration.item_id_type],
        "action": "VARCHAR",
        "event_ts": "BIGINT",
    }
    described = clean.query("SELECT column_name, column_type FROM (DESCRIBE events)").to_pylist()
    types = {row["column_name"]: row["column_type"] for row in described}
    faults = [
        f"{name} is {types.get(name, 'missing')}, not {kind}"
        for name, kind in wanted.items()
        if types.get(name) != kind
    ]
    if not faults:
        filled = clean.query("SELECT count(*) AS num_rows, count(COLUMNS(*)) FROM events").to_pylist()[0]
        missing = {name: filled["num_rows"] - filled[name] for name in wanted}
        faults = [f"{name} is NULL in {count} rows" for name, count in missing.items() if count]
        actions = set(clean.query("SELECT DISTINCT action FROM events")["action"].to_pylist())
        faults += [f"action {action!r} is not declared" for action in actions - set(clean.declaration.actions)]
    return verdict("events schema", faults, "columns, types and actions are as declared")


@dg.asset_check(asset="events", name="conservation", blocking=True)
def events_conservation(platform: Platform) -> dg.AssetCheckResult:
    """Rows in = rows kept + quarantined + duplicates in every partition, and its files hold exactly those rows."""
    import pyarrow.parquet as pq

    faults, num_rows = [], 0
    for folder in sorted((platform.folder() / "events" / platform.dataset_name()).glob("ingest_date=*")):
        facts = storage.read_manifest(folder).facts
        quarantined, num_rows = sum(facts["quarantined"].values()), num_rows + facts["rows_in"]
        accounted = facts["rows_kept"] + facts["duplicates"] + quarantined
        if accounted != facts["rows_in"]:
            faults.append(f"{folder.name}: {facts['rows_in']} rows came in, {accounted} are accounted for")
        for pattern, expected in (("events-*.parquet", facts["rows_kept"]), ("quarantine-*.parquet", quarantined)):
            stored = sum(pq.read_metadata(file).num_rows for file in folder.glob(pattern))
            if stored != expected:
                faults.append(f"{folder.name}: {pattern} hold {stored} rows, the manifest says {expected}")
    return verdict("events conservation", faults, f"all {num_rows} rows are accounted for")


@dg.asset_check(asset="sequences", name="no_leakage", blocking=True)
def no_leakage(platform: Platform) -> dg.AssetCheckResult:
    """No exposure stands before an older one or twice, so that no history can hold its own target."""
    from gr_platform.sequences.dataset import SequenceDataset
    from gr_platform.sequences.splits import check_no_leak

    dataset = SequenceDataset.current(platform.folder(), platform.dataset_name())
    return verdict("sequences no_leakage", check_no_leak(dataset), "no history holds its target")

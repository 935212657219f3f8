"""What must hold of events and sequences; blocking, because a later stage would train on garbage.

Invariant: a check reads finished results only, and its description is the sentence a person needs when it fails.
"""

import time
from collections.abc import Iterator

import dagster as dg

from assets.materialization import table, verdict
from assets.resources import Platform
from gr_platform.events.checks import CHECKS, read_log, report


@dg.multi_asset_check(
    specs=[
        dg.AssetCheckSpec(name, asset="events", description=check.description, blocking=check.blocking)
        for name, check in CHECKS.items()
    ],
    can_subset=True,
)
def events_checks(context: dg.AssetCheckExecutionContext, platform: Platform) -> Iterator[dg.AssetCheckResult]:
    """Every partition judged by every check; an error stops what comes after, a warning is shown."""
    from gr_platform.events.landing import load_declaration

    home, ds = platform.folder(), platform.dataset_name()
    log = read_log(home, ds, load_declaration(home, ds), now_ms=time.time_ns() // 1_000_000)
    chosen = {key.name for key in context.selected_asset_check_keys}
    for name in [name for name in CHECKS if name in chosen]:
        found = report(name, log)
        yield verdict(
            f"events {name}",
            found.faults,
            found.summary,
            severity=dg.AssetCheckSeverity.ERROR if found.is_error else dg.AssetCheckSeverity.WARN,
            metadata={"partitions": dg.MetadataValue.md(table(found.columns, found.rows))},
        )


@dg.asset_check(asset="sequences", name="no_leakage", blocking=True)
def no_leakage(platform: Platform) -> dg.AssetCheckResult:
    """No exposure stands before an older one or twice, so that no history can hold its own target."""
    from gr_platform.sequences.dataset import SequenceDataset
    from gr_platform.sequences.splits import check_no_leak

    dataset = SequenceDataset.current(platform.folder(), platform.dataset_name())
    return verdict("sequences no_leakage", check_no_leak(dataset), "no history holds its target")

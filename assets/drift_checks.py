"""Whether the data or the served model have drifted; warnings, because a day that differs is no fault of any stage.

Invariant: what is measured and from where on it warns stands in the library; here it is shown: a table, a picture.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import dagster as dg

from assets.materialization import picture, table, verdict
from assets.resources import Platform

if TYPE_CHECKING:
    from gr_platform.lifecycle.drift import DriftReport

# Asset -> its checks, a measure of the report each: what it asks for.
CHECKS = {
    "events": {
        "item_drift": "The newest day's events are spread over the items as in the days before it.",
        "action_drift": "The newest day's actions are mixed as in the days before it.",
        "item_share": "No single item swamps the newest day: such a day is an alarm, and no reason to retrain.",
    },
    "served": {
        "score_drift": "The served ranking model scores its newest day as it scored the days before.",
        "online_offline": "Users take up the served model's lists as its own judgement promised.",
    },
    "deployment": {"model_age": "The served models learned from events that are not long past, by the log's clock."},
}


def _specs(asset: str) -> list[dg.AssetCheckSpec]:
    return [dg.AssetCheckSpec(name, asset=asset, description=said) for name, said in CHECKS[asset].items()]


@dg.multi_asset_check(specs=_specs("events"), can_subset=True)
def events_drift(context: dg.AssetCheckExecutionContext, platform: Platform) -> Iterator[dg.AssetCheckResult]:
    """The newest day of events against the days before it."""
    yield from _verdicts(context, platform, "events")


@dg.multi_asset_check(specs=_specs("served"), can_subset=True)
def served_drift(context: dg.AssetCheckExecutionContext, platform: Platform) -> Iterator[dg.AssetCheckResult]:
    """What the served log tells about the model that serves."""
    yield from _verdicts(context, platform, "served")


@dg.multi_asset_check(specs=_specs("deployment"), can_subset=True)
def model_freshness(context: dg.AssetCheckExecutionContext, platform: Platform) -> Iterator[dg.AssetCheckResult]:
    """How old what the served models learned is."""
    yield from _verdicts(context, platform, "deployment")


def _verdicts(context: dg.AssetCheckExecutionContext, platform: Platform, asset: str) -> Iterator[dg.AssetCheckResult]:
    from gr_platform.lifecycle.drift import report

    found = report(platform.folder(), platform.dataset_name())
    chosen = {key.name for key in context.selected_asset_check_keys}
    for name in [name for name in CHECKS[asset] if name in chosen]:
        measure = found[name]
        yield verdict(
            f"{asset} {name}",
            [] if measure.ok else [measure.why],
            measure.why if measure.value is not None else f"not judged: {measure.why}",
            severity=dg.AssetCheckSeverity.WARN,
            metadata=_metadata(name, found),
        )


def _metadata(name: str, found: "DriftReport") -> dict[str, dg.MetadataValue]:
    from gr_platform.evaluation import plots

    measure = found[name]
    numbers = {"value": measure.value, "bound": measure.bound}
    shown: dict[str, dg.MetadataValue] = {
        key: dg.MetadataValue.float(value) for key, value in numbers.items() if value is not None
    }
    shown["day"] = dg.MetadataValue.text(found.day or "no day with enough events")
    rows = {"item_drift": found.items, "item_share": found.items, "action_drift": found.actions}.get(name)
    if rows:
        what = name.split("_")[0]
        shown["shares"] = dg.MetadataValue.md(table([what, "days before", found.day], rows))
        shown["plot"] = dg.MetadataValue.md(picture(plots.shares(rows, ("days before", found.day))))
    return shown

"""The stage that describes clean events for people: counts, distributions and pictures, as one HTML page."""

import dagster as dg

from assets.materialization import Stage, picture, table
from assets.resources import PIPELINE, Platform

# The most telling pictures: each goes to the event log with every run.
SHOWN = ("users", "popularity")


@dg.asset(group_name="data", pool=PIPELINE, kinds={"duckdb", "html"}, deps=["events"])
def data_card(platform: Platform) -> dg.MaterializeResult:
    """What the events look like: sizes, popularity, time, order, partitions; aggregates only."""
    from gr_platform.events.card_html import PAGE, build_card

    stage = Stage("data_card")
    home, ds = platform.folder(), platform.dataset_name()
    result = build_card(home, ds)
    facts = result.manifest.facts
    images = [picture((result.folder / f"{name}.png").read_bytes()) for name in SHOWN]
    return stage.finish(
        digest=result.manifest.digest,
        reused=result.reused,
        figures=facts["numbers"] | {"page": f"{(result.folder / PAGE).relative_to(home)} (or: gr card)"},
        preview="\n\n".join([table(["figure", "value"], facts["figures"].items()), *images]),
        plot=(result.folder / "days.png").read_bytes(),
    )

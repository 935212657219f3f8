"""The data card as one HTML page, and as a few lines of figures; and where the current one lies.

Invariant: the page needs nothing but itself (styles and pictures are inside), every text in it is escaped, and the same
events give the same bytes.
"""

import base64
import datetime
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gr_platform import settings, storage
from gr_platform.errors import UserError
from gr_platform.events.card import Card, make_card
from gr_platform.events.card_plots import draw
from gr_platform.events.partitions import partition_facts

PAGE = "data_card.html"
KIND = "data_card"
# Of what the card shows and how: raised with either, so that no card of an older release is taken for this one's.
VERSION = 1
SHOWN_PARTITIONS = 60
NONE = "-"
_NUMBERS = ("num_events", "num_users", "num_items", "density", "gini", "repeats", "ties", "out_of_order")
_ALT = {
    "users": "How many users have how many events",
    "items": "How many items have how many events",
    "popularity": "Which share of the events falls on the most popular items",
    "days": "Events over time",
    "hours": "Events by hour of day",
    "gaps": "Time between two events of a user",
}
_FACTS = {
    "rows in": "rows_in",
    "kept": "rows_kept",
    "duplicates": "duplicates",
    "late": "num_late",
    "users": "num_users",
    "new users": "num_new_users",
    "items": "num_items",
    "new items": "num_new_items",
}


def build_card(home: Path, ds: str) -> storage.Result:
    """Return the card of a data set's clean events, made unless these events have one; it becomes the current card.

    Facts: `numbers` (name -> number), `figures` (label -> text). Files: the page and `<name>.png` of each picture.
    Raises UserError if nothing was ingested yet.
    """
    from gr_platform.events.ingest import clean_events

    clean, partitions = clean_events(home, ds), partition_facts(home, ds)

    def build(folder: Path) -> dict[str, Any]:
        card = make_card(clean, partitions)
        pictures = draw(card)
        for name, png in pictures.items():
            (folder / f"{name}.png").write_bytes(png)
        (folder / PAGE).write_text(render(card, pictures, clean.digest), encoding="utf-8")
        numbers = {name: getattr(card, name) for name in _NUMBERS if getattr(card, name) is not None}
        return {"numbers": numbers, "figures": figures(card)}

    spec = {
        "version": VERSION,
        "events": clean.digest,
        "declaration": clean.declaration.to_json(),
        "partitions": storage.digest_of([[date, facts] for date, facts in partitions]),
    }
    parent = home / "cards" / ds
    result = storage.ensure(parent, KIND, spec, build)
    storage.point(parent, KIND, result.folder)
    return result


def copy_card(home: Path, ds: str | None, out: Path) -> str:
    """Copy the current card's page to `out` and return its data set's name (ds None: the active one).

    Raises UserError if there is no card yet, or nowhere to write it.
    """
    from gr_platform.events.landing import active_dataset

    name = ds or settings.dataset() or active_dataset(home)
    page = storage.current(home / "cards" / name, KIND) / PAGE
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{out.name} cannot be written: name a file in a folder that exists with --out")
    shutil.copyfile(page, out)
    return name


def figures(card: Card) -> dict[str, str]:
    """Return the card's main figures, label -> text."""
    return {
        "events": f"{card.num_events:,}",
        "users": f"{card.num_users:,}",
        "items": f"{card.num_items:,}",
        "days": f"{(card.last_ts - card.first_ts) / 86_400_000:,.0f}",
        "partitions": f"{len(card.partitions):,}",
        "density": _percent(card.density),
        "median events a user": _short(card.per_user.quantiles["median"]),
        "median events an item": _short(card.per_item.quantiles["median"]),
        "Gini of item popularity": f"{card.gini:.2f}",
        "repeated items": _percent(card.repeats),
        "ties in time": _percent(card.ties),
        "out of order": _percent(card.out_of_order),
    }


def render(card: Card, pictures: Mapping[str, bytes], digest: str) -> str:
    """Return the page; pictures: name -> PNG as `card_plots.draw` gives them, digest: of the events."""
    import jinja2
    from markupsafe import Markup

    def picture(name: str) -> Markup:
        data = base64.b64encode(pictures[name]).decode()
        return Markup('<figure><h3>{}</h3><img alt="{}" src="data:image/png;base64,{}"></figure>').format(
            _ALT[name], _ALT[name], data
        )

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"whole": "{:,}".format, "percent": _percent, "short": _short, "day": _day}
    newest = card.partitions[::-1]
    quarantined = sum(card.quarantined.values())
    kept = card.rows_in - card.duplicates - quarantined
    return environment.get_template(PAGE).render(
        card=card,
        digest=digest[:16],
        tiles=list(figures(card).items()),
        funnel=[("kept", kept), ("duplicates", card.duplicates), ("quarantined", quarantined)],
        order=[
            ("share their time with the event before", _percent(card.ties)),
            ("are of an item that the user had before", _percent(card.repeats)),
            ("came in after a later event of the user", _percent(card.out_of_order)),
            ("median time since the event before", _duration(card.median_gap_s)),
        ],
        partition_columns=["date", *_FACTS],
        partition_rows=[
            [date, *(f"{facts[key]:,}" if facts.get(key) is not None else NONE for key in _FACTS.values())]
            for date, facts in newest[:SHOWN_PARTITIONS]
        ],
        num_hidden=max(0, len(newest) - SHOWN_PARTITIONS),
        declaration=[(name, _declared(value)) for name, value in card.declaration.items()],
        picture=picture,
    )


def _declared(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_declared(entry)}" for name, entry in value.items()) or NONE
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or NONE
    return str(value)


def _percent(share: float | None) -> str:
    if share is None:
        return NONE
    # "100 %" is said of all only.
    return f"{100 * share:.{5 if 0.9995 <= share < 1 else 3}g} %"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _day(ms: int) -> str:
    return (datetime.date(1970, 1, 1) + datetime.timedelta(days=ms // 86_400_000)).isoformat()


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    for unit, name in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"

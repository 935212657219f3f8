"""The pictures of a data card.

Invariant: every picture is one PNG below 50 KB that shows counts of many, drawn without matplotlib's global state; the
same figures give the same bytes.
"""

import datetime
import io
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from gr_platform.events.card import GAP_BINS_A_DECADE, Card, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOUR, QUIET, GRID = "#2f6f9f", "#5b6570", "#e4e8ec"
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400
# Where a person looks on an axis of times.
_TIMES = {
    _MINUTE: "1 min",
    _HOUR: "1 h",
    _DAY: "1 day",
    7 * _DAY: "1 week",
    30 * _DAY: "1 month",
    365 * _DAY: "1 year",
}


def draw(card: Card) -> dict[str, bytes]:
    """Return name -> PNG of every picture: users, items, popularity, days, hours, gaps."""
    return {
        "users": _png(lambda axes: _spread(axes, card.per_user, "events of a user", "users")),
        "items": _png(lambda axes: _spread(axes, card.per_item, "events of an item", "items")),
        "popularity": _png(lambda axes: _popularity(axes, card)),
        "days": _png(lambda axes: _days(axes, card)),
        "hours": _png(lambda axes: _hours(axes, card)),
        "gaps": _png(lambda axes: _gaps(axes, card)),
    }


def _spread(axes: "Axes", spread: Spread, xlabel: str, ylabel: str) -> None:
    edges = spread.edges
    widths = [right - left for left, right in itertools.pairwise(edges)]
    axes.bar(edges[:-1], spread.counts, widths, align="edge", color=COLOUR, edgecolor="white", linewidth=0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    median = spread.quantiles["median"]
    axes.axvline(median, color="black", linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    axes.annotate(
        f"median {median:,.0f}",
        (median, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(4, 3),
        textcoords="offset points",
        color=QUIET,
        fontsize=8,
    )
    _counts(axes, ylabel)
    axes.set_xlabel(xlabel)


def _popularity(axes: "Axes", card: Card) -> None:
    items, events = [point[0] for point in card.curve], [point[1] for point in card.curve]
    axes.plot(items, events, color=COLOUR, linewidth=2)
    axes.fill_between(items, events, color=COLOUR, alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set(
        xlim=(card.curve[0][0], 1), ylim=(0, 1), xlabel="most popular share of the items", ylabel="share of events"
    )
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def _days(axes: "Axes", card: Card) -> None:
    import matplotlib.dates as dates

    starts = [_date(card.first_day + index * card.days_a_bar) for index in range(len(card.days))]
    axes.bar(dates.date2num(starts), card.days, card.days_a_bar, align="edge", color=COLOUR)
    locator = dates.AutoDateLocator(minticks=3, maxticks=7)
    axes.xaxis_date()
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator, show_offset=False))
    per = "day" if card.days_a_bar == 1 else f"{card.days_a_bar} days"
    axes.set_xlabel(f"{starts[0]} to {_date(card.last_ts // (1000 * _DAY))}")
    _counts(axes, f"events per {per}")


def _hours(axes: "Axes", card: Card) -> None:
    axes.bar(range(24), card.hours, 0.85, color=COLOUR)
    axes.set_xticks(range(0, 24, 3), [f"{hour:02}" for hour in range(0, 24, 3)])
    axes.set_xlabel("hour of day (UTC)")
    _counts(axes, "events")


def _gaps(axes: "Axes", card: Card) -> None:
    edges = [10 ** (index / GAP_BINS_A_DECADE) for index in range(len(card.gaps))]
    # Below a second: one bar left of the axis' 1 s, as wide as the others.
    lefts = [edges[0] / 10 ** (1 / GAP_BINS_A_DECADE), *edges[:-1]]
    widths = [right - left for left, right in zip(lefts, edges, strict=True)]
    axes.bar(lefts, card.gaps, widths, align="edge", color=COLOUR, edgecolor="white", linewidth=0.6)
    axes.set_xscale("log")
    filled = [index for index, count in enumerate(card.gaps) if count] or [0]
    axes.set_xlim(lefts[0], max(edges[filled[-1]], 100))
    below: dict[float, str] = {(lefts[0] * edges[0]) ** 0.5: "< 1 s"}
    shown = below | {at: label for at, label in _TIMES.items() if at <= axes.get_xlim()[1]}
    axes.set_xticks(list(shown), list(shown.values()), rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xticks([], minor=True)
    axes.set_xlabel("time since the user's event before")
    _counts(axes, "events")


def _counts(axes: "Axes", label: str) -> None:
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))


def _short(value: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g} {letter}"
    return f"{value:g}"


def _date(day: int) -> datetime.date:
    return datetime.date(1970, 1, 1) + datetime.timedelta(days=day)


def _png(plot: Callable[["Axes"], None]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 2.7), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # Fixed margins: matplotlib's own layout would draw every picture twice.
    figure.subplots_adjust(left=0.14, right=0.95, top=0.91, bottom=0.22)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID)
    axes.tick_params(colors=QUIET, labelsize=8, which="both", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    plot(axes)
    axes.xaxis.label.set(color=QUIET, fontsize=9)
    axes.yaxis.label.set(color=QUIET, fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()

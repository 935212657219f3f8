"""The pictures of a replay's report.

Invariant: every picture is one PNG, drawn without matplotlib's global state; what is missing is left out, never drawn
as zero, and what was wrong with a day is marked in every picture of days.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DAILY, FROZEN, REFUSED, QUIET, GRID = "#2f6f9f", "#d08c2e", "#b4473c", "#5b6570", "#e4e8ec"
SWAP = "#c9dcec"
Facts = Mapping[str, Any]


def quality(days: Sequence[Facts], kind: str, figure: str, label: str) -> bytes:
    """Return a figure of the daily and the frozen model by day with intervals, promotions and refusals marked."""

    def plot(axes: "Axes") -> None:
        for model, colour, name in (("frozen", FROZEN, "frozen on day 1"), ("daily", DAILY, "retrained daily")):
            points = [(day["number"], day[kind][figure][model]) for day in days if day.get(kind)]
            values = np.array([point["value"] for _, point in points], float)
            bounds = np.array([[point.get("low"), point.get("high")] for _, point in points], float).reshape(-1, 2)
            errors = np.nan_to_num(np.abs(bounds - values[:, None])).T
            places = [number for number, _ in points]
            axes.errorbar(places, values, errors, color=colour, marker="o", markersize=5, capsize=3, label=name)
        # Room for the names of faults above and for the marks of promotions below.
        axes.margins(y=0.14)
        axes.tick_params(axis="x", pad=9)
        _mark_outcomes(axes, days)
        axes.set(xlabel="day of the replay that the models are asked about", ylabel=label)
        axes.set_xticks([day["number"] for day in days])
        _key(axes)

    return _png(plot)


def latency(load: Facts) -> bytes:
    """Return P50 and P99 over time, swaps shaded."""

    def plot(axes: "Axes") -> None:
        _swaps(axes, load)
        for name, colour, label in (("p50_ms", DAILY, "median"), ("p99_ms", REFUSED, "P99")):
            at, values = _over_time(load, name)
            axes.plot(at, values, color=colour, linewidth=1.4, label=label)
        axes.set(ylabel="latency in ms", yscale="log")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 2.0), max(high, 200.0))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter("")
        _key(axes)

    return _png(plot)


def requests(load: Facts) -> bytes:
    """Return answered requests and failures over time, swaps shaded."""

    def plot(axes: "Axes") -> None:
        _swaps(axes, load)
        width = _width(load)
        at, answered = _over_time(load, "answered")
        _, total = _over_time(load, "requests")
        lost = np.array(total) - np.array(answered)
        axes.bar(at, answered, 0.7 * width, align="edge", color=DAILY, label="answered")
        axes.bar(
            at, lost, 0.7 * width, bottom=answered, align="edge", color=REFUSED, label="failed, refused or too late"
        )
        axes.set(ylabel=f"requests in {width:g} s", ylim=(0, 1.25 * max(total, default=1)))
        _key(axes)

    return _png(plot)


def hit_rate(load: Facts) -> bytes:
    """Return the share of history tokens found in the cache over time, swaps shaded."""

    def plot(axes: "Axes") -> None:
        _swaps(axes, load)
        axes.plot(*_over_time(load, "hit_rate"), color=DAILY, linewidth=1.4, label="found in the cache")
        axes.set(ylabel="history tokens, %", ylim=(0, 102))
        _key(axes)

    return _png(plot)


def _mark_outcomes(axes: "Axes", days: Sequence[Facts]) -> None:
    shown = {
        "promoted": {"marker": "^", "color": DAILY, "label": "that night's model promoted"},
        "refused": {"marker": "X", "color": REFUSED, "label": "that night's model refused"},
    }
    transform = axes.get_xaxis_transform()
    for outcome, style in shown.items():
        places = [day["number"] for day in days if day["outcome"] == outcome]
        if places:
            axes.scatter(places, [0.0] * len(places), s=46, clip_on=False, transform=transform, zorder=4, **style)  # type: ignore[arg-type]
    for day in days:
        if day.get("fault"):
            axes.axvspan(day["number"] - 0.4, day["number"] + 0.4, color=REFUSED, alpha=0.08, linewidth=0)
            axes.text(
                day["number"], 0.97, day["fault"], transform=transform, ha="center", va="top", color=REFUSED, fontsize=8
            )


def _swaps(axes: "Axes", load: Facts) -> None:
    for number, swap in enumerate(load["swaps"]):
        label = "a new model is deployed" if not number else None
        # A band thinner than a pixel would not be seen.
        end = swap["at_s"] + max(swap["seconds"], _width(load) / 2)
        axes.axvspan(swap["at_s"], end, color=SWAP, linewidth=0, label=label, zorder=0)
    for day, at in load["day_starts_s"]:
        axes.axvline(at, color=QUIET, linewidth=0.6, linestyle=(0, (2, 3)), zorder=1)
        axes.text(at, 1.01, f" day {day}", transform=axes.get_xaxis_transform(), color=QUIET, fontsize=8)
    axes.set_xlabel("seconds since the load began")


def _over_time(load: Facts, name: str) -> tuple[list[float], list[float]]:
    entries = load["timeline"]
    return [entry["at_s"] for entry in entries], [np.nan if entry[name] is None else entry[name] for entry in entries]


def _width(load: Facts) -> float:
    entries = load["timeline"]
    return float(entries[1]["at_s"] - entries[0]["at_s"]) if len(entries) > 1 else 1.0


def _key(axes: "Axes") -> None:
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.05), handlelength=1.6)


def _png(plot: Callable[["Axes"], None]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.3), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID)
    axes.tick_params(colors=QUIET, labelsize=9, which="both", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    plot(axes)
    axes.xaxis.label.set(color=QUIET, fontsize=9)
    axes.yaxis.label.set(color=QUIET, fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()

"""Small pictures for the asset page and the experiment tracker.

Invariant: every function returns one PNG as bytes, below 50 KB, without touching matplotlib's global state.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gr_platform.evaluation.slices import SLICES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def learning_curve(curves: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the training loss and each validation figure by epoch, one panel each, as PNG bytes.

    curves: entries {"phase", "epoch", "loss", figure...} as training writes them; None is left out. A phase is a line.
    """
    counted = ("phase", "epoch", "tokens", "num_targets")
    names = [name for name in (curves[0] if curves else {}) if name not in counted]
    phases = list(dict.fromkeys(entry.get("phase", "") for entry in curves))

    def draw(axes: list["Axes"]) -> None:
        for axis, name in zip(axes, names, strict=True):
            for phase in phases:
                entries = [entry for entry in curves if entry.get("phase", "") == phase]
                values = [np.nan if entry.get(name) is None else entry[name] for entry in entries]
                axis.plot([entry["epoch"] for entry in entries], values, marker="o", markersize=3, label=phase)
            axis.set(title=name, xlabel="epoch")
        if len(phases) > 1:
            axes[0].legend(fontsize=6)

    return _png(draw, panels=len(names))


def metric_bars(models: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> bytes:
    """Return the figures `names` of each model side by side as PNG bytes; a missing or None figure has no bar."""

    def draw(axes: list["Axes"]) -> None:
        width = 0.8 / max(1, len(models))
        for index, (label, metrics) in enumerate(models.items()):
            heights = [metrics.get(name) or 0.0 for name in names]
            bars = axes[0].bar(np.arange(len(names)) + index * width, heights, width, label=label)
            axes[0].bar_label(bars, fmt="%.3f", fontsize=6)
        axes[0].set_xticks(np.arange(len(names)) + width * (len(models) - 1) / 2, list(names))
        axes[0].legend()

    return _png(draw, panels=1, panel_width=6.4)


def slices(rows: Sequence[Mapping[str, Any]], figure: str = "hr_at_10") -> bytes:
    """Return a figure by bin with its standard error, one panel a slice, as PNG bytes.

    rows: those of `slices.slice_table`.
    """
    names = list(dict.fromkeys(row["slice"] for row in rows))

    def draw(axes: list["Axes"]) -> None:
        for axis, name in zip(axes, names, strict=True):
            bins = [row for row in rows if row["slice"] == name]
            labels = [f"{_short(row['lower'])}\nto {_short(row['upper'])}" for row in bins]
            errors = [row[f"{figure}_error"] or 0.0 for row in bins]
            axis.errorbar(range(len(bins)), [row[figure] for row in bins], errors, marker="o", markersize=3, capsize=3)
            axis.set_xticks(range(len(bins)), labels, fontsize=6)
            axis.set(title=f"{figure} by {name.replace('_', ' ')}", xlabel=SLICES[name], ylim=(0, None))

    return _png(draw, panels=len(names))


def calibration(tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Return each task's reliability curve beside the diagonal as PNG bytes; task -> `metrics.calibration_bins`."""

    def draw(axes: list["Axes"]) -> None:
        axes[0].plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for task, bins in tasks.items():
            predicted, observed = ([each[name] for each in bins] for name in ("predicted", "observed"))
            axes[0].plot(predicted, observed, marker="o", markersize=3, label=task)
        axes[0].set(title="calibration", xlabel="predicted", ylabel="observed")
        axes[0].legend()

    return _png(draw, panels=1)


def served(days: Sequence[Mapping[str, Any]], positions: Sequence[int]) -> bytes:
    """Return requests and hit rate by day, and hits by place in the list, as PNG bytes.

    days: entries {"date", "num_requests", "hit_rate"}, a rate of None is left out. positions: hits on place 1, 2...
    """

    def draw(axes: list["Axes"]) -> None:
        places = np.arange(len(days))
        axes[0].bar(places, [day["num_requests"] for day in days], color="lightgrey")
        axes[0].set(title="requests by day")
        rates = [np.nan if day["hit_rate"] is None else day["hit_rate"] for day in days]
        axes[1].plot(places, rates, marker="o", markersize=3)
        axes[1].set(title="hit rate by day", ylim=(0, None))
        for axis in axes[:2]:
            shown = places[:: max(1, len(days) // 4)]
            axis.set_xticks(shown, [days[place]["date"][5:] for place in shown], fontsize=6)
        axes[2].bar(np.arange(1, len(positions) + 1), positions)
        axes[2].set(title="hits by place in the list")

    return _png(draw, panels=3)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2g}"


def _png(draw: Callable[[list["Axes"]], None], *, panels: int, panel_width: float = 3.2) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(panel_width * max(1, panels), 2.6), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    draw([figure.add_subplot(1, max(1, panels), index + 1) for index in range(panels)])
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()

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

    curves: entries {"epoch", "loss", figure...} as training writes them; a None is left out.
    """
    epochs = [entry["epoch"] for entry in curves]
    names = [name for name in (curves[0] if curves else {}) if name not in ("epoch", "tokens", "num_targets")]

    def draw(axes: list["Axes"]) -> None:
        for axis, name in zip(axes, names, strict=True):
            values = [np.nan if entry.get(name) is None else entry[name] for entry in curves]
            axis.plot(epochs, values, marker="o", markersize=3)
            axis.set(title=name, xlabel="epoch")

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


def compute_against_quality(runs: Sequence[Mapping[str, Any]], figure: str = "hr_at_10") -> bytes:
    """Return training compute on a log axis against a figure, a labelled point a run, as PNG bytes.

    runs: entries {"name", "train_flops", figure}; one without compute or figure is left out.
    """
    shown = [run for run in runs if run.get("train_flops") and run.get(figure) is not None]

    def draw(axes: list["Axes"]) -> None:
        axes[0].scatter([run["train_flops"] / 1e15 for run in shown], [run[figure] for run in shown], s=14)
        for run in shown:
            place = (run["train_flops"] / 1e15, run[figure])
            axes[0].annotate(run["name"], place, fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes[0].set(xscale="log", xlabel="training compute, PFLOP", ylabel=figure)
        axes[0].margins(x=0.2, y=0.1)

    return _png(draw, panels=1, panel_width=6.4)


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

"""Small pictures for the asset page and the experiment tracker.

Invariant: every function returns one PNG as bytes, below 50 KB, without touching matplotlib's global state.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

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


def _png(draw: Callable[[list["Axes"]], None], *, panels: int, panel_width: float = 3.2) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(panel_width * max(1, panels), 2.6), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    draw([figure.add_subplot(1, panels, index + 1) for index in range(panels)])
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()

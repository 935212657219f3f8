"""The one picture that no library stage draws: how a quantity is distributed.

Invariant: drawn on a figure of its own (no pyplot state), so drawing in a worker thread is safe.
"""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def histogram(values: "np.ndarray", xlabel: str) -> bytes:
    """Return the histogram of a numeric array as a small PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 2.6), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.hist(values, bins=40)
    axes.set_xlabel(xlabel)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()

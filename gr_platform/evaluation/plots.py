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

# So many standard errors around a mean hold it 95 times of 100.
NORMAL_95 = 1.96
_NAMES = {
    "mrr": "MRR",
    "ne": "NE",
    "log_loss": "log loss",
    "auc": "AUC",
    "gauc": "GAUC",
    "ece": "ECE",
    "calibration": "calibration",
}


def learning_curve(curves: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the training loss and each validation figure by epoch, one panel each, as PNG bytes.

    curves: entries {"phase", "epoch", "loss", figure...} as training writes them; None is left out. A phase is a line.
    """
    counted = ("phase", "epoch", "tokens", "num_targets", "train_flops", "seconds")
    names = [name for name in (curves[0] if curves else {}) if name not in counted]
    phases = list(dict.fromkeys(entry.get("phase", "") for entry in curves))

    def draw(axes: list["Axes"]) -> None:
        for axis, name in zip(axes, names, strict=True):
            for phase in phases:
                entries = [entry for entry in curves if entry.get("phase", "") == phase]
                values = [np.nan if entry.get(name) is None else entry[name] for entry in entries]
                axis.plot([entry["epoch"] for entry in entries], values, marker="o", markersize=3, label=phase)
            axis.set(title="training loss" if name == "loss" else f"validation {label_of(name)}", xlabel="epoch")
            axis.locator_params(axis="x", integer=True)
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
        axes[0].set_xticks(np.arange(len(names)) + width * (len(models) - 1) / 2, [label_of(name) for name in names])
        # Room above the tallest bar for its number and the legend.
        axes[0].margins(y=0.25)
        axes[0].legend(fontsize=7, ncols=max(1, len(models)), loc="upper center")

    return _png(draw, panels=1, panel_width=6.4)


def slices(rows: Sequence[Mapping[str, Any]], figure: str = "hr_at_10") -> bytes:
    """Return a figure by bin with its 95 % interval, one panel a slice, as PNG bytes.

    rows: those of `slices.slice_table`.
    """

    def draw_bins(axis: "Axes", bins: Sequence[Mapping[str, Any]]) -> None:
        errors = [NORMAL_95 * (row[f"{figure}_error"] or 0.0) for row in bins]
        # No figure is below 0, and no interval is drawn there.
        below = [min(error, row[figure]) for error, row in zip(errors, bins, strict=True)]
        values = [row[figure] for row in bins]
        axis.errorbar(range(len(bins)), values, [below, errors], marker="o", markersize=3, capsize=3)
        axis.set(ylim=(0, None))

    return _by_slice(rows, label_of(figure), draw_bins)


def slice_differences(rows: Sequence[Mapping[str, Any]], figure: str = "HR@10") -> bytes:
    """Return how much better or worse a challenger is by bin, with 95 % intervals, one panel a slice, as PNG bytes.

    rows: entries {"slice", "bin", "lower", "upper", "difference", "low", "high"}, challenger minus champion.
    """

    def draw_bins(axis: "Axes", bins: Sequence[Mapping[str, Any]]) -> None:
        _whiskers(axis, range(len(bins)), bins, upright=True)
        axis.axhline(0, color="grey", linewidth=0.8)

    return _by_slice(rows, f"gain in {figure}", draw_bins)


def differences(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Return the relative difference of each figure with its 95 % interval, a line each, as PNG bytes.

    rows: the fields of `significance.Difference` (a: champion, b: challenger). One whose a is 0 is left out.
    """
    shown = [row for row in rows if row["a"]]
    scaled = [{name: 100 * row[name] / abs(row["a"]) for name in ("difference", "low", "high")} for row in shown]

    def draw(axes: list["Axes"]) -> None:
        places = range(len(shown) - 1, -1, -1)
        _whiskers(axes[0], places, scaled, upright=False)
        axes[0].axvline(0, color="grey", linewidth=0.8)
        labels = [f"{label_of(row['figure'])}{' (less is better)' if is_loss(row['figure']) else ''}" for row in shown]
        axes[0].set_yticks(places, labels, fontsize=7)
        axes[0].set(title=title, xlabel="difference to the champion, % (95 % interval)")
        axes[0].margins(y=0.15)

    return _png(draw, panels=1, panel_width=6.4)


def calibration(tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Return each task's reliability curve beside the diagonal as PNG bytes; task -> `metrics.calibration_bins`.

    Bins that say how many targets they hold get their 95 % interval (Wilson's).
    """
    ends = [each[name] for bins in tasks.values() for each in bins for name in ("predicted", "observed")]

    def draw(axes: list["Axes"]) -> None:
        end = min(1.0, 1.3 * max(ends, default=1.0))
        axes[0].plot([0, end], [0, end], color="grey", linewidth=0.8)
        for task, bins in tasks.items():
            predicted, observed = ([each[name] for each in bins] for name in ("predicted", "observed"))
            intervals = [_wilson(each["observed"], each.get("num_targets", 0)) for each in bins]
            errors = [[o - low, high - o] for o, (low, high) in zip(observed, intervals, strict=True)]
            axes[0].errorbar(
                predicted,
                observed,
                np.array(errors).T if errors else None,
                marker="o",
                markersize=3,
                elinewidth=0.6,
                capsize=2,
                label=task,
            )
        axes[0].set(title="calibration by bins of equal size", xlim=(0, end), ylim=(0, None))
        axes[0].set(xlabel="predicted probability", ylabel="observed share")
        axes[0].legend(fontsize=7)

    return _png(draw, panels=1, panel_width=4.8)


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


def label_of(figure: str) -> str:
    """Return what a figure is called before people: `HR@10` of hr_at_10, `NE of like` of like_ne or ne_like."""
    name, _, cut = figure.partition("_at_")
    if cut:
        return f"{name.upper()}@{cut}"
    if figure in _NAMES:
        return _NAMES[figure]
    for short, long in _NAMES.items():
        if figure.endswith(f"_{short}"):
            return f"{long} of {figure.removesuffix(f'_{short}')}"
        if figure.startswith(f"{short}_"):
            return f"{long} of {figure.removeprefix(f'{short}_')}"
    return figure.replace("_", " ")


def is_loss(figure: str) -> bool:
    """Return whether less of a figure is better."""
    return "log_loss" in figure or bool({"ne", "ece"} & set(figure.split("_")))


def _by_slice(
    rows: Sequence[Mapping[str, Any]], what: str, draw_bins: Callable[["Axes", Sequence[Mapping[str, Any]]], None]
) -> bytes:
    names = list(dict.fromkeys(row["slice"] for row in rows))

    def draw(axes: list["Axes"]) -> None:
        for axis, name in zip(axes, names, strict=True):
            bins = [row for row in rows if row["slice"] == name]
            draw_bins(axis, bins)
            axis.set_xticks(range(len(bins)), [_span(row) for row in bins], fontsize=6)
            axis.set(title=f"by {name.replace('_', ' ')}", xlabel=SLICES[name])
            axis.margins(x=0.1)
        if axes and names:
            axes[0].set(ylabel=f"{what} (95 % interval)")

    return _png(draw, panels=len(names))


def _whiskers(axis: "Axes", places: Sequence[int], rows: Sequence[Mapping[str, float]], *, upright: bool) -> None:
    values = [row["difference"] for row in rows]
    errors = np.array([[row["difference"] - row["low"], row["high"] - row["difference"]] for row in rows]).reshape(
        -1, 2
    )
    if upright:
        axis.errorbar(places, values, yerr=errors.T, fmt="o", markersize=4, capsize=3)
    else:
        axis.errorbar(values, places, xerr=errors.T, fmt="o", markersize=4, capsize=3)


def _wilson(share: float, num: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `num` (Wilson's, which never leaves [0, 1]); itself where num is 0."""
    if not num:
        return share, share
    spread = NORMAL_95**2 / num
    middle = (share + spread / 2) / (1 + spread)
    half = NORMAL_95 * np.sqrt(share * (1 - share) / num + spread / (4 * num)) / (1 + spread)
    return float(min(share, middle - half)), float(max(share, middle + half))


def _span(row: Mapping[str, Any]) -> str:
    """Return a bin's values, under its name where that says more than its number."""
    named = f"{row['bin']}\n" if " of " not in str(row.get("bin", " of ")) else ""
    return f"{named}{_short(row['lower'])}\nto {_short(row['upper'])}"


def shares(rows: Sequence[Sequence[Any]], sides: tuple[str, str]) -> bytes:
    """Return two shares of each name beside each other, from the top down, as PNG bytes.

    rows: (name, share of the first side, share of the second).
    """

    def draw(axes: list["Axes"]) -> None:
        places = np.arange(len(rows))
        for at, side in enumerate(sides, start=1):
            axes[0].barh(places + 0.4 * (at - 1), [row[at] for row in rows], 0.4, label=side)
        axes[0].set_yticks(places + 0.2, [_clipped(str(row[0])) for row in rows], fontsize=7)
        axes[0].invert_yaxis()
        axes[0].xaxis.set_major_formatter("{x:.1%}")
        axes[0].tick_params(axis="x", labelsize=7)
        axes[0].legend(fontsize=7)

    return _png(draw, panels=1, panel_width=4.8)


def _clipped(name: str) -> str:
    # A $ would begin a formula.
    return (name if len(name) <= 24 else f"{name[:23]}…").replace("$", r"\$")


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

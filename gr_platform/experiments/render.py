"""A report as Markdown and as a picture: what docs/results, the asset page and the tracker show.

Invariant: made from the report alone, so a page made again from the same JSON file is the same.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gr_platform.experiments.report import Report, by_label, means

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHORT = 1e4
# What a plot calls figures that no table has a column of.
MEASURES = {
    "length": "tokens a user",
    "train_ms": "training step, ms",
    "infer_ms": "inference, ms",
    "train_mb": "training step, peak MB",
    "infer_mb": "inference, peak MB",
    "train_flops": "training compute, FLOPs",
}


def section(report: Report, picture: str = "") -> str:
    """Return everything that is said of an experiment; `picture` is the address of its plot."""
    parts = [f"**Question.** {report['question']}", f"**Protocol.** {report['protocol']}", provenance(report)]
    parts += tables(report)
    parts += report["derived"].get("lines", [])
    if picture and report["rows"]:
        parts.append(f"![{report['title']}]({picture})")
    return "\n\n".join([*parts, shortfall(report)])


def provenance(report: Report) -> str:
    """Return the machines, dates, commits, seeds and the command of the rows in one paragraph."""
    rows = report["rows"]
    if not rows:
        return f"No cell has run yet: `gr experiment {report['name']}`."

    def every(values: Iterable[Any]) -> str:
        return ", ".join(sorted({str(value) for value in values if value is not None})) or "none"

    sequences = every(f"{row['dataset']} {row['sequences'][:12]}" for row in rows if row["dataset"])
    commits = every(row["commit"][:10] for row in rows if row["commit"])
    lettered = machines(report)
    computed = (
        "; ".join(f"machine {letter}: {machine}" for machine, letter in lettered.items())
        if len(lettered) > 1
        else f"machine: {every(lettered)}"
    )
    return (
        f"`gr experiment {report['name']}`; {computed}; "
        f"date: {every(row['date'] for row in rows)}; commit: {commits}; "
        f"seeds: {every(row['seed'] for row in rows)}; sequences: {sequences}. Digests stand in the JSON file."
    )


def machines(report: Report) -> dict[str, str]:
    """Return the letter that each machine of the rows goes by."""
    found = sorted({row["machine"] for row in report["rows"]})
    return {machine: chr(ord("A") + place) for place, machine in enumerate(found)}


def tables(report: Report) -> list[str]:
    """Return the tables of a report, one row a label: mean and standard deviation over seeds, then published rows."""
    return [table_of(report, table) for table in report["tables"]]


def table_of(report: Report, table: Mapping[str, Any], figures: Iterable[str] = ()) -> str:
    """Return one table of a report; figures: the columns to show, all of them if none is named."""
    columns: dict[str, str] = {name: table["columns"][name] for name in figures} or table["columns"]
    labels, lettered = by_label(report["rows"], table["group"]), machines(report)
    # Where several computed, costs can be compared on one of them alone.
    last = ["seeds", "machine"] if len(lettered) > 1 else ["seeds"]
    lines = [_line(["", *columns.values(), *last]), _line(["---", *("---:" for _ in (*columns, *last))])]
    for label, rows in labels.items():
        cells = [cell_of(means(rows, figure)) for figure in columns]
        computed = "".join(sorted({lettered[row["machine"]] for row in rows}))
        lines.append(_line([label, *cells, *[str(len(rows)), computed][: len(last)]]))
    for each in table["published"]:
        cells = [number(each["figures"][name]) if name in each["figures"] else "" for name in columns]
        lines.append(_line([f"*{each['label']}*", *cells, *("" for _ in last)]))
    title = f"**{table['title']}**\n\n" if table["title"] else ""
    return title + "\n".join(lines)


def shortfall(report: Report) -> str:
    """Return which targets are missed, which are reached, and which cells are missing."""
    said = []
    for target in report["targets"]:
        within = f" within {target['within']:g}" if target["within"] else ""
        verdict = {True: "reached", False: "**missed**", None: "not measured yet"}[target["reached"]]
        found = means(by_label(report["rows"], target["group"]).get(target["label"], []), target["figure"])
        value = "" if found is None else f" ({cell_of(found)})"
        said.append(f"- {target['label']}: {target['figure']} >= {target['value']:g}{within}: {verdict}{value}")
    if report["missing"]:
        said.append(f"- not run yet: {', '.join(report['missing'])}")
    return "**What falls short.**\n\n" + ("\n".join(said) if said else "- no target was set; all cells ran")


def cell_of(found: tuple[float, float | None, int] | None) -> str:
    """Return a mean with its deviation as text."""
    if found is None:
        return "-"
    mean, deviation, _ = found
    return number(mean) + ("" if deviation is None else f" +- {number(deviation)}")


def number(value: float) -> str:
    """Return a figure as text: four decimals below ten, fewer above, powers of ten for the very large."""
    if value == int(value) and abs(value) < SHORT:
        return str(int(value))
    if abs(value) < 10:
        return f"{value:.4f}"
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"


def plot(report: Report) -> bytes:
    """Return the report's picture as PNG below 50 KB."""
    wanted = report["plot"]
    shown = {"bars": _bars, "points": _points, "curves": _curves}[wanted["kind"]]
    names = wanted["y"]

    def draw(axes: list["Axes"]) -> None:
        for axis, name in zip(axes, names, strict=True):
            shown(axis, report, name)

    height = 3.2
    if wanted["kind"] == "bars":
        height = max(height, 0.6 + 0.17 * len(_bars_of(report, names[0])))
    return _png(draw, len(names), height)


def _png(draw: Callable[[list["Axes"]], None], num_panels: int, height: float = 3.2) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.2, 3.6 * num_panels), height), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, num_panels, index + 1) for index in range(num_panels)]
    draw(axes)
    for axis in axes:
        axis.grid(visible=True, alpha=0.3)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def compute_plot(runs: Sequence[tuple[str, str, float, str, float]]) -> bytes:
    """Return (data set, model, PFLOP/s-days, measure, quality) of runs as PNG, compute on a log axis.

    A panel for each data set and measure.
    """
    panels = sorted({(dataset, measure) for dataset, _, _, measure, _ in runs})

    def draw(axes: list["Axes"]) -> None:
        for axis, panel in zip(axes, panels, strict=False):
            mine = [(model, x, y) for dataset, model, x, measure, y in runs if (dataset, measure) == panel]
            for model in sorted({name for name, _, _ in mine}):
                points = [(x, y) for name, x, y in mine if name == model]
                axis.semilogx(*zip(*points, strict=True), "o", label=model)
            axis.set(title=panel[0], xlabel="training compute, PFLOP/s-days", ylabel=panel[1])
            axis.legend(fontsize=6)

    return _png(draw, max(1, len(panels)))


Bar = tuple[str, float, float | None]


def _bars_of(report: Report, name: str) -> list[Bar]:
    """Return label, mean and deviation of the plotted rows that have the figure, published ones (no deviation) last."""
    group = report["plot"]["group"]
    ours = {label: means(rows, name) for label, rows in by_label(report["rows"], group).items()}
    quoted = [each for table in report["tables"] if table["group"] == group for each in table["published"]]
    return [(label, found[0], found[1] or 0.0) for label, found in ours.items() if found is not None] + [
        (each["label"], each["figures"][name], None) for each in quoted if name in each["figures"]
    ]


def _bars(axis: "Axes", report: Report, name: str) -> None:
    bars = _bars_of(report, name)
    for place, (_, value, deviation) in enumerate(bars):
        color = "lightgrey" if deviation is None else "tab:blue"
        axis.barh(place, value, xerr=deviation or None, height=0.7, color=color)
    panel, labels = axis.get_subplotspec(), [bar[0] for bar in bars]
    # Panels side by side share their labels where every row has both figures.
    if panel is not None and not panel.is_first_col() and len(bars) == len(_bars_of(report, report["plot"]["y"][0])):
        labels = [""] * len(bars)
    axis.set_yticks(range(len(bars)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel(_said(report, name))


def _points(axis: "Axes", report: Report, name: str) -> None:
    wanted = report["plot"]
    for label, rows in by_label(report["rows"], wanted["group"]).items():
        both = [(row["figures"].get(wanted["x"]), row["figures"].get(name)) for row in rows]
        shown = [(x, y) for x, y in both if x is not None and y is not None]
        if shown:
            axis.plot(*zip(*shown, strict=True), "o", label=label)
    fit = report["derived"].get("fit")
    xs = [row["figures"][wanted["x"]] for row in report["rows"] if row["figures"].get(wanted["x"]) is not None]
    if fit and xs:
        ends = (min(xs), max(xs))
        axis.plot(ends, [fit["factor"] * x ** fit["exponent"] for x in ends], "k--", label="fitted power law")
    _scales(axis, report, name)


def _curves(axis: "Axes", report: Report, name: str) -> None:
    wanted = report["plot"]
    for label, rows in by_label(report["rows"], wanted["group"]).items():
        shown = [(entry[wanted["x"]], entry[name]) for entry in rows[0].get("curve", []) if wanted["x"] in entry]
        if shown:
            axis.plot(*zip(*shown, strict=True), marker="o", markersize=3, label=label)
    _scales(axis, report, name)


def _said(report: Report, name: str) -> str:
    """Return what a table calls a figure, or MEASURES."""
    told = (str(table["columns"][name]) for table in report["tables"] if name in table["columns"])
    return next(told, MEASURES.get(name, name))


def _scales(axis: "Axes", report: Report, name: str) -> None:
    wanted = report["plot"]
    axis.set(xlabel=_said(report, wanted["x"]), ylabel=_said(report, name))
    if wanted["log_x"]:
        axis.set_xscale("log")
        ends = axis.get_xlim()
        if len(wanted["y"]) > 1 and ends[1] < 100 * ends[0]:  # in narrow panels names of minor ticks overlap
            axis.xaxis.set_minor_formatter("")
    if wanted["log_y"]:
        axis.set_yscale("log")
    panel = axis.get_subplotspec()
    if axis.get_legend_handles_labels()[0] and (panel is None or panel.is_first_col()):
        axis.legend(fontsize=7)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"

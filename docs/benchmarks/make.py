"""Writes the tables and the plot of the benchmark and kernel pages from the JSON files beside it:

    python docs/benchmarks/make.py

Invariant: every figure of a table or plot comes from such a file; the prose around the tables is left as it is.
"""

import io
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGES = (HERE / "README.md", HERE.parent / "kernels.md")
# A table stands between the name of its file and an end mark, both as comments that nobody sees.
BLOCK = re.compile(r"(<!-- (\w+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)
PLOT = HERE.parent / "images" / "attention_lengths.png"
ENCODERS_PLOT = HERE.parent / "images" / "encoder_lengths.png"
SERVING_PLOT = HERE.parent / "images" / "serving_load.png"
SIZES_PLOT = HERE.parent / "images" / "ingest_sizes.png"
# Benchmarks that are run once a size: `ingest.json` on a page stands for ingest_1m.json, ingest_10m.json, ...
BY_SIZE = ("ingest.json",)
# Shares of the offered requests that get no answer.
LOST = ("rejected", "given up at the deadline", "failed")
TIMED = re.compile(r"(forward|backward), (.+), (\d+ users) of (\d+)")
Row = dict[str, Any]


def measured(rows: list[Row]) -> str:
    """Return benchmark rows as a table, one line each."""
    lines = [_line(("row", "value", "unit", "against", "target", "reached")), "|---|---|---|---|---|---|"]
    for row in rows:
        bound = "" if row["target"] is None else f"{'<=' if row.get('at_most') else '>='} {row['target']:g}"
        reached = {True: "yes", False: "no", None: ""}[row["ok"]]
        lines.append(_line((row["name"], _value(row["value"]), row["unit"], row["against"] or "", bound, reached)))
    return "\n".join(lines)


def compiled(rows: list[Row]) -> str:
    """Return what compiled kernels take, one line a kernel and specialisation, one column a GPU."""

    def cell(row: Row) -> str:
        taken = f"{row['registers']} / {row['shared_bytes'] / 1024:.1f} / {100 * row['occupancy']:.0f}"
        return taken + (f" / **{row['value']} B**" if row["value"] else "")

    def made(part: list[Row]) -> str:
        return _crosswise(part, {"op": "op", "kernel": "kernel", "label": "variant"}, "arch", cell)

    attention = [row for row in rows if row["op"].startswith("hstu_attention")]
    others = [row for row in rows if not row["op"].startswith("hstu_attention")]
    if not others:
        return made(attention)
    names = ", ".join(dict.fromkeys(row["op"] for row in others))
    folded = f"<details><summary>{names}</summary>\n\n{made(others)}\n\n</details>"
    return f"{made(attention)}\n\n{folded}" if attention else folded


def predicted(rows: list[Row]) -> str:
    """Return predicted milliseconds, one line a kernel and shape, one column a GPU."""

    def cell(row: Row) -> str:
        told = f"{row['value']:.3g}" + (f" ({row['bound']})" if "bound" in row else "")
        return told + (f"; authors measured: {row['against_ms']:.2f}" if row.get("against_ms") else "")

    def amount(row: Row, key: str) -> Row:
        return {key: f"{row[key]:,.3g}" if row.get(key, 0) < 1000 else f"{row[key]:,.0f}"} if key in row else {key: ""}

    amounts = {"tensor_gflop": "tensor GFLOP", "core_ginstructions": "other G instructions", "memory_mb": "MB"}
    shown = [row | {k: v for key in amounts for k, v in amount(row, key).items()} for row in rows]
    return _crosswise(shown, {"kernel": "kernel", "shape": "shape"} | amounts, "gpu", cell)


def _crosswise(rows: list[Row], keys: dict[str, str], across: str, cell: Callable[[Row], str]) -> str:
    """Return one line for each value of `keys` (field -> heading), with a column for each value of `across`."""
    columns = list(dict.fromkeys(row[across] for row in rows))
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        cells.setdefault(tuple(row[key] for key in keys), {})[row[across]] = cell(row)
    lines = [_line((*keys.values(), *columns)), "|---" * (len(keys) + len(columns)) + "|"]
    lines += [_line((*line, *(found.get(column, "") for column in columns))) for line, found in cells.items()]
    return "\n".join(lines)


def by_size(rows: list[Row]) -> str:
    """Return one line for each row, one column for each size of the log, with what is missed in bold."""

    def cell(row: Row) -> str:
        value = _value(row["value"])
        return f"**{value}**" if row["ok"] is False else value

    def bound(row: Row) -> str:
        targets = [each["target"] for each in rows if each["name"] == row["name"] and each["target"] is not None]
        return f"<= {targets[0]:g}" if targets else ""

    shown = [row | {"bound": bound(row), "size": f"{row['num_events'] / 1e6:g} M events"} for row in rows]
    return _crosswise(shown, {"name": "row", "unit": "unit", "bound": "target"}, "size", cell)


def by_length(rows: list[Row]) -> str:
    """Return one line for each figure and encoder, one column for each length of the users."""
    shown = [
        row
        | {"encoder": f"{row['variant']}, {row['num_parameters'] / 1e6:.2f} M weights", "at": f"{row['length']} tokens"}
        for row in rows
    ]
    return _crosswise(
        shown, {"what": "row", "unit": "unit", "encoder": "encoder"}, "at", lambda row: _value(row["value"])
    )


def by_load(rows: list[Row]) -> str:
    """Return the rows that are of no load, one line each, then one line a figure with one column a load."""
    loads = [row | {"at": f"{row['load']} %"} for row in rows if "load" in row]
    others = [row for row in rows if "load" not in row]
    across = _crosswise(loads, {"what": "of saturation", "unit": "unit"}, "at", lambda row: _value(row["value"]))
    return f"{measured(others)}\n\n{across}" if others else across


def _value(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(rows: list[Row]) -> str:
    """Return the machine and date of a benchmark file and its rows as Markdown."""
    first = rows[0]
    kinds = {"arch": compiled, "gpu": predicted, "num_events": by_size, "variant": by_length}
    made = next((kinds[key] for key in kinds if key in first), measured)
    if any("load" in row for row in rows):
        made = by_load
    where = "" if made is predicted else f"Machine: {first['machine']}; {first['date']}.\n\n"
    return f"{where}{made(rows)}\n"


def rows_of(name: str) -> list[Row]:
    """Return the rows of a benchmark file, or of its files by size, the smallest first."""
    if name not in BY_SIZE:
        return list(json.loads((HERE / name).read_text(encoding="utf-8")))
    files = [json.loads(path.read_text(encoding="utf-8")) for path in HERE.glob(f"{Path(name).stem}_*.json")]
    return [row for file in sorted(files, key=lambda rows: rows[0]["num_events"]) for row in file]


def render(page: str) -> str:
    """Return the page with every table made anew."""

    def block(match: re.Match[str]) -> str:
        rows = rows_of(match[2])
        return f"{match[1]}{table(rows)}{match[3]}"

    return BLOCK.sub(block, page)


def times_by_length(rows: list[Row]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return direction -> variant -> (length, milliseconds) of the rows whose users all have one length."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        if match := TIMED.fullmatch(row["name"]):
            found.setdefault(match[1], {}).setdefault(match[2], []).append((int(match[4]), row["value"]))
    return found


def plot(rows: list[Row]) -> bytes:
    """Return time against length, one panel a direction and one line a variant, both axes logarithmic, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    directions = times_by_length(rows)
    figure = Figure(figsize=(8.4, 3.6), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(directions), sharey=True, squeeze=False)[0]
    for axis, (direction, variants) in zip(axes, directions.items(), strict=True):
        for (variant, points), marker in zip(variants.items(), "osD^v", strict=False):
            axis.loglog(*zip(*points, strict=True), marker=marker, label=variant)
        lengths = [length for length, _ in next(iter(variants.values()))]
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set_xticks([], minor=True)
        axis.set(title=direction, xlabel="tokens a user")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(visible=True, alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[0].legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def sizes_plot(rows: list[Row]) -> bytes:
    """Return time and peak RSS of every stage against the size of the log, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.6), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("time", "seconds"), ("peak RSS", "GB"))
    for axis, (what, unit) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for stage, marker in zip(
            ("bare_sort", "import_log", "ingest", "vocabulary", "sequences"), "xosD^", strict=True
        ):
            points = [(row["num_events"], row["value"]) for row in rows if row["name"] == f"{stage}, {what}"]
            draw = axis.loglog if what == "time" else axis.semilogx
            draw(*zip(*points, strict=True), marker=marker, label=stage.replace("_", " "))
        sizes = sorted({row["num_events"] for row in rows})
        axis.set_xticks(sizes, [f"{size / 1e6:g} M" for size in sizes])
        axis.set_xticks([], minor=True)
        axis.set(title=what, xlabel="events", ylabel=unit)
        if what != "time":
            axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(visible=True, alpha=0.3)
    figure.axes[0].legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def encoders_plot(rows: list[Row]) -> bytes:
    """Return milliseconds and peak memory of a training step and of inference against length, a line a variant."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 6.4), dpi=70, layout="constrained")
    FigureCanvasAgg(figure)
    panels = ("training step", "inference", "training step, peak memory", "inference, peak memory")
    for axis, what in zip(figure.subplots(2, 2, sharex=True).flat, panels, strict=True):
        drawn = [row for row in rows if row["what"] == what]
        for variant, marker in zip(dict.fromkeys(row["variant"] for row in drawn), "osD^", strict=False):
            points = [(row["length"], row["value"]) for row in drawn if row["variant"] == variant]
            axis.semilogx(*zip(*points, strict=True), marker=marker, label=variant)
        lengths = sorted({row["length"] for row in drawn})
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set_xticks([], minor=True)
        axis.set_ylim(bottom=0)
        axis.set(title=what, xlabel="tokens a user", ylabel=drawn[0]["unit"])
        axis.grid(visible=True, alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def serving_plot(rows: list[Row]) -> bytes:
    """Return latency, goodput, cache hits and CPU against the offered load, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    loads = [row for row in rows if "load" in row]

    def of(what: str) -> list[float]:
        # NaN leaves a gap where nothing was answered.
        return [float("nan") if row["value"] is None else row["value"] for row in loads if row["what"] == what]

    goodput = next(row["what"] for row in loads if row["what"].startswith("goodput"))
    offered = of("offered")
    lost = {what: [x * share / 100 for x, share in zip(offered, of(what), strict=True)] for what in LOST}
    panels: dict[str, dict[str, list[float]]] = {
        "latency, ms": {f"p{percent}": of(f"latency, p{percent}") for percent in (50, 95, 99)},
        "requests a second": {"offered": offered, goodput: of(goodput), **lost},
        "cache hits, % of history tokens": {"by answers": of("cache hits by CACHED_TOKENS")},
        "CPU, cores": {"server": of("server CPU"), "generator": of("generator CPU")},
    }
    figure = Figure(figsize=(8.4, 6.0), dpi=64, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, lines) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
        for (label, values), marker in zip(lines.items(), "osD^v", strict=False):
            axis.plot(offered, values, marker=marker, label=label)
        axis.set(title=title, xlabel="requests offered a second")
        if title.startswith("latency"):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
        else:
            axis.set_ylim(0, 105 if title.startswith("cache") else None)
        axis.grid(visible=True, alpha=0.3)
        axis.legend(fontsize="x-small", framealpha=0.5)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


if __name__ == "__main__":
    served = rows_of("serving.json")
    if any("load" in row for row in served):
        SERVING_PLOT.write_bytes(serving_plot(served))
    if (HERE / "encoders.json").is_file():
        ENCODERS_PLOT.write_bytes(encoders_plot(rows_of("encoders.json")))
    SIZES_PLOT.write_bytes(sizes_plot(rows_of("ingest.json")))
    timed = json.loads((HERE / "attention.json").read_text(encoding="utf-8"))
    if times_by_length(timed):
        PLOT.write_bytes(plot(timed))
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")

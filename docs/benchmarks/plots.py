"""Draws the plots of the benchmark pages from the JSON files beside it:

    python docs/benchmarks/plots.py

Invariant: every point is a figure of such a file; a file that is missing, or that lacks a plot's rows, leaves the
picture as it is.
"""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
IMAGES = HERE.parent / "images"
STAGES = ("bare_sort", "import_log", "ingest", "vocabulary", "sequences")
# Shares of the offered requests that get no answer.
LOST = ("rejected", "given up at the deadline", "failed")
TIMED = re.compile(r"(forward|backward), (.+), (\d+ users) of (\d+)")
MARKERS = "osD^vx"
Row = dict[str, Any]
Points = list[tuple[float, float]]


def times_by_length(rows: list[Row]) -> dict[str, dict[str, Points]]:
    """Return direction -> variant -> (length, milliseconds) of the rows whose users all have one length."""
    found: dict[str, dict[str, Points]] = {}
    for row in rows:
        if match := TIMED.fullmatch(row["name"]):
            found.setdefault(match[1], {}).setdefault(match[2], []).append((int(match[4]), row["value"]))
    return found


def attention_lengths(rows: list[Row]) -> bytes | None:
    """Return time against length, one panel a direction and one line a variant, both axes logarithmic."""
    directions = times_by_length(rows)
    if not directions:
        return None
    figure = _figure(3.6, 90)
    axes = figure.subplots(1, len(directions), sharey=True, squeeze=False)[0]
    for axis, (direction, variants) in zip(axes, directions.items(), strict=True):
        _draw(axis, variants, title=direction, xlabel="tokens a user", logarithmic="xy")
    axes[0].set_ylabel("milliseconds")
    axes[0].legend()
    return _png(figure)


def ingest_sizes(rows: list[Row]) -> bytes | None:
    """Return time and peak RSS of every stage against the size of the log."""
    figure = _figure(3.6, 90)
    for axis, (what, unit) in zip(figure.subplots(1, 2), (("time", "seconds"), ("peak RSS", "GB")), strict=True):
        lines = {
            stage.replace("_", " "): [(r["num_events"], r["value"]) for r in rows if r["name"] == f"{stage}, {what}"]
            for stage in STAGES
        }
        logarithmic = "xy" if what == "time" else "x"
        _draw(axis, lines, title=what, xlabel="events", ylabel=unit, logarithmic=logarithmic)
        sizes = sorted({row["num_events"] for row in rows})
        axis.set_xticks(sizes, [f"{size / 1e6:g} M" for size in sizes])
    figure.axes[0].legend()
    return _png(figure)


def encoder_lengths(rows: list[Row]) -> bytes | None:
    """Return milliseconds and peak memory of a training step and of inference against length, a line a variant."""
    figure = _figure(6.4, 70)
    panels = ("training step", "inference", "training step, peak memory", "inference, peak memory")
    for axis, what in zip(figure.subplots(2, 2, sharex=True).flat, panels, strict=True):
        drawn = [row for row in rows if row["what"] == what]
        variants = dict.fromkeys(row["variant"] for row in drawn)
        lines: dict[str, Points] = {
            variant: [(row["length"], row["value"]) for row in drawn if row["variant"] == variant]
            for variant in variants
        }
        _draw(axis, lines, title=what, xlabel="tokens a user", ylabel=drawn[0]["unit"], logarithmic="x")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return _png(figure)


def serving_load(rows: list[Row]) -> bytes | None:
    """Return latency, goodput, cache hits and CPU against the offered load."""
    loads = [row for row in rows if "load" in row]
    if not loads:
        return None

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
    figure = _figure(6.0, 64)
    for axis, (title, values) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
        lines = {label: list(zip(offered, of_load, strict=True)) for label, of_load in values.items()}
        logarithmic = "y" if title.startswith("latency") else ""
        _draw(axis, lines, title=title, xlabel="requests offered a second", logarithmic=logarithmic)
        if title.startswith("cache"):
            axis.set_ylim(0, 105)
        axis.legend(fontsize="x-small", framealpha=0.5)
    return _png(figure)


def serving_speed(rows: list[Row]) -> bytes | None:
    """Return milliseconds of a request against tokens of history and against candidates, cached and uncached."""
    timed = [row for row in rows if "side" in row]
    if not timed:
        return None
    figure = _figure(3.6, 80)
    axes = figure.subplots(1, 2)
    for axis, (along, fixed, label) in zip(
        axes, (("n", "m", "tokens of history"), ("m", "n", "candidates")), strict=True
    ):
        # The line along one size is at the value of the other that most points share.
        shared = [row[fixed] for row in timed]
        at = max(set(shared), key=lambda value: len({row[along] for row in timed if row[fixed] == value}))
        lines: dict[str, Points] = {
            side: sorted((row[along], row["value"]) for row in timed if row["side"] == side and row[fixed] == at)
            for side in dict.fromkeys(row["side"] for row in timed)
        }
        _draw(axis, lines, title=f"{fixed} = {at:,}", xlabel=f"{label} ({along})", logarithmic="xy")
    axes[0].set_ylabel("milliseconds")
    axes[0].legend()
    return _png(figure)


def serving_swap(rows: list[Row]) -> bytes | None:
    """Return latency by the second around a swap of the served pair."""
    row = next((row for row in rows if row.get("timeline")), None)
    if row is None:
        return None
    figure = _figure(3.0, 80)
    axis = figure.subplots()
    lines: dict[str, Points] = {
        name: [(second["at_s"], second[name]) for second in row["timeline"]] for name in ("p50", "p99")
    }
    _draw(axis, lines, title="", xlabel="seconds since the call", ylabel="milliseconds", logarithmic="y")
    axis.axvline(0, color="tab:gray", linewidth=1, label="called")
    for number, at_s in enumerate(sorted(set(row["ended_s"]))):
        axis.axvline(at_s, color="tab:green", linewidth=1, label=None if number else "new pair verified")
    figure.legend(fontsize="small", ncols=4, loc="outside upper center")
    return _png(figure)


def _figure(height: float, dpi: int) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw(axis: "Axes", lines: dict[str, Points], *, logarithmic: str, **labels: str) -> None:
    """Draw each line with a marker of its own; `logarithmic` names the axes that are."""
    for (label, points), marker in zip(lines.items(), MARKERS, strict=False):
        axis.plot(*zip(*points, strict=True), marker=marker, markersize=5, label=label)
    if "x" in logarithmic:
        places = sorted({at for points in lines.values() for at, _ in points})
        axis.set_xscale("log")
        axis.set_xticks(places, [f"{place:,g}" for place in places])
        axis.set_xticks([], minor=True)
    if "y" in logarithmic:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set(**labels)  # type: ignore[arg-type]
    axis.grid(visible=True, alpha=0.3)


def _png(figure: "Figure") -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


# Benchmark files, oldest size first -> what is drawn from their rows; the picture has the function's name.
PLOTS: dict[str, tuple[Callable[[list[Row]], bytes | None], ...]] = {
    "attention.json": (attention_lengths,),
    "encoders.json": (encoder_lengths,),
    "ingest_*.json": (ingest_sizes,),
    "serving.json": (serving_load, serving_speed, serving_swap),
}


def main() -> None:
    """Draw every picture whose figures are there."""
    for pattern, plots in PLOTS.items():
        files = [json.loads(path.read_text(encoding="utf-8")) for path in HERE.glob(pattern)]
        rows = [row for file in sorted(files, key=lambda rows: rows[0].get("num_events", 0)) for row in file]
        for plot in plots if rows else ():
            if (picture := plot(rows)) is not None:
                (IMAGES / f"{plot.__name__}.png").write_bytes(picture)


if __name__ == "__main__":
    main()

"""Writes the tables of the benchmark and kernel pages from the JSON files beside it:

    python docs/benchmarks/make.py

Invariant: every figure of a table comes from such a file; the prose around the tables is left as it is.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGES = (HERE / "README.md", HERE.parent / "kernels.md")
# A table stands between the name of its file and an end mark, both as comments that nobody sees.
BLOCK = re.compile(r"(<!-- (\w+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)
# Benchmarks that are run once a size: `ingest.json` on a page stands for ingest_1m.json, ingest_10m.json, ...
BY_SIZE = ("ingest.json",)
# Fields of serving's rows that are no lines of their own: columns by size and by load, and what is drawn alone.
APART = {"side", "load", "timeline"}
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


def of_serving(rows: list[Row]) -> str:
    """Return the rows that stand alone, one line each; then times with one column a size, figures with one a load."""
    sizes = [row | {"at": f"n {row['n']:,}, m {row['m']:,}"} for row in rows if "side" in row]
    loads = [row | {"at": f"{row['load']} %"} for row in rows if "load" in row]
    others = [row for row in rows if not APART & row.keys()]
    parts = [measured(others)] if others else []
    if sizes:
        parts.append(_crosswise(sizes, {"side": "ms of one request"}, "at", lambda row: _value(row["value"])))
    if loads:
        keys = {"what": "of saturation", "unit": "unit"}
        parts.append(_crosswise(loads, keys, "at", lambda row: _value(row["value"])))
    return "\n\n".join(parts)


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
    if any(APART & row.keys() for row in rows):
        made = of_serving
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


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")

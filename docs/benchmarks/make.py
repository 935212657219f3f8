"""Writes the tables of the benchmark page from the JSON files beside it: python docs/benchmarks/make.py

Invariant: every figure of the page comes from such a file; the prose around the tables is left as it is.
"""

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
# A table stands between the name of its file and an end mark, both as comments that nobody sees.
BLOCK = re.compile(r"(<!-- (\w+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the machine and date of a benchmark file and its rows as Markdown."""
    first = rows[0]
    lines = [
        f"Machine: {first['machine']}; {first['date']}.",
        "",
        "| row | value | unit | against | target | reached |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        bound = "" if row["target"] is None else f"{'<=' if row.get('at_most') else '>='} {row['target']:g}"
        reached = {True: "yes", False: "no", None: ""}[row["ok"]]
        cells = (row["name"], f"{row['value']:.3g}", row["unit"], row["against"] or "", bound, reached)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def render(page: str) -> str:
    """Return the page with every table made anew."""

    def block(match: re.Match[str]) -> str:
        rows = json.loads((HERE / match[2]).read_text(encoding="utf-8"))
        return f"{match[1]}{table(rows)}{match[3]}"

    return BLOCK.sub(block, page)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

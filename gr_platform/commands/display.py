"""What commands show: stage lines, tables of answers, key figures.

Invariant: the only place besides the commands that writes to the terminal; it computes nothing. What comes from a log
(titles, ids, actions) is escaped: brackets in it are text, not markup.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gr_platform.commands.query import UserAnswer

SHOWN_FIGURES = 4
QUARANTINED = "quarantined_"
ORDER = "ordered by the mean of the probabilities"
QUARANTINE_FILES = "rows and rules: events/<data set>/ingest_date=*/*/quarantine-0.parquet in the state folder"


class StageLines:
    """Prints a line as each stage ends, with its time, whether it was reused and its first figures."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()

    def __call__(self, fields: Mapping[str, Any]) -> None:
        """Take the fields that a stage logged."""
        if fields["event"] == "started":
            if self._console.is_terminal:
                self._console.print(f"  [dim]{fields['name']} ...[/]", end="\r")
        elif fields["event"] == "finished":
            self.line(fields["name"], fields["seconds"], fields["figures"], reused=fields["reused"])
        elif fields["event"] == "check_warned":
            self._console.print(f"  [yellow]! {fields['name']}: {escape(fields['reason'])}[/]", soft_wrap=True)
        else:
            self._console.print(f"  [red]x[/] {fields['name']}: {escape(fields['reason'])}")

    def line(self, name: str, seconds: float, figures: Mapping[str, Any], *, reused: bool = False) -> None:
        """Print one finished stage."""
        state = "[cyan]reused[/]" if reused else "[green]done[/]  "
        shown = list(figures.items())[:SHOWN_FIGURES]
        text = ", ".join(f"{key.removeprefix('num_').replace('_', ' ')} {_number(value)}" for key, value in shown)
        self._console.print(
            f"  {state} {name:<16} {seconds:6.1f} s  [dim]{escape(text)}[/]", highlight=False, soft_wrap=True
        )
        broken = {k.removeprefix(QUARANTINED): v for k, v in figures.items() if k.startswith(QUARANTINED)}
        if broken:
            rules = ", ".join(f"{rule} {count:,}" for rule, count in broken.items())
            where = f"[yellow]quarantined: {rules}[/] [dim]({QUARANTINE_FILES})[/]"
            self._console.print(f"{'':<36}{where}", highlight=False, soft_wrap=True)

    @property
    def seconds(self) -> float:
        """Seconds since the first stage could have started."""
        return time.monotonic() - self._started


def answer_table(title: str, answer: UserAnswer, tasks: Sequence[str]) -> Table:
    """Return an answer as a table: place, item, title where there is one, probability a task."""
    with_titles = any(line.title for line in answer.lines)
    grid = Table(title=escape(title), title_justify="left")
    grid.add_column("#", justify="right")
    grid.add_column("item")
    if with_titles:
        grid.add_column("title")
    for task in tasks:
        grid.add_column(escape(f"P({task})"), justify="right")
    for place, line in enumerate(answer.lines, start=1):
        names = [str(line.item), line.title] if with_titles else [str(line.item)]
        grid.add_row(str(place), *map(escape, names), *(f"{line.scores[task]:.4f}" for task in tasks))
    return grid


def quality_table(facts: Mapping[str, Any]) -> Table:
    """Return the evaluation's key figures: the model beside what counting gives, then NE and AUC a task."""
    grid = Table(title="Quality on the held-out last events", title_justify="left")
    for column in ("", "HSTU", "co-occurrence", "popularity"):
        grid.add_column(column, justify="left" if not column else "right")
    for name, label in (("hr_at_10", "HR@10"), ("ndcg_at_10", "NDCG@10"), ("mrr", "MRR")):
        grid.add_row(label, *(f"{facts[part][name]:.4f}" for part in ("retrieval", "cooccurrence", "popularity")))
    for task, figures in facts["ranking"].items():
        # By definition what the base rate of the task scores, nothing measured.
        grid.add_row(
            escape(f"{task}: NE, AUC"), f"{_number(figures['ne'])}, {_number(figures['auc'])}", "", "base rate: 1, 0.5"
        )
    return grid


def ranks_table(title: str, facts: Mapping[str, Any]) -> Table:
    """Return an evaluation's rank figures: the model as served, with the paper's sliding window, and the baselines."""
    names = {"hr_at_10": "HR@10", "hr_at_50": "HR@50", "hr_at_200": "HR@200"}
    names |= {"ndcg_at_10": "NDCG@10", "ndcg_at_200": "NDCG@200", "mrr": "MRR"}
    rows = {"retrieval": "as served", "retrieval_chunk_1": "chunk 1"}
    rows |= {"popularity": "popularity", "cooccurrence": "co-occurrence"}
    grid = _figures_table(title, "", names.values())
    for key, label in rows.items():
        if key in facts:
            grid.add_row(label, *(_figure(facts[key].get(name)) for name in names))
    return grid


def slices_table(slices: Sequence[Mapping[str, Any]]) -> Table:
    """Return rank figures by history length, item popularity and user age."""
    from gr_platform.evaluation.slices import SLICES

    grid = _figures_table("", "slice", ("bin", "from", "to", "users", "HR@10", "NDCG@10"))
    for part in slices:
        bounds = (f"{part[name]:,.1f}".removesuffix(".0") for name in ("lower", "upper"))
        figures = (_figure(part["hr_at_10"]), _figure(part["ndcg_at_10"]))
        grid.add_row(SLICES[part["slice"]], part["bin"], *bounds, f"{part['num_users']:,}", *figures)
    return grid


def tasks_table(title: str, tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return an evaluation's ranking figures, a line a task."""
    names = {"ne": "NE", "log_loss": "log loss", "auc": "AUC", "gauc": "GAUC", "calibration": "calibration"}
    grid = _figures_table(title, "task", (*names.values(), "base rate"))
    for task, figures in tasks.items():
        grid.add_row(escape(task), *(_figure(figures.get(name)) for name in (*names, "base_rate")))
    return grid


def tracked(name: str | None) -> str:
    """Return the line that says what a run is called in MLflow, or that MLflow did not take it (None)."""
    if name is None:
        return "MLflow did not take the run, gr.log says why; what is done is kept, and the same command logs it later"
    return f"in MLflow as {name}"


def comparison_table(found: Mapping[str, Any]) -> Table:
    """Return two runs beside each other: figures, difference, interval, p value."""
    title = f"{found['a']} ({found['recipe_a']}) against {found['b']} ({found['recipe_b']})"
    grid = _figures_table(title, "figure", ("first", "second", "difference", "low", "high", "p"))
    for line in found["differences"]:
        signed = (f"{line[name]:+.4f}" for name in ("difference", "low", "high"))
        grid.add_row(escape(line["figure"]), _figure(line["a"]), _figure(line["b"]), *signed, f"{line['p_value']:.3g}")
    return grid


def _figures_table(title: str, first: str, columns: Iterable[str]) -> Table:
    grid = Table(title=escape(title) or None, title_justify="left")
    grid.add_column(first)
    for column in columns:
        grid.add_column(column, justify="right")
    return grid


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def bench_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return benchmark rows as a table."""
    grid = Table()
    for column in ("name", "value", "unit", "against", "target", "ok"):
        grid.add_column(column, justify="right" if column in ("value", "target") else "left")
    for row in rows:
        ok = {True: "yes", False: "[red]no[/]", None: "-"}[row["ok"]]
        value, target = (
            "-" if row[key] is None else f"{row[key]:{digits}}" for key, digits in (("value", ".4g"), ("target", "g"))
        )
        texts = (row["name"], value, row["unit"], row["against"] or "-", target)
        grid.add_row(*(escape(text) for text in texts), ok)
    return grid


def lines(console: Console, texts: Iterable[str]) -> None:
    """Print each text on a line of its own, exactly as it is."""
    for text in texts:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)

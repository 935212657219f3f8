"""The report of a replay: verdicts, figures and pictures on one HTML page, and the same facts as JSON beside it.

Invariant: the page needs nothing but itself, every text in it is escaped, and every sentence is computed from the
facts: what was missed is said as plainly as what was reached.

Facts (report.json), what a replay fills:
dataset, command, commit, date, machine (texts); seconds (of everything); target_seconds (None: none was set).
days: for each "number", "date", "num_events", "fault" (None or its name), "top_share", "new_item_share"; "outcome" of
the model trained on it: promoted, refused, kept (none was trained) or failed; "reasons" (sentences); "seconds" (from
the file to the verdict); "deploy_s" (from promotion to served, or None); "retrieval" and "ranking": None, or figure ->
{"daily", "frozen", "difference"}, each {"value", "low", "high"}: the models that were there as the day began, asked
about that day.
load: traffic.figures. staleness: fields of answers.Staleness.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gr_platform import storage
from gr_platform.replay import plots

PAGE, FACTS = "report.html", "report.json"
NDCG, HIT_RATE, ENTROPY = "ndcg_at_10", "hr_at_10", "ne"
FIGURES = {
    ("retrieval", NDCG): ("NDCG@10", False),
    ("retrieval", HIT_RATE): ("HR@10", False),
    ("ranking", ENTROPY): ("NE", True),
}
Facts = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A claim about the replay: whether it holds, in a sentence. None: nothing happened that could show it."""

    ok: bool | None
    sentence: str


def write(folder: Path, facts: Facts) -> Path:
    """Write report.html and report.json into a folder and return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_text(folder / FACTS, json.dumps(facts, indent=1) + "\n")
    storage.write_text(folder / PAGE, render(facts))
    return folder / PAGE


def verdicts(facts: Facts) -> list[Verdict]:
    """Return what a replay is asked to show, and whether it did."""
    days = facts["days"]
    num_swaps = len(facts["load"]["swaps"])
    found = [_failures(facts["load"]["total"], num_swaps), _stale(facts["staleness"], num_swaps)]
    found += [_promotions(days), *_refusals(days)]
    if (ahead := _ahead(days)) is not None:
        found.append(ahead)
    target = facts.get("target_seconds")
    told = f"everything took {_minutes(facts['seconds'])} on {facts['machine']}"
    if target is None:
        return [*found, Verdict(ok=True, sentence=told)]
    return [*found, Verdict(ok=facts["seconds"] <= target, sentence=f"{told} (allowed: {_minutes(target)})")]


def render(facts: Facts) -> str:
    """Return the page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "whole": "{:,}".format,
        "ms": _ms,
        "percent": _percent,
        "share": _share,
        "seconds": _seconds,
    }
    days, load = facts["days"], facts["load"]
    return environment.get_template(PAGE).render(
        facts=facts,
        verdicts=verdicts(facts),
        days=days,
        load=load,
        online={day["day"]: day for day in load["days"]},
        figures=[(*key, *label) for key, label in FIGURES.items() if any(_has(day, *key) for day in days)],
        cell=_cell,
        pictures=_pictures(days, load),
    )


def _failures(total: Facts, num_swaps: int) -> Verdict:
    lost = total["requests"] - total["answered"]
    told = f"{lost:,} of {total['requests']:,} requests failed"
    if lost:
        told += f" ({total['rejected']:,} refused, {total['expired']:,} too late, {total['failed']:,} by an error)"
    told += f" while models were trained and swapped {num_swaps} times" if num_swaps else " while models were trained"
    return Verdict(ok=lost == 0 and total["requests"] > 0, sentence=told)


def _stale(staleness: Facts, num_swaps: int) -> Verdict:
    num, wrong = staleness["num_stale"], staleness["num_of_no_model"]
    told = f"{num:,} of {staleness['num_probes']:,} answers to known requests came from an old model after its swap"
    if wrong:
        told += f", and {wrong:,} from no model that was deployed"
    if undecided := staleness["num_undecided"]:
        told += f"; {undecided:,} fit two models, so they say nothing"
    decided = staleness["num_probes"] - undecided
    if not num_swaps and not num and not wrong:
        return Verdict(ok=None, sentence="no model was swapped, so no answer could be stale")
    return Verdict(ok=num == 0 and wrong == 0 and decided > 0, sentence=told)


def _promotions(days: Sequence[Facts]) -> Verdict:
    promoted = [day for day in days if day["outcome"] == "promoted"]
    slowest = max((day["deploy_s"] for day in promoted if day.get("deploy_s") is not None), default=None)
    told = f"{len(promoted)} of {len(days)} days ended with a better model that was promoted and served"
    if slowest is not None:
        told += f", {slowest:.1f} s after its promotion at the latest"
    return Verdict(ok=bool(promoted), sentence=told)


def _refusals(days: Sequence[Facts]) -> list[Verdict]:
    """Return a verdict for each poisoned day, and one for each other day whose model was refused or failed."""
    found = []
    for day in days:
        poisoned, refused = day.get("fault") == "poisoned", day["outcome"] == "refused"
        why = "; ".join(day["reasons"]) or "no reason was given"
        name = f"day {day['number']}"
        if poisoned:
            what = f"the model of {name}, of whose events one item has {100 * day['top_share']:.0f} %,"
            told = f"{what} was refused: {why}" if refused else f"{what} was not refused ({day['outcome']})"
            found.append(Verdict(ok=refused, sentence=told))
        elif refused:
            found.append(Verdict(ok=None, sentence=f"the model of {name} was refused as well: {why}"))
        elif day["outcome"] == "failed":
            found.append(Verdict(ok=False, sentence=f"{name} failed: {why}"))
    return found


def _ahead(days: Sequence[Facts]) -> Verdict | None:
    """Return whether the daily model is ahead at the end, by the last day that can be asked about."""
    asked = [day for day in days if _has(day, "retrieval", NDCG) and day.get("fault") != "poisoned"]
    if not asked or asked[-1]["number"] == 1:
        return None
    last = asked[-1]["retrieval"][NDCG]
    apart = last["difference"]
    later = [day["retrieval"][NDCG]["difference"]["value"] for day in asked if day["number"] > 1]
    ok = apart["low"] is not None and apart["low"] > 0
    ahead = "ahead of" if ok else "not clearly ahead of"
    told = f"{last['daily']['value']:.3f} against {last['frozen']['value']:.3f} ({_interval(apart)})"
    return Verdict(
        ok=ok,
        sentence=f"on day {asked[-1]['number']} the daily retrained model is {ahead} the one frozen on day 1: NDCG@10 "
        f"{told}; it is ahead on {sum(value > 0 for value in later)} of {len(later)} days after the first",
    )


def _pictures(days: Sequence[Facts], load: Facts) -> dict[str, str]:
    """Return title -> PNG in base64."""
    drawn = {
        f"{label} by day ({'lower' if lower else 'higher'} is better)": plots.quality(days, kind, figure, label)
        for (kind, figure), (label, lower) in FIGURES.items()
        if any(_has(day, kind, figure) for day in days)
    }
    drawn |= {
        "Latency over time": plots.latency(load),
        "Requests over time": plots.requests(load),
        "Cache hits over time": plots.hit_rate(load),
    }
    return {title: base64.b64encode(png).decode() for title, png in drawn.items()}


def _has(day: Facts, kind: str, figure: str) -> bool:
    return bool(day.get(kind)) and figure in day[kind]


def _cell(day: Facts, kind: str, figure: str, model: str) -> str:
    if not _has(day, kind, figure):
        return "-"
    found = day[kind][figure][model]
    return _interval(found) if model == "difference" else f"{found['value']:.4f}"


def _interval(apart: Facts) -> str:
    told = f"{apart['value']:+.4f}"
    if apart.get("low") is None:
        return f"{told}, no interval"
    return f"{told} [{apart['low']:+.4f}, {apart['high']:+.4f}]"


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60)} min {seconds % 60:02.0f} s" if seconds >= 60 else f"{seconds:.0f} s"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} ms" if value >= 10 else f"{value:.1f} ms"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"

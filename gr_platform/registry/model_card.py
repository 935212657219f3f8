"""The card of a registered model: what it is, what it learned from, how good it is, what it is not good for.

Invariant: a function of the facts that `card_facts.gather` returns; every figure in it is one of them, rounded to four
digits, and what it says of its own worth follows from them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gr_platform.evaluation.plots import is_loss, label_of
from gr_platform.registry import lineage, retrainings

FILE = "model_card.md"
NOT_YET = "not judged yet"
# What decides the size and the cost of a model; the rest of the recipe stands in its run's parameters.
SHAPE = {
    "encoder": "encoder",
    "embedding_dim": "embedding dimensions",
    "num_layers": "layers",
    "num_heads": "heads",
    "max_events": "events of the history",
    "chunk": "events a step of the sliding window",
}
TRAINING = {
    "max_epochs": "epochs at most",
    "batch_size": "users a step",
    "learning_rate": "learning rate",
    "refit": "trained again with the validation part",
}
COMPUTE = {
    "num_parameters": "parameters",
    "epochs": "epochs until the choice",
    "refit_epochs": "epochs of the second training",
    "seconds": "seconds",
    "tokens_per_s": "tokens a second",
    "pflops_days": "PFLOP/s-days",
}
# The figure that speaks for a kind in one line.
MAIN = {"retrieval": "hr_at_10", "ranking": "ne"}
MODEL = "model"


def card(facts: Mapping[str, Any]) -> str:
    """Return the whole card as Markdown."""
    sections = {
        "": _what(facts),
        "Data": _data(facts),
        "Recipe and compute": _recipe(facts),
        "Quality": _quality(facts),
        "Slices": _slices(facts),
        "Judgement": _judgement(facts),
        "Lineage": _lineage(facts),
        "Intended use": _use(facts),
        "Limits": "\n".join(f"- {line}" for line in _limits(facts)),
    }
    parts = [f"# {facts['name']} version {facts['version']}"]
    parts += [f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def summary(facts: Mapping[str, Any]) -> str:
    """Return the card in at most a few lines, as the description of the registered version."""
    data, recipe = facts["data"], facts["recipe"]
    until = f" up to {lineage.moment(data['trained_until_ms'])}" if "trained_until_ms" in data else ""
    told = [f"{_number(data[name])} {what}" for name, what in _LEARNED.items() if name in data]
    size = f" ({', '.join(told)})" if told else ""
    outcome, _, reasons = _outcome(facts).partition("; ")
    # The outcome and the main figure first: lists of versions show little more.
    lines = [
        f"{outcome}: {_main_figures(facts)}, on {_held_out(facts)}.",
        f"{facts['kind'].capitalize()}, recipe {recipe['name']}, seed {recipe['seed']}, {_start(facts)}; learned from "
        f"{data['name']}{until}{size}.",
        f"Gates that objected: {reasons}." if reasons else "",
        f"The whole card: {FILE} among the files of its run.",
    ]
    return " ".join(line for line in lines if line)


def _what(facts: Mapping[str, Any]) -> str:
    asked = (
        "For a user's history it finds the items of the whole catalogue that they most likely act on next."
        if facts["kind"] == "retrieval"
        else "For a user's history and given candidates it estimates the probability of each action: "
        f"{', '.join(facts['tasks'])}."
    )
    return f"A generative recommender ({facts['kind']}) of data set {facts['data']['name']}. {asked}"


def _data(facts: Mapping[str, Any]) -> str:
    data = facts["data"]
    rows = [("data set", data["name"])]
    rows += [(label, data[name]) for name, label in _DATA.items() if name in data]
    rows += [(label, lineage.moment(data[name])) for name, label in _TIMES.items() if name in data]
    rows.append(("held out", _held_out(facts)))
    rows += [(f"{name} digest", f"`{data[name]}`") for name in ("sequences", "vocabulary", "events") if name in data]
    return _table(["", ""], rows)


_DATA = {
    "num_users": "users",
    "num_items": "items",
    "num_exposures": "exposures",
    "num_trained_users": "users learned from",
    "num_trained_exposures": "exposures learned from",
}
_LEARNED = {"num_trained_users": "users", "num_trained_exposures": "exposures"}
_TIMES = {"first_ms": "oldest event", "last_ms": "newest event", "trained_until_ms": "newest event learned from"}


def _recipe(facts: Mapping[str, Any]) -> str:
    recipe, compute = facts["recipe"], facts["compute"]
    rows: list[tuple[Any, ...]] = [("recipe", recipe["name"]), ("seed", recipe["seed"]), ("start", _start(facts))]
    for part, labels in (("model", SHAPE), ("training", TRAINING)):
        rows += [(label, recipe[part][name]) for name, label in labels.items() if name in recipe[part]]
    rows += [(label, compute[name]) for name, label in COMPUTE.items() if compute.get(name) is not None]
    return _table(["", ""], rows)


def _quality(facts: Mapping[str, Any]) -> str:
    quality: Mapping[str, Sequence[Mapping[str, Any]]] = facts["quality"]
    if not quality.get(MODEL):
        return "It has no figures: it was not evaluated."
    known = {label: {each["figure"]: each for each in figures} for label, figures in quality.items()}
    others = [label for label in quality if label != MODEL]
    rows = []
    for each in quality[MODEL]:
        named = label_of(each["figure"]) + (" (less is better)" if is_loss(each["figure"]) else "")
        theirs = [_with_interval(known[label].get(each["figure"])) for label in others]
        rows.append([named, _with_interval(each), *theirs])
    lines = [_table(["figure", MODEL, *others], rows)]
    lines.append(
        f"In brackets: 95 % intervals by a bootstrap over users; {_held_out(facts)}. They say what other users of the "
        "same kind would give, not what another training seed or another day would."
    )
    if figures := facts.get("beside"):
        lines.append(_table(["figure", "value"], [(label_of(name), value) for name, value in figures.items()]))
    return "\n\n".join(lines)


def _slices(facts: Mapping[str, Any]) -> str:
    rows = [
        (
            row["slice"].replace("_", " "),
            row["bin"],
            f"{_number(row['lower'])} to {_number(row['upper'])}",
            row["num_users"],
            row["hr_at_10"],
            row["hr_at_10_error"],
        )
        for row in facts.get("slices", ())
    ]
    return _table(["slice", "bin", "values", "targets", "HR@10", "standard error"], rows) if rows else ""


def _judgement(facts: Mapping[str, Any]) -> str:
    judged = facts.get("judgement")
    if not judged:
        return f"Outcome: {_outcome(facts)}."
    champion = judged["champion"].get(facts["kind"])
    against = f"{champion['name']} version {champion['version']}" if champion else "no champion"
    lines = [f"Outcome: {_outcome(facts)}. Judged on {retrainings.window_of(judged)} against {against}."]
    if differences := judged["differences"].get(facts["kind"]):
        rows = [
            [label_of(d["figure"]), d["b"], d["a"], f"{_number(d['difference'])} {_interval(d)}", d["p_value"]]
            for d in differences
        ]
        lines.append(_table(["figure", "this model", "champion", "difference [95 %]", "p"], rows))
    if judged["gates"]:
        lines.append(retrainings.gates_table(judged))
    return "\n\n".join(lines)


def _lineage(facts: Mapping[str, Any]) -> str:
    rows = [("run folder", f"`{facts['run']}`"), ("run digest", f"`{facts['run_digest']}`")]
    if facts.get("warm_start"):
        rows.append(("started from the weights of", f"`{facts['warm_start']}`"))
    if facts.get("commit"):
        rows.append(("git commit of the code", f"`{facts['commit']}`"))
    return _table(["", ""], rows)


def _use(facts: Mapping[str, Any]) -> str:
    task = "Recommending items" if facts["kind"] == "retrieval" else "Ordering recommended items"
    return (
        f"{task} of {facts['data']['name']} for the users of the same product, by what they did there. It was neither "
        "built nor measured for anything else, and not for decisions about people."
    )


def _limits(facts: Mapping[str, Any]) -> Iterable[str]:
    quality = {
        label: {each["figure"]: each["value"] for each in figures} for label, figures in facts["quality"].items()
    }
    ours = quality.get(MODEL, {})
    for label, theirs in quality.items():
        worse = [f for f in ("hr_at_10", "ndcg_at_10") if f in ours and f in theirs and theirs[f] >= ours[f]]
        if label != MODEL and worse:
            told = " and ".join(f"{label_of(f)} ({_number(theirs[f])} against {_number(ours[f])})" for f in worse)
            yield f"**{label.capitalize()}, which only counts, is as good or better in {told}.**"
    for name, value in ours.items():
        if name.endswith("_ne") and value >= 1:
            yield f"**{label_of(name)} is {_number(value)}: no better than predicting the mean rate.**"
    yield "Measured on logged behaviour: what people would have done with other recommendations is not known from it."
    yield "Items and actions newer than its data are unknown to it; it ages with every day without a training."
    if facts.get("warm_start"):
        yield "It started from another model's weights, whose data it has learned from as well."
    yield "Few users or events in a slice mean a wide interval: read the slices with their errors."
    yield (
        "It has learned from people's events; one who is forgotten (`gr forget`) is out of it only after the next "
        "training from scratch."
    )


def _start(facts: Mapping[str, Any]) -> str:
    return "warm start" if facts.get("warm_start") else "from scratch"


def _outcome(facts: Mapping[str, Any]) -> str:
    judged, outcome = facts.get("judgement"), facts.get("outcome")
    if not judged:
        return outcome or NOT_YET
    told = outcome or retrainings.outcome_of(judged)
    return told if judged["passed"] else f"{told}; {'; '.join(retrainings.reasons_of(judged))}"


def _held_out(facts: Mapping[str, Any]) -> str:
    split = facts.get("split")
    return f"events of {lineage.days(split['cut'], split['end'])}" if split else "the last exposure of each user"


def _main_figures(facts: Mapping[str, Any]) -> str:
    """Return the main figure of the model with its interval, and of whatever stands beside it."""
    main = MAIN[facts["kind"]]
    told = []
    for label, figures in facts["quality"].items():
        for each in figures:
            if each["figure"] == main or each["figure"].endswith(f"_{main}"):
                whose, value = ("", _with_interval(each)) if label == MODEL else (f"{label} ", _number(each["value"]))
                told.append(f"{whose}{label_of(each['figure'])} {value}")
    return ", ".join(told) or "no figures"


def _with_interval(each: Mapping[str, Any] | None) -> str:
    return "" if each is None else f"{_number(each['value'])} {_interval(each)}"


def _interval(each: Mapping[str, Any]) -> str:
    return f"[{_number(each['low'])}, {_number(each['high'])}]"


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    cells = ([_number("" if value is None else value).replace("|", "\\|") for value in row] for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *cells])

"""A retraining in MLflow: a parent run with its models' runs under it, what the judgement said and what became of it.

Invariant: one run a retraining, however often it is run again; what is logged of a judgement is what its facts say.
"""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gr_platform import storage
from gr_platform.evaluation import plots
from gr_platform.registry import lineage
from gr_platform.registry.figures import log_pictures
from gr_platform.registry.tracking import PARENT, WAIT_S, attempt, connect, experiment_id, find_run
from gr_platform.registry.versions import Version

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

RETRAINING, JUDGEMENT = "gr.retraining", "gr.judgement_digest"
OUTCOME, REASONS = "gr.outcome", "gr.reasons"
NOTE = "mlflow.note.content"
# Outcomes that a judgement alone gives; the release adds what it does: "promoted".
PASSED, REFUSED = "passed", "refused"
FOLDER = "judgement"
# Part of a difference -> the end of its metric's name. a is the champion, b the challenger.
PARTS = {"b": "challenger", "a": "champion", "difference": "difference", "low": "low", "high": "high", "p_value": "p"}
_MAX_REASON_CHARS, _MAX_NOTE_CHARS = 2000, 8000


def open_retraining(home: Path, ds: str, *, name: str, tags: Mapping[str, str]) -> str:
    """Return the id of a retraining's run in the data set's experiment, made at first.

    tags: what makes it this one: its sequences (`lineage.SEQUENCES_DIGEST`), start (`lineage.START`) and recipe, and
    the window if there is one. Equal tags, equal run.
    """
    client = connect(home)
    digest = storage.digest_of({"dataset": ds, **tags})
    with storage.exclusive(home, "mlflow", wait_s=WAIT_S):
        experiment = experiment_id(client, home, ds)
        known = client.search_runs([experiment], filter_string=f"tags.`{RETRAINING}` = '{digest}'", max_results=1)
        if known:
            return str(known[0].info.run_id)
        labelled = {"gr.dataset": ds, **tags, RETRAINING: digest}
        run_id = str(client.create_run(experiment, run_name=name, tags=labelled).info.run_id)
        client.set_terminated(run_id)
    return run_id


def for_model(home: Path, ds: str, model: storage.Manifest, *, start: str, recipe: str) -> str | None:
    """Return the id of the retraining that a model was trained in: the one it stands under, else its own, opened.

    start, recipe: as the retraining was asked for, which is the same for all of its models. None where MLflow could not
    be written: the log says why, and the model is logged without.
    """

    def opened() -> str:
        client = connect(home)
        known = find_run(client, experiment_id(client, home, ds), model.digest)
        if known is not None and PARENT in known.data.tags:
            return str(known.data.tags[PARENT])
        tags = {lineage.SEQUENCES_DIGEST: lineage.sequences_digest(model), lineage.START: start, "gr.recipe": recipe}
        # What tells one from another goes first: lists of runs show little more.
        name = f"{start} retraining"
        if split := model.spec.get("split"):
            tags[lineage.WINDOW] = lineage.days(split["cut"], split["end"])
            name = f"{tags[lineage.WINDOW][-10:]} {name}"
        return open_retraining(home, ds, name=name, tags=tags)

    return attempt(f"retraining_not_logged dataset={ds}", opened)


def log_judgement(home: Path, ds: str, facts: Mapping[str, Any], *, parent: str | None = None) -> list[str]:
    """Log a judgement on the challengers' runs and on their parent; return the ids of the runs that have it now.

    facts: of the asset `judgement`. parent: the retraining's run; by default the ones that the challengers stand under,
    if they do. What was logged already is left as it is. Metrics are `judged/<figure>_<part>` for each part of PARTS,
    on the parent with the kind before the figure; the gates are `judgement/gates.md` and `.json`; tags say the outcome,
    the reasons and the window.
    """
    client = connect(home)
    children = {kind: _run_of(client, named) for kind, named in facts["challenger"].items()}
    parents = [parent] if parent else _parents(client, children.values())
    digest = storage.digest_of(facts)
    wanted = {run_id: {kind: ""} for kind, run_id in children.items()}
    wanted |= {run_id: {kind: f"{kind}_" for kind in children} for run_id in parents}
    with storage.exclusive(home, "mlflow", wait_s=WAIT_S):
        for run_id, prefixes in wanted.items():
            if client.get_run(run_id).data.tags.get(JUDGEMENT) != digest:
                _log_on(client, run_id, facts, prefixes)
                if run_id in parents:
                    client.set_tag(run_id, NOTE, f"{facts_line(facts)}\n\n{gates_table(facts)}"[:_MAX_NOTE_CHARS])
                    client.set_terminated(run_id)
                client.set_tag(run_id, JUDGEMENT, digest)
    return list(wanted)


def log_outcome(home: Path, versions: Iterable[Version], outcome: str) -> None:
    """Tag the runs of registered versions and what they stand under with what became of them, such as `promoted`."""
    client = connect(home)
    children = [version.run_id for version in versions]
    for run_id in (*children, *_parents(client, children)):
        client.set_tag(run_id, OUTCOME, outcome)


def outcome_of(facts: Mapping[str, Any]) -> str:
    """Return what a judgement's facts alone say: PASSED or REFUSED."""
    return PASSED if facts["passed"] else REFUSED


def reasons_of(facts: Mapping[str, Any]) -> list[str]:
    """Return why the gates that objected did, one sentence each."""
    return [f"{gate['gate']}: {gate['why']}" for gate in facts["gates"] if not gate["ok"]]


def window_of(facts: Mapping[str, Any]) -> str:
    """Return what a judgement asked: the days of its window, or each user's last event."""
    window = facts["window"]
    return lineage.days(window["cut"], window["end"]) if window["kind"] == "time" else "last events"


def facts_line(facts: Mapping[str, Any]) -> str:
    """Return a judgement in one sentence, for the run's description."""
    versions = [f"{each['name']} version {each['version']}" for each in facts["challenger"].values()]
    reasons = reasons_of(facts)
    verdict = "all gates passed" if facts["passed"] else f"refused: {'; '.join(reasons) or 'no reason given'}"
    return f"{' and '.join(versions)}, judged on {window_of(facts)}: {verdict}"


def gates_table(facts: Mapping[str, Any]) -> str:
    """Return the gates as a Markdown table."""
    lines = ["| gate | passed | value | bound | why |", "|---|---|---|---|---|"]
    for gate in facts["gates"]:
        passed = "yes" if gate["ok"] else "**no**"
        cells = [gate["gate"], passed, _cell(gate["value"]), _cell(gate["bound"]), _cell(gate.get("why", ""))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _log_on(client: "MlflowClient", run_id: str, facts: Mapping[str, Any], prefixes: Mapping[str, str]) -> None:
    """Log the judgement of some kinds on one run; kind -> what stands before a figure's name."""
    metrics = [
        metric
        for kind, prefix in prefixes.items()
        for difference in facts["differences"].get(kind, [])
        for metric in _metrics(prefix, difference)
    ]
    client.log_batch(run_id, metrics=metrics)
    client.log_text(run_id, f"{facts_line(facts)}\n\n{gates_table(facts)}\n", f"{FOLDER}/gates.md")
    client.log_dict(run_id, {"gates": list(facts["gates"]), "passed": facts["passed"]}, f"{FOLDER}/gates.json")
    client.log_dict(run_id, dict(facts), f"{FOLDER}/judgement.json")
    pictures = {
        f"differences_{kind}": plots.differences(facts["differences"][kind], f"{kind}: challenger against champion")
        for kind in prefixes
        if facts["differences"].get(kind)
    }
    if "retrieval" in prefixes and facts.get("slices"):
        pictures["slices"] = plots.slice_differences(facts["slices"])
    log_pictures(client, run_id, pictures, FOLDER)
    tags = {OUTCOME: outcome_of(facts), lineage.WINDOW: window_of(facts)}
    reasons = "; ".join(reasons_of(facts))[:_MAX_REASON_CHARS]
    if reasons:
        tags[REASONS] = reasons
    elif REASONS in client.get_run(run_id).data.tags:
        client.delete_tag(run_id, REASONS)
    for key, value in tags.items():
        client.set_tag(run_id, key, value)


def _metrics(prefix: str, difference: Mapping[str, Any]) -> "list[Metric]":
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    named = {end: difference[part] for part, end in PARTS.items() if difference.get(part) is not None}
    return [Metric(f"judged/{prefix}{difference['figure']}_{end}", float(v), now, 0) for end, v in named.items()]


def _run_of(client: "MlflowClient", named: Mapping[str, Any]) -> str:
    """Return the run of a registered version that facts name."""
    return str(client.get_model_version(named["name"], str(named["version"])).run_id)


def _parents(client: "MlflowClient", run_ids: Iterable[str]) -> list[str]:
    """Return the runs that these stand under, each once."""
    found = [client.get_run(run_id).data.tags.get(PARENT) for run_id in run_ids]
    return list(dict.fromkeys(parent for parent in found if parent))

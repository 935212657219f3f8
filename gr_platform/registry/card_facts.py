"""What a model card is made of, gathered from a version's run, evaluation and judgement, and put into the registry.

Invariant: reading only, but for the card itself; an evaluation that is gone leaves the card without figures.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.evaluation.significance import intervals
from gr_platform.models.config import Recipe
from gr_platform.registry import lineage, model_card, retrainings
from gr_platform.registry.figures import COMPARED
from gr_platform.registry.tracking import RUN_DIGEST, WAIT_S, attempt, connect
from gr_platform.registry.versions import KINDS, Version, versions

FACTS = "model_card.json"
RUN_FOLDER = "gr.run_folder"
# An end of a 95 % interval then moves by a few hundredths of its width from seed to seed; in a second for 10,000 users.
NUM_RESAMPLES = 2_000
# Of a judged task, beside what has an interval.
_BESIDE = ("auc", "gauc", "calibration", "ece", "base_rate", "num_targets")


def gather(
    home: Path, ds: str, *, name: str, version: str, judgement: Mapping[str, Any] | None = None, outcome: str = ""
) -> dict[str, Any]:
    """Return the facts of a registered version's card.

    judgement: the facts of the asset of that name; outcome: what became of the version, where that is known by now.
    Raises UserError if its run's folder is gone.
    """
    client = connect(home)
    registered = client.get_model_version(name, version)
    folder = home / "runs" / ds / registered.tags.get(RUN_FOLDER, "")
    model = storage.read_manifest(folder)
    kind = model.kind.removesuffix("_model")
    recipe = Recipe.from_json(model.spec["recipe"]) if "recipe" in model.spec else _recipe(folder)
    evaluation = _evaluation_of(home, ds, kind, model.digest)
    sequences = lineage.sequences_digest(model)
    facts: dict[str, Any] = {
        "name": name,
        "version": version,
        "kind": kind,
        "run": folder.name,
        "run_digest": registered.tags[RUN_DIGEST],
        "commit": client.get_run(str(registered.run_id)).data.tags.get(lineage.COMMIT),
        "data": {"name": ds, "sequences": sequences} | lineage.profile(home, ds, sequences) | _trained(folder, model),
        "split": model.spec.get("split"),
        "recipe": {"name": recipe.name, "seed": recipe.training.seed}
        | {part: asdict(getattr(recipe, part)) for part in ("model", "training")},
        "warm_start": model.spec.get("warm_start"),
        "compute": {each: model.facts.get(each) for each in model_card.COMPUTE},
        "tasks": list(evaluation.manifest.facts.get("ranking", ())) if evaluation else [],
        "quality": _quality(kind, evaluation),
        "judgement": dict(judgement) if judgement else None,
        "outcome": outcome,
    }
    if evaluation and kind == "retrieval":
        facts["slices"] = evaluation.manifest.facts.get("slices", [])
    elif evaluation:
        tasks = evaluation.manifest.facts["ranking"].items()
        facts["beside"] = {
            f"{task}_{each}": figures[each]
            for task, figures in tasks
            for each in _BESIDE
            if figures.get(each) is not None
        }
    return facts


def log_card(
    home: Path, ds: str, *, name: str, version: str, judgement: Mapping[str, Any] | None = None, outcome: str = ""
) -> str:
    """Write a registered version's card to its run, its summary to the version's description; return the card.

    Writing it again replaces it. Raises UserError as `gather` does.
    """
    facts = gather(home, ds, name=name, version=version, judgement=judgement, outcome=outcome)
    text, short = model_card.card(facts), model_card.summary(facts)
    client = connect(home)
    run_id = str(client.get_model_version(name, version).run_id)
    with storage.exclusive(home, "mlflow", wait_s=WAIT_S):
        client.log_text(run_id, text, model_card.FILE)
        client.log_dict(run_id, facts, FACTS)
        client.set_tag(run_id, retrainings.NOTE, short)
        client.update_model_version(name, version, description=short)
        client.update_registered_model(
            name,
            f"The {facts['kind']} models of data set {ds}, a version each. Aliases say their roles: champion serves, "
            "previous served before it, challenger is the newest that does not.",
        )
    return text


def try_record(home: Path, ds: str, judgement: Mapping[str, Any], *, outcome: str = "") -> None:
    """Log a judgement (`retrainings.log_judgement`), what became of it, and the cards of its challengers.

    outcome: by default what the judgement says. Where MLflow fails, the log says why, and the same again does the rest.
    """

    def recorded() -> None:
        retrainings.log_judgement(home, ds, judgement)
        for named in judgement["challenger"].values():
            version = str(named["version"])
            log_card(home, ds, name=named["name"], version=version, judgement=judgement, outcome=outcome)
        if outcome:
            pair = [each for kind in KINDS for each in versions(home, ds, kind) if _is(each, judgement)]
            retrainings.log_outcome(home, pair, outcome)

    attempt(f"judgement_not_logged dataset={ds}", recorded)


def _is(version: Version, judgement: Mapping[str, Any]) -> bool:
    named = ((each["name"], str(each["version"])) for each in judgement["challenger"].values())
    return (version.name, version.version) in named


def _recipe(folder: Path) -> Recipe:
    return Recipe.from_json(json.loads((folder / "recipe.json").read_text(encoding="utf-8")))


def _trained(folder: Path, model: storage.Manifest) -> dict[str, Any]:
    """Return how much a run learned from and until when, as far as its folder says it."""
    found: dict[str, Any] = {}
    if (folder / "trained.parquet").is_file():
        table = pq.read_table(folder / "trained.parquet")
        found = {"num_trained_users": len(table), "num_trained_exposures": pc.sum(table["num_exposures"]).as_py() or 0}
    if (until := model.facts.get("trained_until_ms")) is not None:
        found["trained_until_ms"] = until
    return found


def _evaluation_of(home: Path, ds: str, kind: str, run_digest: str) -> storage.Result | None:
    """Return the evaluation of a run on what its own split holds out: the current one if it is of it, else any."""
    runs = home / "runs" / ds
    pointer = runs / "evaluation.current"
    current = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
    for folder in sorted(runs.glob("evaluation-*"), key=lambda each: (each.name != current, each.name)):
        try:
            manifest = storage.read_manifest(folder)
        except UserError:
            continue
        if manifest.spec.get("models", {}).get(kind) == run_digest:
            return storage.Result(folder=folder, manifest=manifest, reused=True)
    return None


def _quality(kind: str, evaluation: storage.Result | None) -> dict[str, list[dict[str, Any]]]:
    """Return label -> figures with intervals: the model first, then what it was compared with."""
    if evaluation is None:
        return {}
    parts = {kind: model_card.MODEL} | (
        {p: label for p, label in COMPARED.items() if p != kind} if kind == "retrieval" else {}
    )
    return {
        label: [asdict(each) for each in intervals(pq.read_table(file), num_resamples=NUM_RESAMPLES)]
        for part, label in parts.items()
        if (file := evaluation.folder / f"{part}.parquet").is_file()
    }

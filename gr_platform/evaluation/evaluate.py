"""The evaluation of trained models beside the baselines, on what their split holds out: last exposures, or a window.

Invariant: every printed figure can be computed again from the Parquet files beside the manifest, one row a target; a
baseline counts what the model it stands beside may know, no more and no less.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gr_platform import settings, storage
from gr_platform.errors import UserError
from gr_platform.evaluation.metrics import calibration_bins, recommended_facts
from gr_platform.evaluation.popularity import train_counts
from gr_platform.evaluation.protocols import judge_by_model, rank_by_cooccurrence, rank_by_model, rank_by_popularity
from gr_platform.evaluation.ranks import Ranked
from gr_platform.evaluation.slices import slice_table
from gr_platform.evaluation.tables import LABEL, LOGIT, judged_table, metrics_of_table, ranked_table, tasks_of
from gr_platform.models.config import Recipe
from gr_platform.models.ranking import RankingModel
from gr_platform.models.recipe_files import command_for
from gr_platform.models.retrieval import RetrievalModel
from gr_platform.registry.versions import trained_kinds
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.featured import FeaturedDataset, with_features
from gr_platform.sequences.splits import Holdout, is_refit, leave_one_out, newest_time
from gr_platform.sequences.time_split import TimeSplit
from gr_platform.training.load import load_model, read_run
from gr_platform.training.loop import trained_ends

EVALUATION_VERSION = 2
BASELINES: dict[str, Callable[[SequenceDataset, Holdout], Ranked]] = {
    "popularity": rank_by_popularity,
    "cooccurrence": rank_by_cooccurrence,
}


def evaluate_current(home: Path, ds: str) -> storage.Result:
    """Return the evaluation of the data set's current models, made unless it is there, and make it current.

    Facts and files are those of `evaluate_run` of each, together; a kind that was never trained has none.
    Raises UserError if there is no model at all, or one was trained on other sequences.
    """
    runs = home / "runs" / ds
    folders = [storage.current(runs, f"{kind}_model") for kind in trained_kinds(home, ds)]
    models: dict[str, str] = {}
    for folder in folders:
        models |= evaluation_spec(home, ds, folder)["models"]
    if len({split_of(folder) for folder in folders}) > 1:
        raise UserError(
            f"the current models of {ds} were trained on different splits of the log; train both again the same way"
        )
    spec = evaluation_spec(home, ds, folders[0]) | {"models": models}

    def build(into: Path) -> dict[str, Any]:
        return _joined(into, [evaluate_run(home, ds, folder) for folder in folders])

    result = (
        evaluate_run(home, ds, folders[0]) if len(folders) == 1 else storage.ensure(runs, "evaluation", spec, build)
    )
    storage.point(runs, "evaluation", result.folder)
    return result


def evaluate_run(home: Path, ds: str, folder: Path, split: TimeSplit | None = None) -> storage.Result:
    """Return the evaluation of the trained model in a run folder, made unless it is there.

    It is judged on what its own split holds out; or on the window of another one, which may be of later sequences: then
    the model is asked as it would be served, with the items that it knows.

    Retrieval. Facts: "retrieval", "retrieval_chunk_1" (the paper's sliding window instead of the served chunk) and each
    of BASELINES hold rank metrics and counts; "slices" the rows of `slice_table`. Files: each of these but the slices
    as a ranked table (tables.py). "catalogue": `recommended_facts` of the lists.
    Ranking. Facts: "ranking" task -> `binary_metrics`, "ranking_calibration" task -> `calibration_bins`. File:
    ranking.parquet, a judged table.
    Raises UserError if the model is damaged, was trained on other sequences or saw its test targets; RuntimeError if it
    saw anything of another split's window.
    """
    torch.set_num_threads(settings.num_threads())
    runs = home / "runs" / ds
    spec = evaluation_spec(home, ds, folder, split)
    cuts = split or split_of(folder)

    def build(into: Path) -> dict[str, Any]:
        model = load_model(folder).to(settings.device())
        dataset = with_features(home, ds, SequenceDataset.current(home, ds), model.config)
        refit = cuts is None and is_refit(dataset, trained_ends(folder, dataset.num_users))
        holdout = _holdout(dataset, cuts, refit=refit)
        if isinstance(model, RankingModel):
            return _judge(into, model, dataset, holdout)
        baselines = [evaluate_baseline(home, ds, name, refit=refit, split=cuts) for name in BASELINES]
        return _rank(into, model, dataset, holdout) | _joined(into, baselines)

    return storage.ensure(runs, "evaluation", spec, build)


def evaluate_baseline(
    home: Path, ds: str, name: str, *, refit: bool = False, split: TimeSplit | None = None
) -> storage.Result:
    """Return the evaluation of one of BASELINES on the current sequences, made unless it is there.

    refit: count all but the test target, as beside a model that was trained on so much; split: count what is before
    its cut, judge on its window. Facts: its name -> rank metrics
    and counts; file <name>.parquet, a ranked table. Raises UserError for an unknown name.
    """
    if name not in BASELINES:
        raise UserError(f"there is no baseline {name!r}; choose one of {', '.join(BASELINES)}")
    dataset = SequenceDataset.current(home, ds)
    made_of = {"sequences": dataset.digest, "baseline": name, "refit": refit}
    spec = made_of | {"evaluation_version": EVALUATION_VERSION} | _split_spec(split)

    def build(into: Path) -> dict[str, Any]:
        ranked = BASELINES[name](dataset, _holdout(dataset, split, refit=refit))
        return {name: _written(into, name, ranked_table(ranked, dataset))}

    return storage.ensure(home / "runs" / ds, "evaluation", spec, build)


def evaluation_spec(home: Path, ds: str, folder: Path, split: TimeSplit | None = None) -> dict[str, Any]:
    """Return what the evaluation of a run folder is made from. Raises as `evaluate_run` does."""
    manifest = storage.read_manifest(folder)
    recipe = Recipe.from_json(manifest.spec["recipe"])
    again = command_for(recipe, ds, warm_start=manifest.spec.get("warm_start"))
    storage.verify_files(folder, manifest, mend=f"train it again: {again}")
    kind = manifest.kind.removesuffix("_model")
    dataset = SequenceDataset.current(home, ds)
    own = split_of(folder)
    if split is not None:
        require_unseen(dataset, folder, split)
    elif manifest.spec["sequences"] != dataset.digest:
        raise UserError(f"the {kind} model {folder.name} of {ds} was trained on other sequences; train it again first")
    spec = {"sequences": dataset.digest, "models": {kind: manifest.digest}, "evaluation_version": EVALUATION_VERSION}
    spec |= _split_spec(split or own)
    dataset = with_features(home, ds, dataset, recipe.model)
    if isinstance(dataset, FeaturedDataset) and dataset.features_digest:
        spec["features"] = dataset.features_digest
    return spec


def split_of(folder: Path) -> TimeSplit | None:
    """Return where the log was cut for the run in a folder, None for leave-one-out."""
    return TimeSplit.from_json(storage.read_manifest(folder).spec.get("split"))


def require_unseen(dataset: SequenceDataset, folder: Path, split: TimeSplit) -> None:
    """Raise RuntimeError unless all that a run learned from came before the window: max(train event_ts) < cut.

    Raises UserError if its vocabulary is not the beginning of the data set's, or it does not say until when it learned.
    """
    until = trained_until(dataset, folder)
    if until >= split.cut:
        raise RuntimeError(
            f"{folder.name} learned from exposures up to {until} ms, the window it is to be judged on starts at "
            f"{split.cut} ms: max(train event_ts) must be before it"
        )
    run = read_run(folder)
    if run.get("vocabulary") != dataset.vocabulary.digest_of_first(
        run["shape"]["num_rows"] - dataset.vocabulary.first_item
    ):
        raise UserError(
            f"the items of {folder.name} are not the first ones of {dataset.declaration.name}; train a model of the "
            "same data set"
        )


def trained_until(dataset: SequenceDataset, folder: Path) -> int:
    """Return the time of the newest exposure that a run learned from, ms UTC. Raises UserError if nothing says it."""
    manifest = storage.read_manifest(folder)
    if "trained_until_ms" in manifest.facts:
        return int(manifest.facts["trained_until_ms"])
    if manifest.spec["sequences"] != dataset.digest:
        raise UserError(
            f"{folder.name} was trained by an earlier release, which did not record until when it learned; run gr "
            "migrate, or train it again"
        )
    return newest_time(dataset, trained_ends(folder, dataset.num_users))


def _split_spec(split: TimeSplit | None) -> dict[str, Any]:
    # Where the epochs were chosen makes no difference to what is judged.
    return {} if split is None else {"split": {"cut": split.cut, "end": split.end}}


def _holdout(dataset: SequenceDataset, split: TimeSplit | None, *, refit: bool) -> Holdout:
    return leave_one_out(dataset, "test", refit=refit) if split is None else split.window(dataset)


def _rank(folder: Path, model: RetrievalModel, dataset: SequenceDataset, holdout: Holdout) -> dict[str, Any]:
    ranked = rank_by_model(model, dataset, holdout)
    served = ranked_table(ranked, dataset)
    sliding = (
        served if model.config.chunk == 1 else ranked_table(rank_by_model(model, dataset, holdout, chunk=1), dataset)
    )
    facts = _written(folder, "retrieval", served)
    return {
        "retrieval": facts,
        "retrieval_chunk_1": _written(folder, "retrieval_chunk_1", sliding),
        "slices": slice_table(served, train_counts(dataset, holdout.ends)).to_pylist(),
        "num_users": facts["num_users"],
        "num_ties": facts["num_ties"],
        "catalogue": recommended_facts(ranked.in_lists),
        "catalogue_size": int(np.count_nonzero(dataset.vocabulary.active)),
    }


def _judge(folder: Path, model: RankingModel, dataset: SequenceDataset, holdout: Holdout) -> dict[str, Any]:
    table = judged_table(judge_by_model(model, dataset, holdout), model.tasks, dataset)
    bins = {
        task: calibration_bins(table[LABEL + task].to_numpy(), table[LOGIT + task].to_numpy())
        for task in tasks_of(table)
    }
    return {
        "ranking": _written(folder, "ranking", table),
        "ranking_calibration": bins,
        "num_ranking_users": len(table),
    }


def _written(folder: Path, name: str, table: pa.Table) -> dict[str, Any]:
    """Return a table's figures after writing it to `<name>.parquet`."""
    pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
    return metrics_of_table(table)


def _joined(folder: Path, results: list[storage.Result]) -> dict[str, Any]:
    """Return the facts of all results together after copying their files."""
    facts: dict[str, Any] = {}
    for result in results:
        facts |= result.manifest.facts
        for name in result.manifest.files:
            shutil.copyfile(result.folder / name, folder / name)
    return facts

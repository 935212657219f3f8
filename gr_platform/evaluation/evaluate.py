"""The evaluation stage: the current pair of models and the popularity baseline on the held-out last exposures.

Invariant: every printed figure can be computed again from the Parquet files beside the manifest, one row a user.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gr_platform import settings, storage
from gr_platform.errors import UserError
from gr_platform.evaluation.protocols import (
    Judged,
    judge_by_model,
    rank_by_model,
    rank_by_popularity,
    ranking_facts,
    retrieval_facts,
)
from gr_platform.evaluation.ranks import Ranked
from gr_platform.models.ranking import RankingModel
from gr_platform.models.retrieval import RetrievalModel
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.training.load import load_model

EVALUATION_VERSION = 1


def evaluate(home: Path, ds: str) -> storage.Result:
    """Return the evaluation of the data set's current models, made unless it is there, and make it current.

    Facts: "retrieval", "retrieval_chunk_1" (the paper's sliding window instead of the served chunk) and "popularity"
    hold rank metrics and counts, "ranking" task -> NE, log loss, AUC. Files: retrieval.parquet, popularity.parquet
    (user_id, item, rank, score of the target), ranking.parquet (user_id, item, label_<task>, logit_<task>).
    Raises UserError if a model is missing or was trained on other sequences.
    """
    torch.set_num_threads(settings.num_threads())
    runs = home / "runs" / ds
    dataset = SequenceDataset.open(storage.current(home / "sequences" / ds, "sequences"))
    folders = {kind: storage.current(runs, f"{kind}_model") for kind in ("retrieval", "ranking")}
    manifests = {kind: storage.read_manifest(folder, verify=True) for kind, folder in folders.items()}
    for kind, manifest in manifests.items():
        if manifest.spec["sequences"] != dataset.digest:
            raise UserError(f"the current {kind} model of {ds} was trained on other sequences; train it again first")
    spec = {
        "sequences": dataset.digest,
        "models": {kind: manifest.digest for kind, manifest in manifests.items()},
        "evaluation_version": EVALUATION_VERSION,
    }
    result = storage.ensure(runs, "evaluation", spec, lambda folder: _build(folder, folders, dataset))
    storage.point(runs, "evaluation", result.folder)
    return result


def _build(folder: Path, folders: dict[str, Path], dataset: SequenceDataset) -> dict[str, Any]:
    retrieval, ranking = load_model(folders["retrieval"]), load_model(folders["ranking"])
    assert isinstance(retrieval, RetrievalModel)
    assert isinstance(ranking, RankingModel)
    ranked = rank_by_model(retrieval, dataset, "test")
    sliding = rank_by_model(retrieval, dataset, "test", chunk=1)
    popular = rank_by_popularity(dataset, "test")
    judged = judge_by_model(ranking, dataset, "test")
    pq.write_table(_ranked_table(ranked, dataset), folder / "retrieval.parquet")
    pq.write_table(_ranked_table(popular, dataset), folder / "popularity.parquet")
    pq.write_table(_judged_table(judged, ranking.tasks, dataset), folder / "ranking.parquet")
    facts = retrieval_facts(ranked)
    return {
        "retrieval": facts,
        "retrieval_chunk_1": retrieval_facts(sliding),
        "popularity": retrieval_facts(popular),
        "ranking": ranking_facts(judged, ranking.tasks),
        "num_users": facts["num_users"],
        "num_ties": facts["num_ties"],
        "num_ranking_users": len(judged.targets),
        "catalogue_size": int(np.count_nonzero(dataset.vocabulary.active)),
    }


def _ranked_table(ranked: Ranked, dataset: SequenceDataset) -> pa.Table:
    return pa.table(
        {
            "user_id": dataset.user_ids[ranked.targets.rows],
            "item": ranked.items,
            "rank": ranked.ranks,
            "score": ranked.scores,
        }
    )


def _judged_table(judged: Judged, tasks: list[str], dataset: SequenceDataset) -> pa.Table:
    columns = {"user_id": dataset.user_ids[judged.targets.rows], "item": judged.items}
    for index, task in enumerate(tasks):
        columns |= {f"label_{task}": judged.labels[:, index], f"logit_{task}": judged.logits[:, index]}
    return pa.table(columns)

"""Results a row a target, as they are kept in Parquet.

Invariant: every figure that is printed of a run can be computed again from its table alone.
"""

import numpy as np
import pyarrow as pa

from gr_platform.evaluation.metrics import binary_metrics, rank_metrics
from gr_platform.evaluation.protocols import Judged
from gr_platform.evaluation.ranks import Ranked
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.splits import Targets

DAY_MS = 24 * 3600 * 1000
LABEL, LOGIT = "label_", "logit_"


def ranked_table(ranked: Ranked, dataset: SequenceDataset) -> pa.Table:
    """Return `user_id`, `item` (vocabulary row), `rank`, `score`, `known`, `age_days`, `tied`, `unreachable`.

    known: exposures of the history that was asked with. age_days: how long the user was known at the request, from
    their first exposure on; 0 without history.
    """
    return pa.table(
        {
            "user_id": dataset.user_ids[ranked.targets.rows],
            "item": ranked.items,
            "rank": ranked.ranks,
            "score": ranked.scores,
            "known": ranked.targets.known,
            "age_days": _age_days(dataset, ranked.targets),
            "tied": ranked.tied,
            "unreachable": ranked.unreachable,
        }
    )


def judged_table(judged: Judged, tasks: list[str], dataset: SequenceDataset) -> pa.Table:
    """Return `user_id`, `item` (vocabulary row) and for each task `label_<task>`, `logit_<task>`."""
    columns = {"user_id": dataset.user_ids[judged.targets.rows], "item": judged.items}
    for index, task in enumerate(tasks):
        columns |= {LABEL + task: judged.labels[:, index], LOGIT + task: judged.logits[:, index]}
    return pa.table(columns)


def metrics_of_table(table: pa.Table) -> dict[str, object]:
    """Return a table's figures: rank metrics and counts of a ranked one, task -> figures of a judged one."""
    if "rank" in table.column_names:
        counts = {name: int(np.count_nonzero(table[name].to_numpy())) for name in ("tied", "unreachable")}
        return rank_metrics(table["rank"].to_numpy()) | {
            "num_users": len(table["user_id"].unique()),
            "num_targets": len(table),
            "num_ties": counts["tied"],
            "num_unreachable": counts["unreachable"],
        }
    users = table["user_id"].to_numpy()
    return {
        task: binary_metrics(table[LABEL + task].to_numpy(), table[LOGIT + task].to_numpy(), users)
        for task in tasks_of(table)
    }


def tasks_of(table: pa.Table) -> list[str]:
    """Return the tasks of a judged table in order."""
    return [name.removeprefix(LABEL) for name in table.column_names if name.startswith(LABEL)]


def _age_days(dataset: SequenceDataset, targets: Targets) -> np.ndarray:
    asked = dataset.at(targets.rows, targets.positions).times
    first = dataset.at(targets.rows, np.zeros_like(targets.rows)).times
    return np.where(targets.known > 0, (asked - first) / DAY_MS, 0.0)

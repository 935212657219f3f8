"""The stages from clean events to jagged sequences: the vocabulary, then one row a user."""

from typing import TYPE_CHECKING

import dagster as dg

from assets.materialization import PREVIEW_ROWS, Stage, preview_of, table
from assets.plots import histogram
from assets.resources import PIPELINE, Platform

if TYPE_CHECKING:
    from gr_platform.sequences.dataset import SequenceDataset


@dg.asset(group_name="data", pool=PIPELINE, kinds={"duckdb", "parquet"}, deps=["events"])
def item_vocabulary(platform: Platform) -> dg.MaterializeResult:
    """Item id to dense index, append-only across retrains, with counts and first and last event."""
    import numpy as np
    import pyarrow.parquet as pq

    from gr_platform.sequences.vocabulary import Vocabulary, build_vocabulary

    stage = Stage("item_vocabulary")
    result = build_vocabulary(platform.folder(), platform.dataset_name())
    vocabulary = Vocabulary.load(result.folder)
    return stage.finish(
        digest=result.manifest.digest,
        reused=result.reused,
        figures={"num_items": vocabulary.num_items, "num_active": int(np.count_nonzero(vocabulary.active))},
        preview=preview_of(pq.read_table(result.folder / "vocabulary.parquet")),
        plot=histogram(np.log10(np.maximum(vocabulary.counts, 1)), "log10 of events an item"),
    )


@dg.asset(group_name="data", pool=PIPELINE, kinds={"duckdb", "arrow"}, deps=["events", "item_vocabulary"])
def sequences(platform: Platform) -> dg.MaterializeResult:
    """Every user's exposures in their total order, as values and offsets in a memory-mapped Arrow file."""
    import numpy as np

    from gr_platform.sequences.dataset import SequenceDataset
    from gr_platform.sequences.sequentialize import sequentialize

    stage = Stage("sequences")
    result = sequentialize(platform.folder(), platform.dataset_name())
    platform.record(dataset_digest=result.manifest.digest)
    dataset = SequenceDataset.open(result.folder)
    lengths = np.asarray(dataset.lengths)
    return stage.finish(
        digest=result.manifest.digest,
        reused=result.reused,
        figures={
            "num_users": dataset.num_users,
            "num_exposures": dataset.num_exposures,
            "median_length": float(np.median(lengths)),
            "max_length": int(lengths.max()),
        },
        preview=_first_users(dataset),
        plot=histogram(np.minimum(lengths, np.quantile(lengths, 0.99)), "exposures a user (99 % shown)"),
    )


def _first_users(dataset: "SequenceDataset") -> str:
    rows = range(min(PREVIEW_ROWS, dataset.num_users))
    shown = [(row, *dataset.history(row, int(dataset.lengths[row]))) for row in rows]
    return table(
        ["user_id", "length", "last items", "last actions (masks)"],
        [
            [dataset.user_ids[r], len(items), items[-5:].tolist(), actions[-5:].tolist()]
            for r, items, actions, _ in shown
        ],
    )

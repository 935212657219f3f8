"""A data set on disk, for tests whose training runs in processes of its own."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr_platform import storage
from gr_platform.sequences.dataset import FILE, LISTS, SequenceDataset


@pytest.fixture(scope="session")
def store() -> Callable[[SequenceDataset, Path, str], Path]:
    """Return store(dataset, home, ds): write a data set as the current sequences and return their folder."""

    def write(dataset: SequenceDataset, home: Path, ds: str) -> Path:
        parent = home / "sequences" / ds
        vocabulary, segment = parent / "vocabulary", parent / "segment"
        for folder in (vocabulary, segment):
            folder.mkdir(parents=True)
        items = dataset.vocabulary
        columns = {
            "item_id": items.item_ids,
            "count": items.counts,
            "first_ts": items.first_ts,
            "last_ts": items.first_ts,
            "active": items.active[items.first_item :],
        }
        pq.write_table(pa.table(columns), vocabulary / "vocabulary.parquet")
        lists = {name: dataset._values[name][0] for name in LISTS}
        offsets = [0, *dataset.lengths.cumsum().tolist()]
        fields = {"user_id": pa.array(dataset.user_ids)}
        for name, values in lists.items():
            fields[name] = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))
        table = pa.table(fields)
        with pa.OSFile(str(segment / FILE), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        spec = {"declaration": dataset.declaration.to_json(), "vocabulary_folder": "vocabulary"}
        result = storage.ensure(parent, "sequences", spec, lambda _: {"segments": ["segment"]})
        storage.point(parent, "sequences", result.folder)
        return result.folder

    return write

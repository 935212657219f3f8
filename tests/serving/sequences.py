"""Finished sequences in a state folder, written by hand: what the stages before them would take seconds for."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr_platform import storage
from gr_platform.events.declaration import Declaration
from gr_platform.sequences.dataset import FILE
from gr_platform.sequences.vocabulary import NUM_OOV


def write_sequences(
    home: Path,
    ds: str,
    users: Mapping[int | str, Sequence[tuple[int | str, int, int]]],
    *,
    user_id_type: str = "int64",
    item_id_type: str = "int64",
) -> Path:
    """Write users' exposures (item, mask, ms) as the data set's current sequences; return their folder."""
    parent = home / "sequences" / ds
    declaration = Declaration(
        name=ds,
        actions=("view", "like", "purchase"),
        positives=("view",),
        tasks={"like": ("like",)},
        user_id_type=user_id_type,
        item_id_type=item_id_type,
    )
    items = sorted({item for events in users.values() for item, _, _ in events})
    index = {item: 1 + NUM_OOV + at for at, item in enumerate(items)}
    counts = pa.array(np.ones(len(items), np.int64))
    vocabulary = pa.table(
        {
            "item_id": pa.array(items, pa.int64() if item_id_type == "int64" else pa.string()),
            "count": counts,
            "first_ts": counts,
            "last_ts": counts,
            "active": pa.array(np.ones(len(items), bool)),
        }
    )
    as_lists = pa.large_list(pa.int64())
    ordered = sorted(users)
    segment = pa.table(
        {
            "user_id": pa.array(ordered, pa.int64() if user_id_type == "int64" else pa.string()),
            "items": pa.array([[index[item] for item, _, _ in users[user]] for user in ordered], as_lists),
            "actions": pa.array([[mask for _, mask, _ in users[user]] for user in ordered], as_lists),
            "times": pa.array([[ms for _, _, ms in users[user]] for user in ordered], as_lists),
        }
    )

    def write_vocabulary(folder: Path) -> dict:
        pq.write_table(vocabulary, folder / "vocabulary.parquet")
        return {}

    def write_segment(folder: Path) -> dict:
        with pa.OSFile(str(folder / FILE), "wb") as sink, pa.ipc.new_file(sink, segment.schema) as writer:
            writer.write_table(segment)
        return {}

    content = [[user, list(users[user])] for user in ordered]
    words = storage.ensure(parent, "vocabulary", {"items": items}, write_vocabulary)
    made = storage.ensure(parent, "segment", {"content": content}, write_segment)
    spec = {
        "declaration": declaration.to_json(),
        "vocabulary_folder": words.folder.name,
        "content": content,
    }
    result = storage.ensure(parent, "sequences", spec, lambda _: {"segments": [made.folder.name]})
    storage.point(parent, "sequences", result.folder)
    return result.folder

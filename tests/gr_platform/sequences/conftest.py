"""Logs taken all the way to sequences, for the tests of this package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file
from gr_platform.sequences.dataset import SequenceDataset
from gr_platform.sequences.sequentialize import sequentialize
from gr_platform.sequences.vocabulary import build_vocabulary

Row = tuple[int | str, int | str, str, int]
START_MS = 1_700_000_000_000


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def land(tmp_path: Path, home: Path) -> Callable[..., None]:
    """Return land(rows of (user, item, action, ms after START_MS), name=..., **options): imported as data set `log`."""

    def run(rows: list[Row], name: str = "log", home: Path = home, **options: Any) -> None:
        users, items, actions, times = (list(column) for column in zip(*rows, strict=True))
        path = tmp_path / f"{name}.parquet"
        columns = {"user_id": users, "item_id": items, "action": actions, "event_ts": [START_MS + t for t in times]}
        pq.write_table(pa.table(columns), path)
        import_file(path, home=home, dataset="log", **options)
        ingest(home, "log")

    return run


@pytest.fixture
def make(home: Path, land: Callable[..., None]) -> Callable[..., SequenceDataset]:
    """Return make(rows, ...) -> the sequences of the data set `log` after landing them."""

    def run(rows: list[Row], name: str = "log", home: Path = home, **options: Any) -> SequenceDataset:
        land(rows, name, home, **options)
        build_vocabulary(home, "log")
        return SequenceDataset.open(sequentialize(home, "log").folder)

    return run


def crowd(first_ms: int = 0) -> list[Row]:
    """Return ten users with four views each: enough for a data set to be accepted."""
    return [
        (user, 500 + (user + step) % 7, "view", first_ms + step * 10) for user in range(90, 100) for step in range(4)
    ]

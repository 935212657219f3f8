"""Small logs on disk for the tests of import and ingest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

START_S = 1_700_000_000


def log_rows(num_users: int = 12, per_user: int = 4) -> list[dict[str, Any]]:
    """Return views with some purchases, seconds, in order of time."""
    rows = []
    for step in range(per_user):
        for user in range(num_users):
            action = "buy" if (user + step) % 3 == 0 else "view"
            rows.append(
                {
                    "user_id": user,
                    "item_id": 100 + (user * 3 + step) % 17,
                    "action": action,
                    "timestamp": START_S + step,
                }
            )
    return rows


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def write_csv(tmp_path: Path) -> Callable[..., Path]:
    """Return write(rows, name="log.csv", delimiter=",") -> path, with the keys of the first row as header."""

    def write(rows: list[dict[str, Any]], name: str = "log.csv", delimiter: str = ",") -> Path:
        lines = [delimiter.join(rows[0])]
        lines += [delimiter.join("" if v is None else str(v) for v in row.values()) for row in rows]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[..., Path]:
    """Return write(rows, name="log.parquet", schema=None) -> path."""

    def write(rows: list[dict[str, Any]], name: str = "log.parquet", schema: pa.Schema | None = None) -> Path:
        path = tmp_path / name
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        return path

    return write


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return log_rows()

"""Side information of items as it was known at the time of an event.

Invariant: what is found for an event was true at its time or before, by construction: the answer is the newest row of
the item that is not later; what a file without times says comes first of all. Codes are append-only, as those of the
vocabulary. Rows of items without an event are left out until the vocabulary has them.

Legend: R rows of side information, T exposures asked about.
"""
# ruff: noqa: S608 - identifiers are quoted by `quoted`

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.events.database import connect, quoted
from gr_platform.events.features import FeatureFile, all_rows, feature_files, standing
from gr_platform.sequences.codes import MISSING, Codes, appended
from gr_platform.sequences.vocabulary import Vocabulary

FILE = "rows.arrow"
FEATURES_VERSION = 1
STREAM_ROWS = 1 << 17


class ItemFeatures:
    """Side information of items. items, times: int64 [R], ascending by (item, time), at equal times in source order;
    columns: property -> codes int64 [R]; codes: property -> what its codes mean."""

    def __init__(
        self, items: np.ndarray, times: np.ndarray, columns: dict[str, np.ndarray], codes: dict[str, Codes]
    ) -> None:
        self.items, self.times, self.columns, self.codes = items, times, columns, codes

    @staticmethod
    def open(folder: Path) -> "ItemFeatures":
        """Return the side information of a result folder. Raises UserError if it is unfinished or damaged."""
        table, codes = read_rows(folder)
        columns = {name: table[f"p_{name}"].to_numpy() for name in codes}
        return ItemFeatures(table["item"].to_numpy(), table["event_ts"].to_numpy(), columns, codes)

    @staticmethod
    def current(home: Path, ds: str) -> "ItemFeatures":
        """Return the side information of all landed files over the current vocabulary, made where it is not there yet.

        Raises UserError if none was imported or there is no vocabulary yet.
        """
        return ItemFeatures.open(build_item_features(home, ds).folder)

    def at(self, items: np.ndarray, times: np.ndarray) -> dict[str, np.ndarray]:
        """Return property -> codes int64 [T] of dense item indices at times (ms UTC), int64 [T] each: those of the
        item's newest row that is not later, 0 where there is none or its cell is empty."""
        items, times = np.asarray(items, np.int64), np.asarray(times, np.int64)
        keys, moments = self._keys
        wanted = _joined(items, np.searchsorted(moments, times, side="right"), len(moments))
        row = np.searchsorted(keys, wanted, side="right") - 1
        found = row >= 0
        found[found] = self.items[row[found]] == items[found]
        out = {}
        for name, codes in self.columns.items():
            out[name] = np.full(len(items), MISSING, np.int64)
            out[name][found] = codes[row[found]]
        return out

    @cached_property
    def _keys(self) -> tuple[np.ndarray, np.ndarray]:
        """Return an integer [R] by which the rows are ascending, and the different times of all rows."""
        moments, place = np.unique(self.times, return_inverse=True)
        return _joined(self.items, place + 1, len(moments)), moments


def _joined(items: np.ndarray, num_earlier: np.ndarray, num_moments: int) -> np.ndarray:
    """Return one integer for an item and how many of the moments are not later than a time."""
    return items * (num_moments + 1) + num_earlier


def build_item_features(home: Path, ds: str) -> storage.Result:
    """Return the side information of all landed item-features files over the current vocabulary, and make it current.

    Files: rows.arrow (item, event_ts, p_<property>), values-<property>.parquet (value, count). Raises UserError if no
    such file was imported or there is no vocabulary yet.
    """
    files = feature_files(home, ds, "item-features")
    vocabulary = Vocabulary.load(storage.current(home / "sequences" / ds, "vocabulary"))
    indices = np.arange(vocabulary.num_items) + vocabulary.first_item
    table = pa.table({"id": pa.array(vocabulary.item_ids), "item": indices})

    def write(connection: duckdb.DuckDBPyConnection, folder: Path, codes: dict[str, Codes]) -> dict[str, Any]:
        connection.register("vocabulary", table)
        num_rows = write_rows(
            connection,
            f"SELECT item, event_ts, {{properties}} FROM {_stated(files)} JOIN vocabulary USING (id) "
            "ORDER BY item, event_ts, source_file, source_row",
            folder,
            codes,
        )
        return {"num_rows": num_rows}

    return build(home, ds, files, "item-features", {"vocabulary": vocabulary.digest}, write)


def _stated(files: list[FeatureFile]) -> str:
    """Return a FROM clause for `rows` in which a file that lacks a property of a file without times does not end it.

    A row states all properties of its item, NULL included; but of what always held, those files alone that have it.
    """
    replaced = []
    for name in sorted(standing(files)):
        has_it = [str(file.entry.sequence) for file in files if name in file.entry.properties]
        if len(has_it) < len(files):
            # In a list, a cell that is empty is told from one that is not there.
            said = f"CASE WHEN source_file IN ({', '.join(has_it)}) THEN [{quoted(f'p_{name}')}] END"
            order = "PARTITION BY id ORDER BY event_ts, source_file, source_row"
            last = f"last_value({said} IGNORE NULLS) OVER ({order} ROWS UNBOUNDED PRECEDING)"
            replaced.append(f"({last})[1] AS {quoted(f'p_{name}')}")
    return f"(SELECT * REPLACE ({', '.join(replaced)}) FROM rows)" if replaced else "rows"


def build(
    home: Path,
    ds: str,
    files: list[FeatureFile],
    kind: str,
    besides: dict[str, Any],
    write: Callable[[duckdb.DuckDBPyConnection, Path, dict[str, Codes]], dict[str, Any]],
) -> storage.Result:
    """Return the result of landed files of a kind, and make it current; codes go on from those that are current.

    besides: what it is made from beside the files. write(connection with the view `rows` (see `all_rows`), folder,
    codes) writes it and returns its facts. Raises UserError if there are no files.
    """
    if not files:
        raise UserError(f"data set {ds} has no {kind}; run gr import FILE --as {kind} first")
    parent = home / "sequences" / ds
    made_of = {"files": [_file_spec(file) for file in files], "version": FEATURES_VERSION} | besides
    base = _current(parent, kind)
    if base is not None and base.manifest.spec | made_of == base.manifest.spec:
        return base
    rows, names = all_rows(files)
    with connect(home) as connection:
        connection.execute(f"CREATE TABLE rows AS {rows}")
        tables = {name: _values(connection, name, base) for name in names}
        codes = {name: Codes(table) for name, table in tables.items()}

        def make(folder: Path) -> dict[str, Any]:
            for name, table in tables.items():
                pq.write_table(table, folder / f"values-{name}.parquet", compression="zstd")
            return write(connection, folder, codes)

        spec = made_of | {"codes": {name: each.digest for name, each in codes.items()}}
        result = storage.ensure(parent, kind, spec, make)
    storage.point(parent, kind, result.folder)
    return result


def _current(parent: Path, kind: str) -> storage.Result | None:
    try:
        folder = storage.current(parent, kind)
        return storage.Result(folder=folder, manifest=storage.read_manifest(folder, verify=True), reused=True)
    except UserError:
        return None


def _file_spec(file: FeatureFile) -> dict[str, Any]:
    named = ("sha256", "landed_sha256", "sequence", "id_column", "time_column", "time_unit", "properties")
    own = {name: getattr(file.entry, name) for name in named}
    return own | {"id_type": file.id_type, "time_zone": file.declaration.time_zone}


def _values(connection: duckdb.DuckDBPyConnection, name: str, base: storage.Result | None) -> pa.Table:
    """Return the values of a property (value, count) behind those that have a code already."""
    file = f"values-{name}.parquet"
    known = Codes.load(base.folder / file) if base and file in base.manifest.files else None
    column = quoted(f"p_{name}")
    seen = connection.sql(
        f"SELECT {column} AS value, count(*) AS count FROM rows WHERE {column} IS NOT NULL GROUP BY {column} "
        f"ORDER BY min({{'file': source_file, 'at': event_ts}}), {column}"
    ).to_arrow_table()
    return appended(seen, known, name)


def write_rows(connection: duckdb.DuckDBPyConnection, sql: str, folder: Path, codes: dict[str, Codes]) -> int:
    """Write the rows of SQL, its `{properties}` those of `codes`, with codes for texts; return their number."""
    names = [f"p_{name}" for name in codes]
    num_rows = 0
    stream = connection.sql(sql.format(properties=", ".join(map(quoted, names)))).to_arrow_reader(STREAM_ROWS)
    fields = [pa.field(each.name, pa.int64()) if each.name in names else each for each in stream.schema]
    schema = pa.schema(fields)
    with pa.OSFile(str(folder / FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in stream:
            columns = {name: batch.column(name) for name in batch.schema.names}
            columns |= {f"p_{name}": pa.array(each.lookup(columns[f"p_{name}"])) for name, each in codes.items()}
            writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))
            num_rows += len(batch)
    return num_rows


def read_rows(folder: Path) -> tuple[pa.Table, dict[str, Codes]]:
    """Return the rows of a result folder, memory-mapped, and the codes of each of their properties."""
    storage.read_manifest(folder)
    try:
        table = pa.ipc.open_file(pa.memory_map(str(folder / FILE))).read_all()
    except (OSError, pa.ArrowInvalid):
        raise UserError(f"{folder.name}/{FILE} is missing or damaged; delete {folder.name} and make it again") from None
    names = [name.removeprefix("p_") for name in table.column_names if name.startswith("p_")]
    return table, {name: Codes.load(folder / f"values-{name}.parquet") for name in names}

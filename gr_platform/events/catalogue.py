"""Titles of items, so that lists of recommendations can be read by people.

Invariant: a catalogue never changes what is learned or served; a data set without one has no titles.
"""

import csv
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gr_platform.errors import UserError

FILE = "catalogue.parquet"
_ID_NAMES = ("item_id", "movieid", "movie_id", "itemid", "item", "id")
_TITLE_NAMES = ("title", "name")


def find_catalogue(source: Path, format: str, declared: tuple[str, ...] = ()) -> Path | None:
    """Return the catalogue beside a log, if any: a declared one, `<stem>.catalogue.parquet|csv`, MovieLens' movies."""
    names = [*declared, f"{source.stem}.catalogue.parquet", f"{source.stem}.catalogue.csv"]
    names += ["movies.dat", "movies.csv"] if format == "movielens" else []
    return next((source.parent / name for name in names if (source.parent / name).is_file()), None)


def read_titles(path: Path) -> dict[str, str]:
    """Return item id (as text) -> title of a catalogue file. Raises UserError if it has no such columns."""
    if path.suffix == ".parquet":
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid):
            raise UserError(f"the catalogue {path.name} is not a readable Parquet file; mend or remove it") from None
        names = table.column_names
        ids, titles = _columns(path, names)
        return dict(
            zip(map(str, table[names[ids]].to_pylist()), map(str, table[names[titles]].to_pylist()), strict=True)
        )
    text = _decoded(path)
    if path.suffix == ".dat":
        fields = [line.split("::") for line in text.splitlines() if line]
        return {row[0]: row[1] for row in fields if len(row) >= 2}
    rows = list(csv.reader(io.StringIO(text)))
    ids, titles = _columns(path, rows[0] if rows else [])
    return {row[ids]: row[titles] for row in rows[1:] if len(row) > max(ids, titles)}


def write_titles(folder: Path, titles: dict[str, str]) -> None:
    """Add titles to a data set's catalogue in its landing folder; a newer title replaces an older one."""
    merged = {**load_titles(folder), **titles}
    table = pa.table({"item_id": pa.array(merged, pa.string()), "title": pa.array(merged.values(), pa.string())})
    building = folder / f".writing-{FILE}"
    pq.write_table(table, building, compression="zstd")
    building.replace(folder / FILE)


def load_titles(folder: Path) -> dict[str, str]:
    """Return item id (as text) -> title of a data set's landing folder, {} if it has no catalogue."""
    path = folder / FILE
    return read_titles(path) if path.is_file() else {}


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")  # MovieLens-1M's movies.dat


def _columns(path: Path, names: list[str]) -> tuple[int, int]:
    lowered = [name.lower() for name in names]
    ids = next((lowered.index(name) for name in _ID_NAMES if name in lowered), None)
    titles = next((lowered.index(name) for name in _TITLE_NAMES if name in lowered), None)
    if ids is None or titles is None:
        raise UserError(
            f"the catalogue {path.name} needs columns item_id and title, it has {', '.join(names) or 'none'}; "
            "rename its columns"
        )
    return ids, titles

"""Log files of any supported format become a SQL relation whose values are untouched.

Invariant: reading is strict. A file is read whole or refused with one sentence; text stays text, so no integer ever
passes through a float and a bad cell survives until ingest can quarantine it.
"""

import codecs
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb
import pyarrow as pa

from gr_platform.errors import UserError
from gr_platform.events.columns import check_row_number, parquet
from gr_platform.events.database import literal

FORMATS = ("auto", "csv", "jsonl", "parquet", "movielens")
_SUFFIXES = {
    "csv": (".csv", ".tsv", ".txt"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "movielens": (".dat",),
}
# What a .dat file of MovieLens is taken for -> its file, its columns.
_DAT = {
    "log": ("ratings.dat", ("user_id", "movie_id", "rating", "timestamp")),
    "item-features": ("movies.dat", ("movie_id", "title", "genres")),
    "user-features": ("users.dat", ("user_id", "gender", "age", "occupation", "zip_code")),
}
# What lies beside MovieLens' ratings and is no log.
_BESIDE_RATINGS = ("movies", "users", "links", "tags", "genome-scores", "genome-tags")
# How files are called while something still writes them.
_UNFINISHED = (".part", ".partial", ".tmp", ".crdownload", ".download")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_MAX_HEADER_BYTES = 1 << 20
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An opened log: `relation` is a FROM clause with the source's own column names, in file order.

    columns: name -> DuckDB type, VARCHAR for text formats. is_text: values are text (csv, jsonl, MovieLens' .dat).
    """

    path: Path
    format: str
    relation: str
    columns: dict[str, str]
    is_text: bool


def open_source(
    connection: duckdb.DuckDBPyConnection,
    path: Path,
    format: str = "auto",
    header: tuple[str, ...] = (),
    *,
    holds: str = "log",
) -> Source:
    """Return the log at `path`; header: the columns of a CSV file that has no header line.

    holds: log, item-features or user-features, which says what the columns of MovieLens' .dat are.

    Raises UserError: no such file, a folder, empty, half-written, unknown format, unreadable.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}; the formats are {', '.join(FORMATS)}")
    if path.is_dir():
        raise UserError(f"{path.name} is a folder; name the log file inside it, for example {path.name}/ratings.dat")
    if not path.is_file():
        raise UserError(f"there is no file {path.name}; check the path")
    if path.stat().st_size == 0:
        raise UserError(f"{path.name} is empty (0 bytes); give a log with at least one event")
    if path.name.lower().endswith(_UNFINISHED):
        raise UserError(f"{path.name} is half-written, as its name says; import it when it has its final name")
    opened = _open(connection, path, _detect(path) if format == "auto" else format, header, holds)
    check_row_number(path.name, opened.columns)
    if format == "auto" and _is_movielens(opened.columns):
        return replace(opened, format="movielens")
    return opened


def log_files(folder: Path) -> list[Path]:
    """Return the logs of a folder in the order of their names. Raises UserError if there is none or one is unfinished.

    Left out: hidden files, catalogues, what has no name of a log, and what lies beside MovieLens' ratings.
    """
    endings = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith((".", "_"))]
    if unfinished := next((path for path in files if path.name.lower().endswith(_UNFINISHED)), None):
        raise UserError(f"{unfinished.name} in {folder.name} is half-written, as its name says; finish or remove it")
    found = [path for path in files if _plain_name(path).endswith(endings) and ".catalogue." not in path.name]
    if any(_plain_name(path).startswith("ratings.") for path in found):
        found = [path for path in found if _plain_name(path).split(".")[0] not in _BESIDE_RATINGS]
    if not found:
        raise UserError(f"{folder.name} is a folder without a log (.csv, .jsonl, .parquet or .dat); name another")
    return found


def _plain_name(path: Path) -> str:
    return path.name.lower().removesuffix(".gz").removesuffix(".zst")


def unreadable(path: Path, error: Exception, *, copy: Path | None = None) -> UserError:
    """Return the one-sentence error for a file that its reader refused; copy: what was read in its place."""
    text = str(error)
    for read in (copy or path, path):
        for shown in (_glob_free(read), str(read.absolute()), str(read)):
            text = text.replace(shown, path.name)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # What DuckDB advises are options of its reader, which nobody here can set.
    lines = [line for line in lines if not line.startswith(("Original Line", "Possible", "Try ", "LINE ", "^", "*"))]
    detail = "; ".join(lines[:3])
    return UserError(f"{path.name} cannot be read: {detail[:300].rstrip('.')}; mend or fetch the file again")


def _detect(path: Path) -> str:
    with path.open("rb") as stream:
        if stream.read(4) == b"PAR1":
            return "parquet"
    name = _plain_name(path)
    for kind, suffixes in _SUFFIXES.items():
        if name.endswith(suffixes):
            return kind
    raise UserError(
        f"the format of {path.name} is unknown; name the file .csv, .tsv, .jsonl, .parquet or .dat (.gz and .zst "
        "allowed for text) or give --format csv, jsonl, parquet or movielens"
    )


def _open(connection: duckdb.DuckDBPyConnection, path: Path, kind: str, header: tuple[str, ...], holds: str) -> Source:
    if kind == "movielens":
        kind = "dat" if _plain_name(path).endswith(".dat") else _detect(path)
        return replace(_open(connection, path, kind, header, holds), format="movielens")
    if kind != "parquet" and path.name.lower().endswith(".zst"):
        _check_whole(path)
    if kind == "csv":
        return _open_csv(path, header)
    if kind == "dat":
        return _open_dat(path, holds)
    return _open_parquet(connection, path) if kind == "parquet" else _open_jsonl(connection, path)


def _open_parquet(connection: duckdb.DuckDBPyConnection, path: Path) -> Source:
    with path.open("rb") as stream:
        start = stream.read(4)
        stream.seek(-min(4, path.stat().st_size), 2)
        if start == b"PAR1" and stream.read(4) != b"PAR1":
            raise UserError(
                f"{path.name} cannot be read: it ends before its footer, so it is half-written; fetch it again"
            )
    relation = parquet(path)
    try:
        rows = connection.sql(f"DESCRIBE SELECT * FROM {relation}").fetchall()  # noqa: S608
    except duckdb.Error as error:
        raise unreadable(path, error) from None
    return Source(
        path=path, format="parquet", relation=relation, columns={row[0]: row[1] for row in rows}, is_text=False
    )


def _open_csv(path: Path, header: tuple[str, ...]) -> Source:
    first = _first_line(path)
    delimiter = max(",\t;|", key=first.count)
    names = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
    if header:
        if len(names) != len(header):
            raise UserError(
                f"the first line of {path.name} has {len(names)} field(s), but the declaration's header has "
                f"{len(header)} ({', '.join(header)}); mend the declaration"
            )
        return _text_source(path, "csv", header, delimiter, header=False)
    if not names or any(not name for name in names) or len({name.lower() for name in names}) != len(names):
        raise UserError(
            f"the first line of {path.name} is not a header of different column names (case does not count); add one, "
            "for example user_id,item_id,action,timestamp"
        )
    return _text_source(path, "csv", names, delimiter, header=True)


def _open_dat(path: Path, holds: str) -> Source:
    name, columns = _DAT[holds]
    encoding = "utf-8" if holds == "log" else _encoding(path)
    num_fields = len(_first_line(path, encoding).split("::"))
    if num_fields != len(columns):
        other = next((kind for kind, (_, each) in _DAT.items() if len(each) == num_fields), None)
        remedy = (
            f"it has those of {_DAT[other][0]}, which comes with --as {other}" if other else "give the right --format"
        )
        raise UserError(
            f"{path.name} does not look like MovieLens' {name} ({'::'.join(columns)} on each line), its first line has "
            f"{num_fields} field(s); {remedy}"
        )
    return _text_source(path, "movielens", columns, "::", header=False, encoding=encoding)


def _text_source(
    path: Path, format: str, names: Sequence[str], delimiter: str, *, header: bool, encoding: str = "utf-8"
) -> Source:
    columns = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in names)
    quote = "''" if delimiter == "::" else "'\"'"
    encoded = "" if encoding == "utf-8" else f"encoding={literal(encoding)}, "
    relation = (
        f"read_csv({literal(_glob_free(path))}, auto_detect=false, header={str(header).lower()}, "
        f"delim={literal(delimiter)}, quote={quote}, escape={quote}, {encoded}"
        f"columns={{{columns}}}, strict_mode=true, null_padding=false, nullstr='')"
    )
    return Source(path=path, format=format, relation=relation, columns=dict.fromkeys(names, "VARCHAR"), is_text=True)


def _open_jsonl(connection: duckdb.DuckDBPyConnection, path: Path) -> Source:
    if _starts_with_bom(path):
        raise UserError(f"{path.name} starts with a byte order mark, which JSON lines must not have; save it without")
    if not _first_line(path).lstrip().startswith("{"):
        raise UserError(f'{path.name} is not JSON lines: each line must be an object such as {{"user_id": 1, ...}}')
    reader = f"read_json({literal(_glob_free(path))}, format='newline_delimited', records=true"
    # The whole file is looked at: a key may appear late, and many rare keys are still keys, not one map.
    whole = "sample_size=-1, map_inference_threshold=-1, field_appearance_threshold=0"
    try:
        rows = connection.sql(f"DESCRIBE SELECT * FROM {reader}, {whole})").fetchall()  # noqa: S608
    except duckdb.Error as error:
        raise unreadable(path, error) from None
    # The types are guessed from a sample and would send long integers through a float: every value is read as text.
    columns = ", ".join(f"{literal(row[0])}: 'VARCHAR'" for row in rows)
    return Source(
        path=path,
        format="jsonl",
        relation=f"{reader}, columns={{{columns}}})",
        columns=dict.fromkeys((row[0] for row in rows), "VARCHAR"),
        is_text=True,
    )


def _stream(path: Path) -> pa.NativeFile:
    return pa.input_stream(str(path), compression=_COMPRESSIONS.get(path.suffix.lower()))


def _check_whole(path: Path) -> None:
    """Raise UserError for a cut .zst file: DuckDB takes it for a shorter one."""
    try:
        with _stream(path) as stream:
            while stream.read(_CHUNK):
                pass
    except OSError as error:
        raise unreadable(path, error) from None


def _starts_with_bom(path: Path) -> bool:
    try:
        with _stream(path) as stream:
            return stream.read(3) == codecs.BOM_UTF8
    except OSError:
        return False


def _encoding(path: Path) -> str:
    """Return latin-1 for text that is no UTF-8, as MovieLens-1M's titles are not."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with _stream(path) as stream:
            while chunk := stream.read(_CHUNK):
                decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "latin-1"
    except OSError as error:
        raise unreadable(path, error) from None
    return "utf-8"


def _first_line(path: Path, encoding: str = "utf-8") -> str:
    """Return the first line without byte order mark. Raises UserError if the bytes do not decode."""
    try:
        with _stream(path) as raw, io.BufferedReader(raw) as stream:
            line = stream.readline(_MAX_HEADER_BYTES).decode(encoding).removeprefix("\ufeff").rstrip("\r\n")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"{path.name} cannot be read as UTF-8 text ({type(error).__name__} in line 1); check its format"
        ) from None
    if not line.strip():
        raise UserError(f"the first line of {path.name} is blank; the file must start with its header or first event")
    return line


def _glob_free(path: Path) -> str:
    """Return the path with DuckDB's wildcard characters bracketed, so that it means this file alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in str(path.absolute()))


def _is_movielens(columns: dict[str, str]) -> bool:
    names = {name.lower().replace("_", "") for name in columns}
    return {"userid", "movieid", "rating", "timestamp"} <= names

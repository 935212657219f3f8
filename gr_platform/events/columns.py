"""A landed file as SQL: its own columns under canonical names, ids in the data set's type.

Invariant: no cell fails the query and none is lost: what cannot be an id is NULL with its text beside it, everything
else stays as it was found. There is no window function, so rows stream through any number of threads.
"""
# ruff: noqa: S608 - identifiers and strings are quoted by `quoted` and `literal`

from pathlib import Path

from gr_platform.errors import UserError
from gr_platform.events.database import literal, quoted
from gr_platform.events.declaration import IdType
from gr_platform.events.ledger import LandedFile
from gr_platform.events.times import carries_zone

INTERACTION = "interaction"
INTEGER_TYPES = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER")
WIDE_TYPES = ("UBIGINT", "HUGEINT", "UHUGEINT")
FLOAT_TYPES = ("DOUBLE", "FLOAT")
MISSING = "'nan', 'null', 'none', 'na', '\\N'"  # among integers these mean no id; among text they are text
ROW_NUMBER = "file_row_number"  # DuckDB's own column of a Parquet file


def parquet(path: Path) -> str:
    """Return a FROM clause for one Parquet file, whatever its folders are called."""
    escaped = "".join(f"[{c}]" if c in "*?[" else c for c in str(path.absolute()))
    return f"read_parquet({literal(escaped)}, hive_partitioning=false)"


def landed_query(file: LandedFile) -> str:
    """Return a SELECT over a landed file, one row a row of it.

    Columns: user_id, item_id (the data set's type, NULL where the cell holds no such id), action (VARCHAR), value and
    event_ts as found, event_id (VARCHAR), source_row (BIGINT from 1), each context column (VARCHAR, NULL in a file
    without it), then raw_user and raw_item: the cell's text, NULL where its type cannot fail.
    """
    entry, declared = file.entry, file.declaration
    columns = {
        "user_id": id_sql(
            quoted(entry.columns["user_id"]), entry.types[entry.columns["user_id"]], declared.user_id_type
        ),
        "item_id": id_sql(
            quoted(entry.columns["item_id"]), entry.types[entry.columns["item_id"]], declared.item_id_type
        ),
        "action": action_sql(entry.columns, entry.ratings, declared.rename_actions),
        "value": _value_sql(entry.columns, entry.types),
        "event_ts": _time_sql(entry.columns, entry.types),
        "event_id": event_id_sql(entry.columns),
        "source_row": f"{ROW_NUMBER} + 1",
    }
    present = {name.lower(): name for name in entry.types}
    for name in declared.context:
        columns[name] = f"{quoted(present[name])}::VARCHAR" if name in present else "NULL::VARCHAR"
    for name, canonical in (("raw_user", "user_id"), ("raw_item", "item_id")):
        columns[name] = _raw_sql(quoted(entry.columns[canonical]), entry.types[entry.columns[canonical]])
    selected = ", ".join(f"{value} AS {quoted(name)}" for name, value in columns.items())
    return f"SELECT {selected} FROM {parquet(file.path)}"


def landed_time_type(file: LandedFile) -> str:
    """Return the DuckDB type of `event_ts` in `landed_query`: BIGINT, DOUBLE, VARCHAR, TIMESTAMP or TIMESTAMPTZ."""
    return time_type(file.entry.types[file.entry.columns["event_ts"]])


def id_sql(column: str, source_type: str, id_type: IdType) -> str:
    """Return SQL for an id in the data set's type, NULL where the cell holds none ('007' is no integer)."""
    text = f"{column}::VARCHAR"
    if id_type == "string":
        return f"nullif({text}, '')"
    if source_type in INTEGER_TYPES:
        return f"{column}::BIGINT"
    if source_type in FLOAT_TYPES:
        return f"CASE WHEN {whole_sql(column, source_type)} THEN TRY_CAST({column} AS BIGINT) END"
    return f"CASE WHEN {whole_sql(column, source_type)} THEN TRY_CAST({text} AS BIGINT) END"


def whole_sql(column: str, source_type: str) -> str:
    """Return SQL for whether a cell is an int64 written the canonical way; NULL for no cell."""
    if source_type in FLOAT_TYPES:
        # What pandas makes of integers with gaps; beyond 2^53 a double no longer tells integers apart.
        return f"(isfinite({column}) AND {column} = floor({column}) AND abs({column}) < 2^53)"
    return f"TRY_CAST({column}::VARCHAR AS BIGINT)::VARCHAR = {column}::VARCHAR"


def missing_sql(text: str) -> str:
    """Return SQL for whether the text of an id says that there is none."""
    return f"({text} IS NULL OR {text} = '' OR lower({text}) IN ({MISSING}))"


def action_sql(mapping: dict[str, str], ratings: bool, renamed: dict[str, str]) -> str:
    """Return SQL for the action of a row: its text, `rate_<value>`, or `interaction` where a log has neither."""
    if ratings:
        number = f"TRY_CAST({quoted(mapping['value'])} AS DOUBLE)"
        whole = f"TRY_CAST({number} AS BIGINT)::VARCHAR"
        text = f"CASE WHEN {number} = floor({number}) THEN {whole} ELSE {number}::VARCHAR END"
        return f"CASE WHEN isfinite({number}) THEN 'rate_' || ({text}) END"
    if "action" not in mapping:
        return f"'{INTERACTION}'"
    text = f"nullif(trim({quoted(mapping['action'])}::VARCHAR), '')"
    cases = " ".join(f"WHEN {literal(found)} THEN {literal(name)}" for found, name in renamed.items())
    return f"CASE {text} {cases} ELSE {text} END" if cases else text


def event_id_sql(mapping: dict[str, str]) -> str:
    """Return SQL for the event id of a row: its text, NULL where it has none."""
    if "event_id" not in mapping:
        return "NULL::VARCHAR"
    text = f"{quoted(mapping['event_id'])}::VARCHAR"
    return f"CASE WHEN NOT {missing_sql(text)} THEN {text} END"


def check_row_number(name: str, columns: dict[str, str]) -> None:
    """Raise UserError where a log has a column of the name under which DuckDB counts rows."""
    if ROW_NUMBER in {column.lower() for column in columns}:
        raise UserError(f"{name} has a column {ROW_NUMBER!r}, a name that the reader needs for itself; rename it")


def _raw_sql(column: str, source_type: str) -> str:
    return "NULL::VARCHAR" if source_type in INTEGER_TYPES else f"{column}::VARCHAR"


def _value_sql(mapping: dict[str, str], types: dict[str, str]) -> str:
    if "value" not in mapping:
        return "NULL::DOUBLE"
    name = quoted(mapping["value"])
    return name if types[mapping["value"]] == "VARCHAR" else f"TRY_CAST({name} AS DOUBLE)"


def time_type(source_type: str) -> str:
    """Return the DuckDB type in which a time column is read: BIGINT, DOUBLE, VARCHAR, TIMESTAMP or TIMESTAMPTZ."""
    if carries_zone(source_type):
        return "TIMESTAMPTZ"
    if source_type.startswith("TIMESTAMP") or source_type == "DATE":
        return "TIMESTAMP"
    if source_type in (*INTEGER_TYPES, *WIDE_TYPES):
        return "BIGINT"
    return "DOUBLE" if source_type in FLOAT_TYPES else "VARCHAR"


def _time_sql(mapping: dict[str, str], types: dict[str, str]) -> str:
    return f"TRY_CAST({quoted(mapping['event_ts'])} AS {time_type(types[mapping['event_ts']])})"

"""What each landed column is made from, as SQL over the source's own columns.

Invariant: values are copied as they were found; ids alone get the data set's type, and only where every one has it.
"""

from gr_platform.errors import UserError
from gr_platform.events.database import quoted
from gr_platform.events.declaration import Declaration
from gr_platform.events.profile import INTEGER_TYPES, MISSING, Profile, action_sql, event_id_sql
from gr_platform.events.readers import Source
from gr_platform.events.times import carries_zone


def landed_columns(
    source: Source, mapping: dict[str, str], declared: Declaration | None, found: Profile
) -> dict[str, str]:
    """Return landed column -> SQL: ids in the data set's type, the rest as found."""
    columns = {}
    for name, id_type in (("user_id", found.user_id_type), ("item_id", found.item_id_type)):
        source_type = source.columns[mapping[name]]
        agreed = getattr(declared, f"{name}_type") if declared else id_type
        # Text that happens to be all digits is still text where the data set's ids are.
        if agreed != id_type and not (agreed == "string" and source_type == "VARCHAR"):
            raise UserError(
                f"column {mapping[name]!r} of {source.path.name} holds {id_type} ids, but {name} of this data set is "
                f"{agreed}; import it as another --dataset"
            )
        columns[name] = _id_sql(quoted(mapping[name]), source_type, agreed)
    columns["action"] = action_sql(mapping, found.ratings)
    columns["value"] = _value_sql(source, mapping)
    columns["event_ts"] = _time_sql(source, mapping)
    columns["event_id"] = event_id_sql(mapping)
    columns["source_row"] = quoted(row_column(source))
    return columns


def row_column(source: Source) -> str:
    """Return a name for the row number that no column of the source has, however it is written."""
    taken, name = {column.lower() for column in source.columns}, "gr_source_row"
    while name in taken:
        name += "_"
    return name


def _id_sql(column: str, source_type: str, id_type: str) -> str:
    if id_type == "string":
        return f"nullif({column}::VARCHAR, '')"
    if source_type in INTEGER_TYPES:
        return f"{column}::BIGINT"
    if source_type in ("DOUBLE", "FLOAT"):
        return f"CASE WHEN isfinite({column}) THEN {column}::BIGINT END"
    text = f"{column}::VARCHAR"
    return f"CASE WHEN {text} <> '' AND lower({text}) NOT IN ({MISSING}) THEN {text}::BIGINT END"


def _value_sql(source: Source, mapping: dict[str, str]) -> str:
    if "value" not in mapping:
        return "NULL::DOUBLE"
    name = quoted(mapping["value"])
    return name if source.columns[mapping["value"]] == "VARCHAR" else f"TRY_CAST({name} AS DOUBLE)"


def _time_sql(source: Source, mapping: dict[str, str]) -> str:
    name, kind = quoted(mapping["event_ts"]), source.columns[mapping["event_ts"]]
    if carries_zone(kind):
        return f"{name}::TIMESTAMPTZ"
    if kind.startswith("TIMESTAMP") or kind == "DATE":
        return f"{name}::TIMESTAMP"
    if "INT" in kind:
        return f"TRY_CAST({name} AS BIGINT)"
    return f"{name}::DOUBLE" if kind in ("DOUBLE", "FLOAT") else f"{name}::VARCHAR"

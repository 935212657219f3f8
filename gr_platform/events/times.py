"""Times of any unit become int64 milliseconds UTC, without a float for a time that is an integer.

Invariant: a unit is accepted only if it puts most of a log's times between 1990 and tomorrow, so a wrong unit is an
error at import and not a model trained on 1970.
"""

from dataclasses import dataclass
from pathlib import Path

from gr_platform.errors import UserError
from gr_platform.events.database import literal
from gr_platform.events.declaration import TIME_UNITS

EARLIEST_MS = 631_152_000_000  # 1990-01-01
DAY_MS = 86_400_000
NUMERIC_UNITS = ("s", "ms", "us", "ns")
_INTEGER = "'^[+-]?[0-9]{1,18}$'"


def carries_zone(duckdb_type: str) -> bool:
    """Return whether a timestamp type carries its zone."""
    return "WITH TIME ZONE" in duckdb_type or duckdb_type.startswith("TIMESTAMPTZ")


def to_ms(column: str, duckdb_type: str, unit: str, zone: str = "UTC") -> str:
    """Return SQL that turns a landed time column into BIGINT ms UTC, NULL where it cannot be read.

    duckdb_type: BIGINT, DOUBLE, VARCHAR, TIMESTAMP or TIMESTAMPTZ (what landing writes). zone: of times without one.
    """
    if carries_zone(duckdb_type):
        return f"epoch_ms({column})"
    if duckdb_type.startswith("TIMESTAMP"):
        return _zoned(column, zone)
    if unit == "iso":
        has_zone = f"regexp_matches({column}, '(Z|UTC|[+-][0-9]{{2}}(:?[0-9]{{2}})?)$') AND contains({column}, ':')"
        return (
            f"CASE WHEN {has_zone} THEN epoch_ms(TRY_CAST({column} AS TIMESTAMPTZ)) "
            f"ELSE {_zoned(f'TRY_CAST({column} AS TIMESTAMP)', zone)} END"
        )
    if duckdb_type == "BIGINT":
        return _scaled(column, unit)
    from_float = {"s": "* 1000", "ms": "* 1", "us": "/ 1000", "ns": "/ 1000000"}[unit]
    rounded = f"TRY_CAST(floor(TRY_CAST({column} AS DOUBLE) {from_float} + 0.0005) AS BIGINT)"
    if duckdb_type == "DOUBLE":
        return rounded
    exact = _scaled(f"TRY_CAST({column} AS BIGINT)", unit)
    return f"CASE WHEN regexp_matches({column}, {_INTEGER}) THEN {exact} ELSE {rounded} END"


def _zoned(timestamp: str, zone: str) -> str:
    # Near the ends of the type's range the conversion itself fails, and with it the whole query.
    inside = f"{timestamp} BETWEEN TIMESTAMP '0001-01-01' AND TIMESTAMP '9999-12-31'"
    return f"CASE WHEN {inside} THEN epoch_ms(timezone({literal(zone)}, {timestamp})) END"


def _scaled(integer: str, unit: str) -> str:
    if unit == "s":
        return f"TRY_CAST({integer}::HUGEINT * 1000 AS BIGINT)"
    divisor = {"ms": 1, "us": 1_000, "ns": 1_000_000}[unit]
    return f"{integer} // {divisor}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeFigures:
    """What a time column holds: rows with a cell, with a number, with a date; lowest and highest number (None: none).

    fitting: unit -> rows that it puts between 1990 and tomorrow; iso for dates.
    """

    present: int
    numbers: int
    dates: int
    low: float | None
    high: float | None
    fitting: dict[str, int]


def plausible_sql(number: str, unit: str, now_ms: int) -> str:
    """Return SQL for whether a number of that unit is a time between 1990 and tomorrow; iso: a number of ms."""
    low, high = (_from_ms(ms, unit) for ms in (EARLIEST_MS, now_ms + DAY_MS))
    return f"{number} BETWEEN {low} AND {high}"


def choose_unit(path: Path, column: str, found: TimeFigures, wanted: str) -> str:
    """Return the unit of a log's times: the one that puts most of them between 1990 and tomorrow.

    Raises UserError if nothing is readable, or the wanted (or any) unit does not.
    """
    if wanted not in TIME_UNITS:
        raise UserError(f"unknown time unit {wanted!r}; the units are {', '.join(TIME_UNITS)}")
    numeric = found.numbers > 0 and 2 * found.numbers >= found.present
    if not numeric and not found.dates:
        raise UserError(
            f"time column {column!r} of {path.name} holds no readable time; it needs numbers (s, ms, us, ns) or dates "
            "such as 2026-01-31T12:00:00Z"
        )
    if not numeric:
        if wanted not in ("auto", "iso"):
            raise UserError(f"time column {column!r} of {path.name} holds dates, not numbers of {wanted}; use iso")
        if 2 * found.fitting["iso"] < found.dates:
            raise UserError(
                f"most times of column {column!r} of {path.name} are not between 1990 and tomorrow; mend it or name "
                "another --time-column"
            )
        return "iso"
    fitting = next((unit for unit in NUMERIC_UNITS if 2 * found.fitting[unit] >= found.numbers), None)
    if fitting and wanted in ("auto", fitting):
        return fitting
    remedy = f"unit {fitting} would fit: use --time-unit {fitting}" if fitting else "no unit fits: name another column"
    tried = "no unit puts" if wanted == "auto" else f"unit {wanted} does not put"
    raise UserError(
        f"{tried} most times of column {column!r} of {path.name} ({found.low:.0f} to {found.high:.0f}) between 1990 "
        f"and tomorrow; {remedy}"
    )


def _from_ms(ms: int, unit: str) -> int:
    return {"s": ms // 1_000, "ms": ms, "us": ms * 1_000, "ns": ms * 1_000_000, "iso": ms}[unit]

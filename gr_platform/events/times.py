"""Times of any unit become int64 milliseconds UTC, without a float for a time that is an integer.

Invariant: a unit is accepted only if it puts the log's median between 1990 and tomorrow, so a wrong unit is an error at
import and not a model trained on 1970.
"""

from pathlib import Path

from gr_platform.errors import UserError
from gr_platform.events.database import literal

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
        return f"epoch_ms(timezone({literal(zone)}, {column}))"
    if unit == "iso":
        has_zone = f"regexp_matches({column}, '(Z|UTC|[+-][0-9]{{2}}(:?[0-9]{{2}})?)$') AND contains({column}, ':')"
        return (
            f"CASE WHEN {has_zone} THEN epoch_ms(TRY_CAST({column} AS TIMESTAMPTZ)) "
            f"ELSE epoch_ms(timezone({literal(zone)}, TRY_CAST({column} AS TIMESTAMP))) END"
        )
    if duckdb_type == "BIGINT":
        return _scaled(column, unit)
    from_float = {"s": "* 1000", "ms": "* 1", "us": "/ 1000", "ns": "/ 1000000"}[unit]
    rounded = f"TRY_CAST(floor(TRY_CAST({column} AS DOUBLE) {from_float} + 0.0005) AS BIGINT)"
    if duckdb_type == "DOUBLE":
        return rounded
    exact = _scaled(f"TRY_CAST({column} AS BIGINT)", unit)
    return f"CASE WHEN regexp_matches({column}, {_INTEGER}) THEN {exact} ELSE {rounded} END"


def _scaled(integer: str, unit: str) -> str:
    if unit == "s":
        return f"TRY_CAST({integer}::HUGEINT * 1000 AS BIGINT)"
    divisor = {"ms": 1, "us": 1_000, "ns": 1_000_000}[unit]
    return f"{integer} // {divisor}"


def choose_unit(
    path: Path, column: str, median: float | None, iso_median: float | None, wanted: str, now_ms: int
) -> str:
    """Return the unit of a log's times.

    median: of the values that are numbers, raw; iso_median: of those that are dates, ms; None where there are none.
    Raises UserError if nothing is readable, or the wanted (or any) unit puts the median outside 1990..tomorrow.
    """
    if wanted not in ("auto", "iso", *NUMERIC_UNITS):
        raise UserError(f"unknown time unit {wanted!r}; the units are auto, {', '.join(NUMERIC_UNITS)} and iso")
    if median is None and iso_median is None:
        raise UserError(
            f"time column {column!r} of {path.name} holds no readable time; it needs numbers (s, ms, us, ns) or dates "
            "such as 2026-01-31T12:00:00Z"
        )
    if median is None:
        if wanted not in ("auto", "iso"):
            raise UserError(f"time column {column!r} of {path.name} holds dates, not numbers of {wanted}; use iso")
        if not _plausible(iso_median or 0.0, now_ms):
            raise UserError(
                f"the median of time column {column!r} of {path.name} is not between 1990 and tomorrow; mend it or "
                "name another --time-column"
            )
        return "iso"
    fitting = next((unit for unit in NUMERIC_UNITS if _plausible(_in_ms(median, unit), now_ms)), None)
    if wanted == "auto" and fitting:
        return fitting
    if wanted == fitting and fitting:
        return fitting
    remedy = f"unit {fitting} would fit: use --time-unit {fitting}" if fitting else "no unit fits: name another column"
    tried = "no unit puts" if wanted == "auto" else f"unit {wanted} does not put"
    raise UserError(
        f"{tried} the median of time column {column!r} of {path.name} ({median:.0f}) between 1990 and tomorrow; "
        f"{remedy}"
    )


def _in_ms(value: float, unit: str) -> float:
    return value * {"s": 1e3, "ms": 1.0, "us": 1e-3, "ns": 1e-6}[unit]


def _plausible(median_ms: float, now_ms: int) -> bool:
    return EARLIEST_MS <= median_ms <= now_ms + DAY_MS

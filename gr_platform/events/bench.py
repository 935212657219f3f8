"""`gr bench ingest`: every stage from a landed log to sequences, and the bare sort that bounds what any could do.

Invariant: every stage runs in a process of its own, so its peak RSS is its own; all run one after the other on the same
simulated rows in one folder, which is deleted at the end.
"""
# ruff: noqa: S608 - strings are quoted by `literal`

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from gr_platform import settings
from gr_platform.errors import UserError
from gr_platform.processes import peak_rss_bytes

NUM_EVENTS = 10_000_000
DAY_EVENTS = 1_000_000
LARGE_EVENTS = 30_000_000
LATE_SHARE = 0.01
LATE_MS = 2 * 24 * 3600 * 1000
# The log, its landed copy, clean events, spilled sort, sequences and their base again.
DISK_BYTES_PER_EVENT = 200
DATASET = "bench"
Row = dict[str, Any]


def run(_: int, num_events: int = NUM_EVENTS) -> list[Row]:
    """Return time and peak RSS of each stage on `num_events` simulated events, and of a day more on top of them.

    The day holds 1 M events, a tenth for small logs; 1 % of them come in up to two days late. Raises UserError if the
    disk is too small.
    """
    home = settings.home()
    home.mkdir(parents=True, exist_ok=True)
    needed, free = num_events * DISK_BYTES_PER_EVENT, shutil.disk_usage(home).free
    if needed > free:
        raise UserError(f"{num_events:,} events need {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free")
    with tempfile.TemporaryDirectory(dir=home, prefix=".bench-") as name:
        folder = Path(name)
        rows = [_timed("simulate", folder, num_events)]
        day = min(DAY_EVENTS, num_events // 10)
        _divide(folder, day)
        base = num_events - day
        names = ("bare_sort", "import_log", "ingest", "vocabulary", "sequences")
        rows += [_timed(stage, folder, base) for stage in names]
        _run_stage("import_day", folder)
        rows += [_timed(stage, folder, day, label=f"day: {stage}") for stage in ("ingest", "vocabulary", "sequences")]
    return _compared(rows, num_events) + [row for stage in rows for row in _shown(stage, num_events)]


def _compared(rows: list[Row], num_events: int) -> list[Row]:
    seconds = {row["stage"]: row["seconds"] for row in rows}
    clean = seconds["ingest"] + seconds["vocabulary"]
    day = sum(seconds[f"day: {stage}"] for stage in ("ingest", "vocabulary", "sequences"))
    bare = {"unit": "x", "against": "bare DuckDB sort, same rows", "at_most": True, "num_events": num_events}
    path = [row for row in rows if row["stage"] in ("import_log", "ingest", "vocabulary", "sequences")]
    clean_ratio = clean / seconds["bare_sort"]
    # What does not grow with the log outweighs the sort of a small one.
    clean_target = 3.0 if num_events >= LARGE_EVENTS else None
    return [
        bare | {"name": "clean events and vocabulary / bare sort", "value": clean_ratio, "target": clean_target},
        bare
        | {
            "name": "with import and sequences / bare sort",
            "value": (clean + seconds["import_log"] + seconds["sequences"]) / seconds["bare_sort"],
            "target": None,
        },
        {
            "name": "a day more / full rebuild",
            "value": 100 * day / (clean + seconds["sequences"]),
            "unit": "%",
            "against": "ingest, vocabulary and sequences of all",
            "target": 15.0 if num_events >= 50 * DAY_EVENTS else None,
            "at_most": True,
            "num_events": num_events,
        },
        {
            "name": "peak RSS of the whole path",
            "value": max(row["rss_gb"] for row in path),
            "unit": "GB",
            "against": None,
            "target": 2.0,
            "at_most": True,
            "num_events": num_events,
        },
    ]


def _shown(row: Row, num_events: int) -> list[Row]:
    plain = {"against": None, "target": None, "num_events": num_events}
    rate = row["events"] / row["seconds"] / 1e6
    shown = [
        plain | {"name": f"{row['stage']}, time", "value": row["seconds"], "unit": "s"},
        plain | {"name": f"{row['stage']}, rate", "value": rate, "unit": "M events/s"},
        plain | {"name": f"{row['stage']}, peak RSS", "value": row["rss_gb"], "unit": "GB"},
    ]
    if row["stage"] == "ingest":
        shown.append(plain | {"name": "ingest, most disk while it ran", "value": row["disk_gb"], "unit": "GB"})
    return shown


def _timed(stage: str, folder: Path, events: int, *, label: str | None = None) -> Row:
    """Run a stage in a process of its own; return its seconds, peak RSS and the most disk it took beyond what was
    there."""
    with _watched(folder) as most:
        found = _run_stage(stage, folder, events)
    return found | {"stage": label or stage, "events": events, "disk_gb": max(0, most[1] - most[0]) / 1e9}


def _run_stage(stage: str, folder: Path, events: int = 0) -> Row:
    code = "import sys; from gr_platform.events.bench import stage; stage(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
    command = [sys.executable, "-c", code, stage, str(folder), str(events)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"stage {stage} of the benchmark ended with status {done.returncode}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def _watched(folder: Path) -> Iterator[list[int]]:
    """Yield [bytes of a folder at the start, most bytes since], looked at four times a second."""
    most = [_bytes_of(folder)] * 2
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.25):
            most[1] = max(most[1], _bytes_of(folder))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        ended.set()
        watcher.join()


def _bytes_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _divide(folder: Path, day: int) -> None:
    """Write the newest `day` events, some of them from the two days before, to day.parquet, all others to log/."""
    from gr_platform.events.database import connect, literal, parquet_of

    parts = sorted((folder / "simulated").glob("part-?????.parquet"))
    log = folder / "log"
    log.mkdir()
    for part in parts[:-1]:
        part.rename(log / part.name)
    with connect(folder) as connection:
        last = parquet_of(parts[-1:])

        def value(sql: str) -> int:
            return int(connection.sql(sql).fetchall()[0][0])

        cut = value(f"SELECT min(event_ts) FROM (SELECT event_ts FROM {last} ORDER BY event_ts DESC LIMIT {day})")
        near = f"event_ts >= {cut - LATE_MS} AND event_ts < {cut}"
        every = max(1, int(value(f"SELECT count(*) FROM {last} WHERE {near}") / (LATE_SHARE * day)))
        goes = f"event_ts >= {cut} OR ({near} AND file_row_number % {every} = 0)"
        rows = f"(SELECT * FROM read_parquet({literal(str(parts[-1]))}, file_row_number=true))"
        for path, chosen in ((folder / "day.parquet", goes), (log / parts[-1].name, f"NOT ({goes})")):
            connection.execute(
                f"COPY (SELECT user_id, item_id, action, event_ts FROM {rows} WHERE {chosen}) "
                f"TO {literal(str(path))} (FORMAT parquet, COMPRESSION zstd)"
            )
    parts[-1].unlink()


def _simulate(folder: Path, events: int) -> None:
    from gr_platform.events.simulator import simulate

    (folder / "simulated").mkdir()
    simulate(folder / "simulated", num_events=events)


def _bare_sort(folder: Path, _: int) -> None:
    from gr_platform.events.database import connect, literal, parquet_of

    out = folder / "bare.parquet"
    with connect(folder) as connection:
        connection.execute(
            f"COPY (SELECT * FROM {parquet_of(sorted((folder / 'log').iterdir()))} ORDER BY user_id, event_ts) "
            f"TO {literal(str(out))} (FORMAT parquet, COMPRESSION zstd)"
        )
    out.unlink()


def _import(folder: Path, files: list[Path], date: str) -> None:
    from gr_platform.events.landing import import_file

    for file in files:
        import_file(file, home=folder / "home", dataset=DATASET, ingest_date=date)


def _import_log(folder: Path, _: int) -> None:
    _import(folder, sorted((folder / "log").iterdir()), "2026-01-01")


def _import_day(folder: Path, _: int) -> None:
    _import(folder, [folder / "day.parquet"], "2026-01-02")


def _ingest(folder: Path, _: int) -> None:
    from gr_platform.events.ingest import ingest

    ingest(folder / "home", DATASET)


def _vocabulary(folder: Path, _: int) -> None:
    from gr_platform.sequences.vocabulary import build_vocabulary

    build_vocabulary(folder / "home", DATASET)


def _sequences(folder: Path, _: int) -> None:
    from gr_platform.sequences.sequentialize import sequentialize

    sequentialize(folder / "home", DATASET)


STAGES: dict[str, Callable[[Path, int], None]] = {
    "simulate": _simulate,
    "bare_sort": _bare_sort,
    "import_log": _import_log,
    "import_day": _import_day,
    "ingest": _ingest,
    "vocabulary": _vocabulary,
    "sequences": _sequences,
}


def stage(name: str, folder: str, events: int) -> None:
    """Run one stage in this process and print its seconds (after imports) and peak RSS as JSON."""
    from gr_platform.events.database import connect

    for heavy in ("events.landing", "events.ingest", "events.simulator", "sequences.sequentialize"):
        import_module(f"gr_platform.{heavy}")
    with connect(Path(folder)) as connection:  # DuckDB and pyarrow load parts of themselves (pandas) at first use
        connection.sql("SELECT 1 AS one").to_arrow_reader(1).read_all()["one"].to_numpy()
        connection.sql("SELECT 1 AS one").fetchall()
    started = time.monotonic()
    STAGES[name](Path(folder), events)
    seconds = time.monotonic() - started
    print(json.dumps({"seconds": seconds, "rss_gb": peak_rss_bytes() / 1e9}))

"""`gr bench lifecycle`: a week on a platform of its own, and what its operator waits for there.

Invariant: everything is measured on the state folder that the replay left, with the programs that a person runs;
nothing of the user's is read, and the folder is deleted at the end.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gr_platform import settings
from gr_platform.commands import browser, services
from gr_platform.errors import UserError
from gr_platform.lifecycle import judgement, release
from gr_platform.registry import promotion, versions
from gr_platform.replay import replay as replaying
from gr_platform.replay import report
from gr_platform.replay.stream import StreamOptions

if TYPE_CHECKING:
    from gr_platform.replay.stream import Day

PROMOTION_S, ROLLBACK_S, LOAD_S, LINEAGE_S = 15.0, 10.0, 5.0, 3.0
NUM_EVENTS = StreamOptions().num_events
REPEATS = 3
PAGE_MS = 120_000.0
ASSETS = (
    *("landed_day", "events", "item_vocabulary", "sequences", "data_card"),
    *("retrieval_model", "ranking_model", "evaluation", "comparison"),
    *("registration", "bundle", "judgement", "deployment", "served"),
)
# What must not be loaded with the code location: the UI and the daemon would wait for it.
HEAVY = ("torch", "mlflow")
Row = dict[str, Any]


def run(_: int, days: int = replaying.TARGET_DAYS, num_events: int = NUM_EVENTS) -> list[Row]:
    """Return how long a replay takes, and on its state folder a promotion, a rollback, the code and the lineage page.

    Its middle day is poisoned, as that of `gr replay`. Raises UserError as the replay does, or if a command fails.
    """
    home = settings.home()
    home.mkdir(parents=True, exist_ok=True)
    stream = StreamOptions(days=days, num_events=num_events, faults={(days + 1) // 2: "poisoned"})
    with tempfile.TemporaryDirectory(dir=home, prefix=".bench-") as name:
        folder = Path(name) / "replay"
        facts = _replay(folder, replaying.ReplayOptions(stream=stream, command="gr bench lifecycle"))
        return [*_of_replay(facts, num_events), *_of_releases(folder / "home", facts), *_of_pages(folder / "home")]


def _replay(folder: Path, options: replaying.ReplayOptions) -> dict[str, Any]:
    """Return the facts of a replay, with its days on a bar."""
    from tqdm import tqdm

    with tqdm(
        desc="replay", unit="day", total=options.stream.days, disable=not sys.stderr.isatty(), leave=False
    ) as bar:

        def begun(day: "Day | None") -> None:
            bar.update((day.number if day else 1) - 1 - bar.n)

        listener = replaying.Listener(day=begun, stage=lambda _: None, said=lambda _: None)
        replaying.replay(folder, options, listener)
    return dict(json.loads((folder / report.FACTS).read_text(encoding="utf-8")))


def _of_replay(facts: dict[str, Any], num_events: int) -> list[Row]:
    total, stale = facts["load"]["total"], facts["staleness"]["num_stale"]
    days = [day["outcome"] for day in facts["days"]]
    usual = len(days) == replaying.TARGET_DAYS and num_events == NUM_EVENTS
    stream = "the default stream" if usual else f"{num_events:,} events"
    told = ", ".join(f"{days.count(outcome)} {outcome}" for outcome in dict.fromkeys(days))
    return [
        _row(f"replay of {len(days)} days of {stream}", facts["seconds"], told, replaying.TARGET_SECONDS, has=usual),
        _row(
            "failed and stale answers meanwhile",
            total["requests"] - total["answered"] + stale,
            f"{total['requests']:,} requests, {facts['staleness']['num_probes']:,} of them probes",
            0.0,
            unit="",
        ),
    ]


def _of_releases(home: Path, facts: dict[str, Any]) -> list[Row]:
    """Return what a rollback and a promotion take with the server running: what was taken back is promoted again."""
    from serving.server import EmbeddedServer

    ds = facts["dataset"]
    taken_back = promotion.champions(home, ds)
    deployed = [day["deploy_s"] for day in facts["days"] if day["deploy_s"] is not None]
    if not promotion.previous(home, ds):
        why = "no model of the replay was promoted, so there is nothing to go back to"
        return [_missed(name, why) for name in ("promotion to serving", "rollback")]
    with EmbeddedServer(home):
        back = _timed(lambda: _gr(home, "rollback", "--dataset", ds))
        for version in taken_back.values():
            versions.move_alias(home, version, versions.CHALLENGER)
        # Judging is a stage of its own, as in a run of the job: serving begins when it has been done.
        judgement.judge(home, ds, promotion.contest(home, ds))
        deployed.append(_timed(lambda: _promote(home, ds)))
    return [
        _row("promotion to serving", max(deployed), f"the slowest of {len(deployed)}", PROMOTION_S),
        _row("rollback", back, "gr rollback, the whole command", ROLLBACK_S),
    ]


def _promote(home: Path, ds: str) -> None:
    # By force: it was taken back, which closes a gate.
    done = release.release(home, ds, force=True)
    if done.outcome != "promoted" or not done.server_loaded:
        raise UserError(f"the model that was taken back cannot be promoted again: {done.sentence}")


def _gr(home: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "gr_platform.cli", *arguments]
    done = subprocess.run(command, env=os.environ | {"GR_HOME": str(home)}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"gr {' '.join(arguments)} failed in the benchmark: {(done.stderr or done.stdout).strip()}")


def _of_pages(home: Path) -> list[Row]:
    return [_code_location(home), _lineage(home)]


def _code_location(home: Path) -> Row:
    code = f"import sys, gr_platform.definitions; print(*({set(HEAVY)!r} & set(sys.modules)))"

    def load() -> str:
        environment = os.environ | {"GR_HOME": str(home)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    if heavy := load():
        return _missed("code location load", f"it imports {heavy}")
    median = statistics.median(_timed(load) for _ in range(REPEATS))
    return _row("code location load", median, f"a fresh process, median of {REPEATS}", LOAD_S)


def _lineage(home: Path) -> Row:
    """Return how long the graph takes to be on the page of a running webserver, from the address to its last node."""
    name = "lineage page"
    if why := browser.missing():
        return _row(name, None, f"not measured: {why}", LINEAGE_S)
    with _webserver(home) as address, browser.browser_page() as page:

        def look() -> None:
            page.goto(browser.lineage_url(address))
            for asset in ASSETS:
                page.get_by_text(asset, exact=True).first.wait_for(timeout=PAGE_MS)

        look()
        median = statistics.median(_timed(look) for _ in range(REPEATS))
    return _row(name, median, f"headless Chromium, median of {REPEATS} after one", LINEAGE_S)


@contextmanager
def _webserver(home: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind((services.HOST, 0))
        ports = services.Ports(dagster=probe.getsockname()[1])
    wanted = services.platform_services(home, home / "dagster_home", ports)
    try:
        (running,) = services.up(home, [each for each in wanted if each.name == "dagster-webserver"])
        yield running.address
    finally:
        services.down(home)


def _timed(call: Callable[[], Any]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def _row(name: str, value: float | None, against: str, target: float, *, unit: str = "s", has: bool = True) -> Row:
    bound = target if has else None
    return {"name": name, "value": value, "unit": unit, "against": against, "target": bound, "at_most": True}


def _missed(name: str, why: str) -> Row:
    return {"name": name, "value": None, "unit": "s", "against": why, "target": None, "ok": False}

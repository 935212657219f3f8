"""An open-loop load on the model server for as long as a replay takes, sent by a process of its own.

Invariant: the process sends by its schedule, whatever the server does, and ends when whoever started it does: its
orders come through a pipe, one line a day, and the end of the pipe is the end of the load.
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gr_platform import settings, storage
from gr_platform.errors import UserError
from gr_platform.replay.stream import Stream
from gr_platform.replay.visitors import Lived, StreamVisitors, Window, read
from serving.bench.generator import Generator, Phase, Plan
from serving.bench.traffic import Visit
from serving.client_asyncio import Answer, AsyncClient

RATE = 5.0
DEADLINE_S = 5.0
PROBE_SHARE = 0.25
# Longer than any replay: it is ended, it does not run out.
LONGEST_S = 6 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A pair that serves: the folders of its bundles. label: what a person calls it."""

    retrieval: Path
    ranking: Path
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swapped:
    """A deployment of `served` from `began` to `ended`, seconds of the system's monotonic clock."""

    served: Served
    began: float
    ended: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a load came to. records: RECORD [n] of the generator; notes: fields of its answers, with their `row`.

    probes: by their numbers. days: when each day began, by the monotonic clock, the first at the start of the load.
    """

    records: np.ndarray
    notes: list[dict[str, Any]]
    probes: list[Lived]
    first: Served
    days: list[tuple[int, float]]
    swaps: list[Swapped]


class StreamLoad:
    """The load of a stream's visitors on a running server: a context manager; it ends with its context."""

    def __init__(
        self,
        folder: Path,
        stream: Stream,
        served: Served,
        *,
        grpc_address: str,
        rate: float = RATE,
        deadline_s: float = DEADLINE_S,
        seed: int = 0,
    ) -> None:
        """folder: for its files, made if it is not there; served: what serves as it begins."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._results = folder, folder / "results"
        plan = Plan(
            grpc_address=grpc_address,
            phases=(Phase(seconds=LONGEST_S, rate=rate),),
            deadline_s=deadline_s,
            seed=seed,
        )
        self._visitors = {
            "paths": [str(stream.history), *(str(day.true_path) for day in stream.days)],
            "edges": [stream.days[0].begin, *(day.end for day in stream.days)],
            "windows": {kind: asdict(_window(getattr(served, kind))) for kind in ("retrieval", "ranking")},
            "actions": _actions(served.ranking),
            "seed": seed,
        }
        storage.write_text(folder / "plan.json", plan.to_json())
        storage.write_text(folder / "visitors.json", json.dumps(self._visitors) + "\n")
        self._first, self._days, self._swaps = served, list[tuple[int, float]](), list[Swapped]()

    def __enter__(self) -> "StreamLoad":
        """Start it; return when requests are being sent. Raises UserError if it does not start."""
        command = [sys.executable, "-m", "gr_platform.replay.load", str(self._folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=settings.PROJECT_ROOT, text=True
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            self.__exit__()
            self._fail()
        self._days.append((1, time.monotonic()))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def live(self, day: int) -> None:
        """Let the visitors live through day number `day` from now on. Raises UserError if the load has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{day}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        self._days.append((day, time.monotonic()))

    @contextmanager
    def swap(self, served: Served) -> Iterator[None]:
        """Note that the block deploys a pair; one that raises has deployed nothing."""
        began = time.monotonic()
        yield
        self.swapped(served, began, time.monotonic())

    def swapped(self, served: Served, began: float, ended: float) -> None:
        """Note that a pair was deployed from `began` to `ended`, seconds of time.monotonic()."""
        self._swaps.append(Swapped(served=served, began=began, ended=ended))

    def end(self) -> Told:
        """Send no more, wait for what was sent, and return what came of it. Raises UserError if the load has failed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait():
            self._fail()
        records = np.load(self._results.with_suffix(".npy"), allow_pickle=False)
        notes = json.loads(self._results.with_suffix(".json").read_text(encoding="utf-8"))
        probes = visitors(self._visitors).probes
        return Told(records=records, notes=notes, probes=probes, first=self._first, days=self._days, swaps=self._swaps)

    def _fail(self) -> None:
        raise UserError("the load on the model server ended with an error, which is printed above; replay again")


def visitors(fields: dict[str, Any]) -> StreamVisitors:
    """Return the visitors that a StreamLoad described."""
    return StreamVisitors(
        read([Path(path) for path in fields["paths"]], fields["actions"]),
        fields["edges"],
        {kind: Window(**window) for kind, window in fields["windows"].items()},
        probe_share=PROBE_SHARE,
        seed=fields["seed"],
    )


def noted(row: int, visit: Lived, answer: Answer) -> dict[str, Any]:
    """Return what is kept of an answer beside its record: whether the list held what came next; all of a probe's."""
    found: dict[str, Any] = {"row": row, "day": visit.day, "probe": visit.probe}
    if visit.probe >= 0:
        return found | {"items": answer.items.tolist(), "scores": np.atleast_1d(answer.scores).tolist()}
    if visit.kind == "recommend":
        found["hit"] = visit.target in answer.items.tolist()
    return found


def _window(bundle: Path) -> Window:
    config = storage.read_manifest(bundle).facts["config"]
    return Window(max_events=config["max_events"], chunk=config["chunk"])


def _actions(bundle: Path) -> Sequence[str]:
    actions: Sequence[str] = storage.read_manifest(bundle).facts["declaration"]["actions"]
    return actions


async def _obey(live: Callable[[int], None], stop: Callable[[], None]) -> None:
    """Do what comes through standard input, until it ends."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        live(int(line))
    stop()


async def _main(folder: Path) -> None:
    plan = Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
    people = visitors(json.loads((folder / "visitors.json").read_text(encoding="utf-8")))
    notes: list[dict[str, Any]] = []

    def heard(row: int, visit: Visit, answer: Answer) -> None:
        assert isinstance(visit, Lived)
        notes.append(noted(row, visit, answer))

    async with AsyncClient(plan.grpc_address, deadline_s=plan.deadline_s, max_attempts=1) as client:
        # The first call would else also ask what is served.
        await client.metadata()
        generator = Generator(plan, client, visitors=people, heard=heard)
        orders = asyncio.create_task(_obey(people.live, generator.stop))
        records, _ = await generator.run(lambda: print("sending", flush=True))
        orders.cancel()
    np.save(folder / "results.npy", records, allow_pickle=False)
    storage.write_text(folder / "results.json", json.dumps(notes) + "\n")


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))

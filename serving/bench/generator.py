"""Sends made-up visits to a model server from a process of its own: python -m serving.bench.generator PLAN RESULTS

Invariant: an open phase sends by its schedule, whatever the server does, and every latency counts from the scheduled
arrival, so a slow answer delays no other request and hides no wait.
"""

import asyncio
import json
import signal
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from gr_platform import storage
from serving.bench.traffic import Population, Traffic, Visit, Visitors, arrivals
from serving.client import History, ServingError
from serving.client_asyncio import Answer, AsyncClient

OK, REJECTED, EXPIRED, FAILED = range(4)
KINDS = ("score", "recommend", "probe", "retrieve")
PROBE_SCORES = 64
# The server brings its counters up to date only so often.
COUNTERS_LATE_S = 0.75
# Times are of the system's monotonic clock, which all processes share. scores: of probes, flat, NaN beyond.
RECORD = np.dtype(
    [
        ("phase", np.int16),
        ("kind", np.int8),
        ("outcome", np.int8),
        ("scheduled", np.float64),
        ("sent", np.float64),
        ("done", np.float64),
        ("num_candidates", np.int32),
        ("cached", np.int32),
        ("cacheable", np.int32),
        ("probe", np.int16),
        ("scores", np.float32, (PROBE_SCORES,)),
    ]
)

_OUTCOME = (RECORD.names or ()).index("outcome")
# A caller who was refused does not ask again at once.
REFUSED_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Traffic for `seconds`: from `callers` who each wait for their answer, or, with callers 0, by a schedule.

    A schedule offers `rate` requests a second, or, with rate 0, `share` of the answers a second that the last phase of
    callers got.
    """

    seconds: float
    callers: int = 0
    rate: float = 0.0
    share: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to send where; `probes` (of `probe`) are asked again and again as `probe_share` of the visits.

    traffic: None where the generator is given its visitors. server_pid: 0 where the server's own figures are not asked.
    """

    grpc_address: str
    phases: tuple[Phase, ...]
    metrics_address: str = ""
    server_pid: int = 0
    traffic: Traffic | None = None
    deadline_s: float = 2.0
    probes: tuple[dict[str, Any], ...] = ()
    probe_share: float = 0.0
    seed: int = 0

    def to_json(self) -> str:
        """Return the text of a plan file."""
        return json.dumps(asdict(self)) + "\n"

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Return the plan that `to_json` wrote."""
        fields = json.loads(text)
        if fields["traffic"] is not None:
            made_up: dict[str, Any] = fields["traffic"]
            lists = {name: tuple(value) for name, value in made_up.items() if isinstance(value, list)}
            fields["traffic"] = Traffic(**(made_up | lists))
        phases = tuple(Phase(**phase) for phase in fields.pop("phases"))
        return Plan(phases=phases, probes=tuple(fields.pop("probes")), **fields)


class Generator:
    """Runs the phases of one plan over one connection."""

    def __init__(
        self,
        plan: Plan,
        client: AsyncClient,
        *,
        visitors: Visitors | None = None,
        heard: Callable[[int, Visit, Answer], None] | None = None,
    ) -> None:
        """visitors: by default those of the plan's traffic, drawn here, before any clock runs. heard: is given the
        number of a request, its visit and its answer."""
        if visitors is None:
            if plan.traffic is None:
                raise ValueError("Plan.traffic is None, must be given where there are no visitors")
            visitors = Population(plan.traffic)
        self._plan, self._client, self._visitors, self._heard = plan, client, visitors, heard
        self._rng = np.random.default_rng(plan.seed)
        self._probes = [_visit(fields) for fields in plan.probes]
        self._records: list[tuple] = []
        self._stopped = asyncio.Event()
        self._saturation = 0.0

    def stop(self) -> None:
        """Let the phase that runs be the last one, and let it end now."""
        self._stopped.set()

    async def run(self, started: Callable[[], None]) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Return all requests as RECORD [n] and, for each phase, what was offered and what it cost."""
        reports = []
        for number, phase in enumerate(self._plan.phases):
            if self._stopped.is_set():
                break
            before = await self._usage()
            started()
            began, count = time.monotonic(), len(self._records)
            if phase.callers:
                await self._closed(number, phase)
                answered = sum(record[_OUTCOME] == OK for record in self._records[count:])
                self._saturation = answered / (time.monotonic() - began)
            rate = self._saturation if phase.callers else phase.rate or phase.share * self._saturation
            if not phase.callers:
                await self._open(number, phase, rate)
            spent = time.monotonic() - began
            after = await self._usage()
            used = {name: value - before.get(name, 0.0) for name, value in after.items()}
            reports.append(asdict(phase) | {"rate": rate, "spent_s": spent} | used)
        return np.array(self._records, RECORD), reports

    async def _open(self, number: int, phase: Phase, rate: float) -> None:
        began = time.monotonic()
        asked = []
        for at in began + arrivals(rate, phase.seconds, self._plan.seed + number):
            visit, probe = self._next()
            try:
                # The pause between two arrivals, unless somebody ends the phase first.
                await asyncio.wait_for(self._stopped.wait(), max(0.0, at - time.monotonic()))
                break
            except TimeoutError:
                asked.append(asyncio.create_task(self._ask(number, visit, probe, at)))
        await asyncio.gather(*asked)

    async def _closed(self, number: int, phase: Phase) -> None:
        until = time.monotonic() + phase.seconds

        async def caller() -> None:
            while (now := time.monotonic()) < until and not self._stopped.is_set():
                visit, probe = self._next()
                # The same again: a mix that lacks what is refused would be another one.
                while await self._ask(number, visit, probe, now) == REJECTED and time.monotonic() < until:
                    await asyncio.sleep(REFUSED_PAUSE_S)

        await asyncio.gather(*(caller() for _ in range(phase.callers)))

    async def _usage(self) -> dict[str, float]:
        """Return the seconds of CPU used so far, and the server's cache counters."""
        if not self._plan.server_pid:
            return {"generator_cpu_s": time.process_time()}
        used = {"server_cpu_s": server_cpu_s(self._plan.server_pid), "generator_cpu_s": time.process_time()}
        await asyncio.sleep(COUNTERS_LATE_S)
        return used | await asyncio.to_thread(cache_counters, self._plan.metrics_address)

    def _next(self) -> tuple[Visit, int]:
        """Return the next visit and the number of its probe, or -1."""
        if self._probes and self._rng.random() < self._plan.probe_share:
            probe = int(self._rng.integers(len(self._probes)))
            return self._probes[probe], probe
        return self._visitors.visit(), -1

    async def _ask(self, number: int, visit: Visit, probe: int, scheduled: float) -> int:
        """Send one request, record it, and return how it ended."""
        sent = time.monotonic()
        scores = np.full(PROBE_SCORES, np.nan, np.float32)
        cached, outcome = 0, OK
        try:
            answer = await self._answer(visit)
            cached = answer.cached_tokens
            if self._heard is not None:
                self._heard(len(self._records), visit, answer)
            if probe >= 0:
                told = answer.scores.ravel()[:PROBE_SCORES]
                scores[: len(told)] = told
        except ServingError as error:
            outcome = {"UNAVAILABLE": REJECTED, "DEADLINE_EXCEEDED": EXPIRED}.get(error.code, FAILED)
        done, kind, size = time.monotonic(), KINDS.index(visit.kind), len(visit.candidates)
        self._records.append(
            (number, kind, outcome, scheduled, sent, done, size, cached, visit.cacheable, probe, scores)
        )
        return outcome

    async def _answer(self, visit: Visit) -> Answer:
        history, at = visit.history, visit.request_time
        if visit.kind == "recommend":
            return await self._client.recommend(history, k=visit.k, request_time=at)
        if visit.kind == "retrieve":
            return await self._client.retrieve(history, k=visit.k, request_time=at)
        return await self._client.score(history, visit.candidates, request_time=at)


def probe(visit: Visit) -> dict[str, Any]:
    """Return a visit as the JSON that a plan carries."""
    history = visit.history
    return {
        "items": history.items.tolist(),
        "actions": history.actions.tolist(),
        "times": history.times.tolist(),
        "offset": history.offset,
        "candidates": visit.candidates.tolist(),
        "request_time": visit.request_time,
        "cacheable": visit.cacheable,
    }


def server_cpu_s(pid: int) -> float:
    """Return the seconds of CPU that a server and its running children have used."""
    parent = psutil.Process(pid)
    total = 0.0
    for process in (parent, *parent.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def cache_counters(address: str) -> dict[str, float]:
    """Return the counters gr_cache_*_tokens_total of the metrics endpoint, summed over the models."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        name = line.partition("{")[0]
        if name.startswith("gr_cache_") and name.endswith("_tokens_total"):
            found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


def _visit(fields: dict[str, Any]) -> Visit:
    rows = {name: np.array(fields[name], np.int64) for name in ("items", "actions", "times", "candidates")}
    candidates = rows.pop("candidates")
    return Visit(
        kind="probe",
        history=History(**rows, offset=fields["offset"]),
        candidates=candidates,
        request_time=fields["request_time"],
        cacheable=fields["cacheable"],
    )


async def _main(plan: Plan, results: Path) -> None:
    async with AsyncClient(plan.grpc_address, deadline_s=plan.deadline_s, max_attempts=1) as client:
        # The first call would else also ask what is served.
        await client.metadata()
        generator = Generator(plan, client)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, generator.stop)
        records, reports = await generator.run(lambda: print("phase", flush=True))
    np.save(results.with_suffix(".npy"), records, allow_pickle=False)
    storage.write_text(results.with_suffix(".json"), json.dumps(reports) + "\n")


if __name__ == "__main__":
    asyncio.run(_main(Plan.from_json(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])))

"""Fifty thousand requests of all kinds, broken and given up ones among them: memory, files and threads do not grow.

Run by `make test-faults`; its figures are printed and recorded.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from serving import repository
from serving.answering import NUM_THREADS
from serving.client import CallOptions, Client, History, ServingError
from serving.client_asyncio import AsyncClient
from serving.handle import ServerHandle
from serving.options import ServingOptions
from serving.server import EmbeddedServer
from tests.serving.callers import (
    CANDIDATES,
    HISTORIES,
    assert_right,
    caller,
    figures,
    post,
    processes,
    resident,
    settled,
    shared_memory,
)
from tests.serving.conftest import NUM_ITEMS, Offline, after, user
from tests.serving.test_faults_requests import BROKEN, MALFORMED, message, of_length

pytestmark = [pytest.mark.e2e, pytest.mark.faults]

NUM_REQUESTS = 50_000
NUM_USERS = 300
SAMPLE_EVERY = 1_000
AT_ONCE = 24
CACHE_BYTES = 1 << 20
ALL_ITEMS = np.arange(1000, 1000 + NUM_ITEMS)
MANY = np.resize(ALL_ITEMS, 10_000)
# What may come back from a request that is given up, or has no time.
GIVEN_UP = {"ok", "CANCELLED", "DEADLINE_EXCEEDED"}
# Of a hundred requests.
SHARES = {
    "score": 42,
    "retrieve": 14,
    "recommend": 12,
    "recommend by id": 4,
    "append": 4,
    "many candidates": 1,
    "long history": 2,
    "refused": 7,
    "broken": 4,
    "malformed": 1,
    "cancelled": 5,
    "late": 2,
    "probe": 2,
}


class Traffic:
    """Requests of users who come back with more events each time; `ended` counts how they ended, by kind."""

    def __init__(self, server: ServerHandle, client: AsyncClient, channel: grpc.aio.Channel, model: Offline) -> None:
        self._server, self._client, self._expected = server, client, caller(model).expected
        self._infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer", lambda sent: sent.SerializeToString(), lambda got: got
        )
        self._random, self._visits = random.Random(7), Counter[int]()
        self._users = [user(9000 + seed, 400) for seed in range(NUM_USERS)]
        self._long = of_length(5_000)
        self.ended: dict[str, Counter[str]] = {kind: Counter() for kind in SHARES}

    async def one(self) -> None:
        """Make one request, of a kind by the shares, and count how it ended."""
        (kind,) = self._random.choices(list(SHARES), list(SHARES.values()))
        try:
            outcome = await self._ask(kind)
        except ServingError as error:
            outcome = error.code
        except grpc.RpcError as error:
            outcome = error.code().name
        self.ended[kind][outcome or "ok"] += 1

    def _ask(self, kind: str) -> Awaitable[str | None]:
        ways: dict[str, Callable[[], Awaitable[str | None]]] = {
            "broken": self._broken,
            "malformed": self._malformed,
            "cancelled": self._cancelled,
            "probe": self._probe,
        }
        return ways[kind]() if kind in ways else self._valid(kind)

    async def _valid(self, kind: str) -> None:
        draw, client = self._random, self._client
        number, history = self._visit()
        at, k = after(history), draw.randint(1, 60)
        some = ALL_ITEMS[: draw.randint(0, NUM_ITEMS)]
        if kind == "retrieve":
            await client.retrieve(history, k=k, exclude=some[:20], request_time=at)
        elif kind == "recommend":
            await client.recommend(history, k=k, request_time=at, options=CallOptions(user=number))
        elif kind == "recommend by id":
            await client.recommend_user(number, k=k, request_time=after(self._users[number]))
        elif kind == "append":
            await client.append_events(number, history.items, history.actions, history.times)
        elif kind == "many candidates":
            await client.score(history, MANY, request_time=at)
        elif kind == "long history":
            await client.score(self._long, some, request_time=after(self._long))
        elif kind == "refused":
            await client.score(replace(history, offset=-1), some, request_time=at)
        elif kind == "late":
            await client.score(history, MANY, request_time=at, options=CallOptions(deadline_s=0.004))
        else:
            await client.score(history, some, request_time=at)

    async def _broken(self) -> None:
        broken = message(self._random.choice(["gr_ranker", "gr_retriever", "gr_recommender"]))
        BROKEN[self._random.choice(list(BROKEN))](broken)
        await self._infer(broken, timeout=10)

    async def _malformed(self) -> str:
        body = MALFORMED[self._random.choice(list(MALFORMED))]
        status, _ = await asyncio.to_thread(post, self._server, body)
        return str(status)

    async def _cancelled(self) -> str:
        _, history = self._visit()
        at = after(history)
        if self._random.random() < 0.7:
            call = self._client.score(history, MANY, request_time=at)
        else:
            call = self._client.recommend(history, k=20, request_time=at)
        task = asyncio.create_task(call)
        await asyncio.sleep(self._random.random() * 0.02)
        task.cancel()
        await asyncio.wait([task])
        return "CANCELLED" if task.cancelled() else "ok"

    async def _probe(self) -> None:
        number = self._random.randrange(len(HISTORIES))
        history = HISTORIES[number]
        answer = await self._client.score(history, CANDIDATES, request_time=after(history))
        assert_right(answer.scores, self._expected[number], max(map(np.max, self._expected)))

    def _visit(self) -> tuple[int, History]:
        """Return one of the users, few of whom come often, with what they have done by now."""
        number = min(int(self._random.paretovariate(0.7)) - 1, NUM_USERS - 1)
        self._visits[number] += 1
        num_events = (number % 50 + self._visits[number] // 2) % 400
        whole = self._users[number]
        return number, History(
            items=whole.items[:num_events], actions=whole.actions[:num_events], times=whole.times[:num_events]
        )


def sample(server: ServerHandle) -> dict[str, dict[str, float]]:
    """Return bytes by process, and bytes of shared memory; open files and threads; bytes of both caches."""
    named = processes(server)
    return {
        "bytes": {**resident(server), "shared memory": shared_memory(server)},
        "files": {name: each.num_fds() for name, each in named.items()},
        "threads": {name: each.num_threads() for name, each in named.items()},
        "cache": {model: figures(server, model)["gr_cache_bytes"] for model in ("gr_ranker", "gr_retriever")},
        "pids": {name: each.pid for name, each in named.items()},
    }


async def drive(server: ServerHandle, model: Offline) -> tuple[Traffic, list[dict[str, dict[str, float]]]]:
    """Make the requests, a few at once; return what became of them, and samples on the way."""
    samples = []
    async with AsyncClient(server.grpc_address, deadline_s=60) as client:
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            traffic, numbers = Traffic(server, client, channel, model), iter(range(NUM_REQUESTS))

            async def worker() -> None:
                for number in numbers:
                    await traffic.one()
                    if number % SAMPLE_EVERY == 0:
                        samples.append(await asyncio.to_thread(sample, server))

            await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return traffic, samples


@pytest.fixture
def busy(tmp_path: Path, pair: dict[str, Path]) -> Iterator[ServerHandle]:
    """A server with small caches, a small served log that is written often, and small histories."""
    options = ServingOptions(cache_bytes=CACHE_BYTES, log_seconds=1.0, log_bytes=1 << 20, history_bytes=1 << 20)
    repository.publish(tmp_path, pair["retrieval"], pair["ranking"], options)
    with EmbeddedServer(tmp_path) as handle:
        yield handle


POOLED = ("gr_recommender", "gr_user_recommender", "gr_events")


def most(samples: list[dict[str, dict[str, float]]], what: str, name: str) -> float:
    return max(each[what][name] for each in samples)


@pytest.mark.timeout(1800)
def test_nothing_grows_over_fifty_thousand_requests_and_scores_stay_right(busy, offline_models, record_property):
    model = offline_models["ranking"]
    traffic, samples = asyncio.run(drive(busy, model))
    report(samples, traffic, record_property)
    # The first quarter fills caches and pools.
    second, rest = samples[len(samples) // 4 : len(samples) // 2], samples[len(samples) // 2 :]
    for name in samples[0]["bytes"]:
        assert most(rest, "bytes", name) <= 1.03 * most(second, "bytes", name) + (4 << 20), name
    for name in samples[0]["files"]:
        assert most(rest, "files", name) <= most(second, "files", name) + 4, name
    for name in samples[0]["threads"]:
        # A model that asks others takes a thread more whenever more requests meet than ever before, up to its pool.
        pool = NUM_THREADS + 16 if name in POOLED else 0
        assert most(rest, "threads", name) <= max(pool, most(second, "threads", name) + 4), name
    assert {json.dumps(each["pids"]) for each in samples} == {json.dumps(samples[0]["pids"])}
    for name in samples[0]["cache"]:
        assert most(samples, "cache", name) <= CACHE_BYTES
        totals = settled(busy, name)
        assert totals["gr_failed_total"] == 0
        assert min(totals["gr_cache_evictions_total"], totals["gr_cache_hit_tokens_total"]) > 10_000
    check_ends(traffic.ended)
    expected = caller(model).expected
    with Client(busy.grpc_address, deadline_s=30) as client:
        for history, scores in zip(HISTORIES, expected, strict=True):
            answer = client.score(history, CANDIDATES, request_time=after(history))
            assert_right(answer.scores, scores, max(map(np.max, expected)))


def check_ends(ended: dict[str, Counter[str]]) -> None:
    """Every request ended as one of its kind may."""
    for kind, counts in ended.items():
        if kind in ("refused", "broken"):
            assert set(counts) == {"INVALID_ARGUMENT"}, (kind, counts)
        elif kind in ("cancelled", "late"):
            assert set(counts) <= GIVEN_UP, (kind, counts)
        elif kind == "malformed":
            assert set(counts) <= {"400", "500"}, (kind, counts)
        else:
            assert set(counts) == {"ok"}, (kind, counts)


def report(samples: list[dict[str, dict[str, float]]], traffic: Traffic, record: Callable[[str, object], None]) -> None:
    places = {f"{share:.0%}": samples[round(share * (len(samples) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)}
    rows = {
        name: {place: round(each["bytes"][name] / 1e6, 1) for place, each in places.items()}
        for name in samples[0]["bytes"]
    }
    for name, row in rows.items():
        print(f"{name:22}", *(f"{place} {megabytes:8.1f} MB" for place, megabytes in row.items()))
    print({kind: dict(counts) for kind, counts in traffic.ended.items()})
    for what in ("files", "threads", "cache"):
        print(what, places["25%"][what], places["100%"][what])
    record("megabytes", json.dumps(rows))

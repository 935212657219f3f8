"""The same requests by every way there is to ask, alone and among others: each time what the offline model says."""

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

from gr_platform.bundle.compute import ComputePath
from gr_platform.bundle.fastest import FastestCompute
from gr_platform.models.config import Kind
from gr_platform.models.recipes import named
from serving.client import Answer, Client, History
from serving.client_asyncio import AsyncClient
from serving.engine.engine import Engine, Limits
from serving.engine.microbatches import Microbatches
from serving.engine.ranker import Ranker
from serving.engine.requests import RankRequest, RetrieveRequest
from serving.engine.retriever import Retriever
from serving.handle import ServerHandle
from tests.serving.conftest import NUM_ITEMS, Offline, after, offline, user

ALL_ITEMS = np.arange(1000, 1000 + NUM_ITEMS)
NONE = np.zeros(0, np.int64)
KINDS: tuple[Kind, ...] = ("ranking", "retrieval")
PATHS: tuple[ComputePath, ...] = ("auto", "torch", "onnx")
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A history as it is sent and as it is as a whole, and what is asked for: scores of candidates, or the best k."""

    history: History
    whole: History
    request_time: int
    candidates: np.ndarray
    k: int
    exclude: np.ndarray

    def request(self, kind: str) -> RankRequest | RetrieveRequest:
        if kind == "ranking":
            return RankRequest(history=self.history, candidates=self.candidates, request_time=self.request_time)
        return RetrieveRequest(history=self.history, k=self.k, exclude=self.exclude, request_time=self.request_time)

    def ask(self, client: Client, kind: str) -> Answer:
        if kind == "ranking":
            return client.score(self.history, self.candidates, request_time=self.request_time)
        return client.retrieve(self.history, k=self.k, exclude=self.exclude, request_time=self.request_time)

    async def ask_async(self, client: AsyncClient, kind: str) -> Answer:
        if kind == "ranking":
            return await client.score(self.history, self.candidates, request_time=self.request_time)
        return await client.retrieve(self.history, k=self.k, exclude=self.exclude, request_time=self.request_time)


def trimmed(history: History, offset: int) -> History:
    """The history without its first `offset` events, of which a client tells."""
    return History(
        items=history.items[offset:], actions=history.actions[offset:], times=history.times[offset:], offset=offset
    )


def edited(history: History, at: int, *, item: int = 0, action: int = 0) -> History:
    items, actions = history.items.copy(), history.actions.copy()
    items[at] += item
    actions[at] ^= action
    return replace(history, items=items, actions=actions)


def asked() -> list[Asked]:
    """Requests in an order in which most find another one's tokens in the cache."""
    past, long, rng = user(2000, 25), user(2004, 130), np.random.default_rng(5)
    histories = [
        (past, past),  # cold
        (past, past),  # cached
        (user(2000, 28),) * 2,  # appended
        (edited(past, 9, action=1),) * 2,
        (edited(past, 24, item=1 - 2 * int(past.items[24] == 1199)),) * 2,
        (user(2001, 0),) * 2,
        (user(2002, 1),) * 2,
        (user(2003, 40),) * 2,  # max_events
        (long, long),
        (trimmed(long, 70), long),
        (trimmed(user(2004, 133), 90), user(2004, 133)),
        (past, past),  # for another time, below
    ]
    counts = cycle([17, 600, 1, 17, 0, 17, 1])
    return [
        Asked(
            history=history,
            whole=whole,
            request_time=after(whole) + (86_400_000 if number == len(histories) - 1 else 0),
            # Some are twice among them, and some are unknown.
            candidates=rng.integers(995, 1000 + NUM_ITEMS, next(counts)),
            k=(1, 10, 500)[number % 3],
            exclude=rng.integers(995, 1000 + NUM_ITEMS, (0, 30)[number % 2]),
        )
        for number, (history, whole) in enumerate(histories)
    ]


ASKED = asked()


class Reference:
    """What the offline model gives for each of ASKED: full forwards, no cache, no graph, no server."""

    def __init__(self, kind: str, model: Offline) -> None:
        self.kind = kind
        self.scores = [self._scores(each, model) for each in ASKED]
        self.tolerance = TOLERANCE * max(float(np.abs(scores).max()) for scores in self.scores if scores.size)

    def check(self, number: int, answer: object) -> None:
        """Assert that an answer of the client or a result of the engine is right."""
        asked, expected = ASKED[number], self.scores[number]
        scores = answer.scores  # type: ignore[attr-defined]
        assert scores.dtype == np.float32
        if self.kind == "retrieval":
            items = answer.items  # type: ignore[attr-defined]
            best = np.sort(expected[~np.isin(ALL_ITEMS, asked.exclude)])[::-1][: asked.k]
            assert len(items) == len(set(items.tolist())) == len(best)
            assert not set(items.tolist()) & set(asked.exclude.tolist())
            # These very items in this order, but for two whose scores are closer than the precision.
            assert np.abs(expected[items - 1000] - best).max(initial=0.0) <= self.tolerance
            expected = best
        assert scores.shape == expected.shape
        assert np.abs(scores - expected).max(initial=0.0) <= self.tolerance

    def _scores(self, each: Asked, model: Offline) -> np.ndarray:
        if self.kind == "retrieval":
            return model.scores(each.whole, ALL_ITEMS, each.request_time)
        # The offline model does one full forward a candidate.
        distinct, where = np.unique(each.candidates, return_inverse=True)
        if not len(distinct):
            return np.zeros((0, len(model.bundle.tasks)), np.float32)
        return model.scores(each.whole, distinct, each.request_time)[where]


@pytest.fixture(scope="module")
def references(offline_models: dict[str, Offline]) -> dict[str, Reference]:
    return {kind: Reference(kind, offline_models[kind]) for kind in KINDS}


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory, random_bundle: Callable[..., Path]) -> dict[str, Offline]:
    parent, made = tmp_path_factory.mktemp("transformer"), {}
    for kind in KINDS:
        config = named("tiny-transformer", kind).model
        # Weights five times as large make of these products logits of 35, and of rounding 1e-4.
        folder = random_bundle(parent / kind, kind, num_items=NUM_ITEMS, config=config, scale=2.0)
        made[kind] = offline(folder)
    return made


def engine(model: Offline, path: ComputePath, cache_bytes: int) -> Engine:
    """An engine that has to divide both histories and lists of candidates, and on `auto` uses torch and the graphs."""
    kind = {"ranking": Ranker, "retrieval": Retriever}[model.bundle.kind]
    made = kind(model.bundle, cache_bytes=cache_bytes, path=path)
    made.microbatches = Microbatches.fixed(64)
    if isinstance(made.compute, FastestCompute):
        made.compute.graph_from = {"alone": 17, "together": 20}
        made.compute.graph_to = {"alone": 3, "together": 20}
    return Engine(made, Limits(max_users=5, step_tokens=48, max_wait_s=math.inf))


def ask_together(engine: Engine, kind: str, numbers: Sequence[int]) -> list[object]:
    outcomes: dict[int, object] = {}
    for place, number in enumerate(numbers):
        engine.submit(ASKED[number].request(kind), lambda job, outcome, place=place: outcomes.update({place: outcome}))
    while len(outcomes) < len(numbers):
        engine.step()
        engine.model.cache.check_integrity()
    return [outcomes[place] for place in range(len(numbers))]


def check_in_process(model: Offline, reference: Reference, path: ComputePath) -> None:
    everything = range(len(ASKED))
    for cache_bytes in (0, 1 << 20):
        alone = engine(model, path, cache_bytes)
        for number in (*everything, *everything):
            reference.check(number, alone.ask(ASKED[number].request(reference.kind)))
        hits = alone.model.cache.counters.hit_tokens
        assert hits > 0 if cache_bytes else hits == 0
        together = engine(model, path, cache_bytes)
        shuffled = np.random.default_rng(1).permutation([*everything, *everything, *everything]).tolist()
        for numbers in (shuffled, shuffled[::-1]):
            for number, result in zip(numbers, ask_together(together, reference.kind, numbers), strict=True):
                reference.check(number, result)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_in_process_by_either_path_with_and_without_a_cache_alone_and_together(offline_models, references, kind, path):
    check_in_process(offline_models[kind], references[kind], path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformer_is_served_by_the_same_engine(transformers, kind):
    assert transformers[kind].bundle.config.encoder == "transformer"
    reference = Reference(kind, transformers[kind])
    for path in PATHS:
        check_in_process(transformers[kind], reference, path)


@pytest.mark.e2e
@pytest.mark.parametrize("kind", KINDS)
def test_over_grpc_alone(client: Client, references: dict[str, Reference], kind: str):
    for number in (*range(len(ASKED)), *range(len(ASKED))):
        references[kind].check(number, ASKED[number].ask(client, kind))


def shuffled_pairs(times: int) -> list[tuple[str, int]]:
    pairs = [(kind, number) for kind in KINDS for number in range(len(ASKED))] * times
    return [pairs[at] for at in np.random.default_rng(times).permutation(len(pairs))]


@pytest.mark.e2e
def test_over_grpc_among_others_from_threads(server: ServerHandle, references: dict[str, Reference]):
    pairs, done = shuffled_pairs(6), []

    def other(seed: int) -> None:
        with Client(server.grpc_address, deadline_s=60) as client:
            while len(done) < len(pairs):
                history = user(seed, seed % 60)
                client.recommend(history, k=5, request_time=after(history))
                seed += 1

    def ask(pair: tuple[str, int]) -> None:
        done.append(pair)
        references[pair[0]].check(pair[1], ASKED[pair[1]].ask(connection, pair[0]))

    with Client(server.grpc_address, deadline_s=60) as connection, ThreadPoolExecutor(20) as pool:
        others = [pool.submit(other, 3000 + 100 * thread) for thread in range(4)]
        list(pool.map(ask, pairs))
        for each in others:
            each.result()


@pytest.mark.e2e
def test_over_grpc_among_others_from_coroutines(server: ServerHandle, references: dict[str, Reference]):
    pairs = shuffled_pairs(5)

    async def main() -> list[Answer]:
        # More at once would be refused.
        places = asyncio.Semaphore(24)

        async def ask(connection: AsyncClient, kind: str, number: int) -> Answer:
            async with places:
                return await ASKED[number].ask_async(connection, kind)

        async with AsyncClient(server.grpc_address, deadline_s=60) as connection:
            return await asyncio.gather(*(ask(connection, kind, number) for kind, number in pairs))

    for (kind, number), answer in zip(pairs, asyncio.run(main()), strict=True):
        references[kind].check(number, answer)

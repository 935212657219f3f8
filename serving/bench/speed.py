"""The speed table of the engine, in process: what caching, deltas and M-FALCON save, and how cost grows.

Invariant: both sides of a ratio run in one process on the same threads, "uncached" being our own best path: the last
layer of a history gives K/V alone, and the same code scores. A figure is the least time of several calls.

Legend: n tokens of history, m candidates.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gr_platform.bundle.compute import least_seconds
from gr_platform.bundle.load import load
from gr_platform.models.config import ModelConfig
from serving.bench import models
from serving.engine.engine import Engine, Limits
from serving.engine.ranker import Ranker
from serving.engine.requests import History, RankRequest
from serving.engine.top_k import best_items

Row = dict[str, Any]
NUM_ITEMS = 10_000
MAX_EVENTS = 2_048
SEARCHED_ITEMS = 1_000_000
CACHE_BYTES = 1 << 30
START_MS = 1_577_836_800_000
DOUBLED_M = (256, 512, 1_024, 2_048, 4_096, 8_192)
DOUBLED_N = (256, 512, 1_024, 2_048, 4_096)
GROWN_FROM = 512
# So long a step that a prefill is never cut: the best that the uncached side can do.
LIMITS = Limits(step_tokens=1 << 20)


def run(num_threads: int) -> list[Row]:
    """Return the rows of the speed table that need no server."""
    with engines(models.speed_table(MAX_EVENTS), num_threads) as (cached, uncached):
        rows = [*_ratios(cached, uncached), *_of_peak(cached, uncached), *_growth(cached, uncached)]
    return [*rows, _search()]


@contextmanager
def engines(config: ModelConfig, num_threads: int) -> Iterator[tuple[Engine, Engine]]:
    """Yield two engines of one random ranking bundle, warmed up: with a cache, and with none."""
    with tempfile.TemporaryDirectory(prefix="gr-bench-") as folder:
        bundle_folder = Path(folder) / "ranking"
        models.write_bundle(bundle_folder, replace(config, kind="ranking"), num_items=NUM_ITEMS, seed=1)
        bundle = load(bundle_folder)
        made = []
        for cache_bytes in (CACHE_BYTES, 0):
            model = Ranker(bundle, cache_bytes=cache_bytes, num_threads=num_threads)
            model.warm_up()
            made.append(Engine(model, LIMITS))
        yield made[0], made[1]


def request(num_tokens: int, num_candidates: int, *, seed: int = 0, num_more: int = 0) -> RankRequest:
    """Return a made-up request with a history of about `num_tokens` tokens, and `num_more` events after them."""
    rng = np.random.default_rng(seed)
    # As many draws whatever is asked: a longer history of a seed begins with the shorter one.
    most = 2 * MAX_EVENTS
    items, times = rng.integers(0, NUM_ITEMS, most), START_MS + np.cumsum(rng.integers(1_000, 10_000_000, most))
    num_events = (num_tokens - 1) // 2 + num_more
    return RankRequest(
        history=History(
            items=models.FIRST_ID + items[:num_events],
            actions=np.ones(num_events, np.int64),
            times=times[:num_events],
        ),
        candidates=models.FIRST_ID + rng.integers(0, NUM_ITEMS, num_candidates),
        request_time=int(times[num_events]),
    )


def _ratios(cached: Engine, uncached: Engine) -> list[Row]:
    rows = []
    for n, m, target in ((2_048, 256, 3.5), (1_024, 256, 2.3)):
        whole, rest = (least_seconds(partial(engine.ask, request(n, m))) for engine in (uncached, cached))
        against = f"{1e3 * whole:.1f} ms and {1e3 * rest:.1f} ms"
        rows.append(row(f"uncached / cached, n {n:,}, m {m}", whole / rest, "x", against, target))
    whole = least_seconds(lambda: uncached.ask(request(1_024, 256)))
    cached.ask(request(1_024, 256, seed=9))
    grown = iter(range(1, 100))
    delta = least_seconds(lambda: cached.ask(request(1_024, 256, seed=9, num_more=next(grown))))
    name = "full prefill + 256 / delta of 1 event + 256, n 1,024"
    rows.append(row(name, whole / delta, "x", f"{1e3 * whole:.1f} ms and {1e3 * delta:.1f} ms", 2.3))
    one = least_seconds(lambda: uncached.ask(request(512, 1)))
    all_at_once = least_seconds(lambda: cached.ask(request(512, 1_024)))
    name = "full forward one candidate at a time / cached M-FALCON, n 512, m 1,024"
    against = f"1,024 x {1e3 * one:.1f} ms and {1e3 * all_at_once:.1f} ms"
    return [*rows, row(name, 1_024 * one / all_at_once, "x", against, 100)]


def _of_peak(cached: Engine, uncached: Engine) -> list[Row]:
    """Return what cached scoring reaches of torch.mm's peak and, to compare, what a prefill does."""
    n = m = 1_024
    config = cached.model.bundle.config
    a = torch.randn(1_024, 1_024)
    peak = 2 * 1_024**3 / least_seconds(lambda: a @ a, num_calls=30)
    scored = num_flops(config, n, m) / least_seconds(lambda: cached.ask(request(n, m)))
    prefilled = prefill_flops(config, n) / least_seconds(lambda: uncached.ask(request(n, 0)))
    against = f"torch.mm {peak / 1e9:.0f} GFLOP/s"
    return [
        row(f"{what}, share of `torch.mm` peak, {size}", 100 * reached / peak, "%", against, target)
        for what, size, reached, target in (
            ("cached scoring", "n 1,024, m 1,024", scored, 40),
            ("prefill without a cache", "n 1,024", prefilled, None),
        )
    ]


def num_flops(config: ModelConfig, n: int, m: int) -> float:
    """Return the useful floating point operations of scoring m candidates against n cached tokens with HSTU."""
    return float(m * config.num_layers * (_of_token(config) + 2 * n * _width(config)))


def prefill_flops(config: ModelConfig, n: int) -> float:
    """Return the same of n tokens of which each sees those before it; the last layer's K and V alone are needed."""
    whole = (config.num_layers - 1) * (_of_token(config) + n * _width(config))
    return float(n * (whole + 2 * config.embedding_dim * _width(config)))


def _width(config: ModelConfig) -> int:
    return config.num_heads * (config.qk_dim + config.v_dim)


def _of_token(config: ModelConfig) -> int:
    """Operations of a layer's two products for one token: to u, v, q and k, and back."""
    return 2 * config.embedding_dim * (2 * _width(config) + config.num_heads * config.v_dim)


def _growth(cached: Engine, uncached: Engine) -> list[Row]:
    """Return how the cached time grows at worst, and the times of both sides along n and along m."""
    along_n, along_m = [(n, min(DOUBLED_M)) for n in DOUBLED_N], [(GROWN_FROM, m) for m in DOUBLED_M]
    ms: dict[str, dict[tuple[int, int], float]] = {
        side: {at: 1e3 * least_seconds(partial(engine.ask, request(*at))) for at in dict.fromkeys(along_n + along_m)}
        for side, engine in (("cached", cached), ("uncached", uncached))
    }
    own = ms["cached"]
    worst, of = max((own[twice] / own[once], twice) for line in (along_n, along_m) for once, twice in pairwise(line))
    name = "T(2x) / T(x), each doubling of m from 256 to 8,192 and of n from 256 to 4,096, cached"
    found = row(name, worst, "x", f"the worst, at n {of[0]:,}, m {of[1]:,}", 2.2) | {"at_most": True}
    points = [
        row(f"{side}, n {n:,}, m {m:,}", value, "ms", None, None) | {"side": side, "n": n, "m": m}
        for side, times in ms.items()
        for (n, m), value in times.items()
    ]
    return [found, *points]


def _search() -> Row:
    """Return the row of the exact search for the best 100 of a million items."""
    rng = np.random.default_rng(0)
    items = rng.normal(size=(SEARCHED_ITEMS, 64)).astype(np.float32)
    user, none = rng.normal(size=(1, 64)).astype(np.float32), np.zeros(0, np.int64)
    seconds = least_seconds(lambda: best_items(user, items, [100], [none]))
    return row("retrieval, best 100 of 1 M items of d 64", 1e3 * seconds, "ms", "exact", 100) | {"at_most": True}


def row(name: str, value: float | None, unit: str, against: str | None, target: float | None) -> Row:
    """Return a row of the benchmark's table."""
    return {"name": name, "value": value, "unit": unit, "against": against, "target": target}

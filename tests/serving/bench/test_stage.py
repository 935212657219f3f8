"""The benchmark against a real server of its own: small models, short phases, the same code."""

import numpy as np
import pytest

from gr_platform import settings
from gr_platform.bundle import golden
from gr_platform.models.recipes import tiny
from serving.bench import load, models, perf, swap
from serving.bench.stage import Stage, stage

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def ready():
    traffic = {"num_users": 30, "first_events": (2, 40), "num_candidates": (4, 64), "weights": (0.5, 0.5)}
    with stage(tiny("ranking").model, num_threads=1, num_items=300, traffic=traffic) as started:
        yield started


def test_two_seeds_are_two_models_of_one_data_set(ready: Stage):
    first, second = (golden.load(pair.ranking / "golden.safetensors") for pair in ready.pairs)
    for (asked, old), (same, new) in zip(first, second, strict=True):
        assert asked.items.tolist() == same.items.tolist()
        assert np.abs(old - new).max() > 10 * swap.TOLERANCE


def test_a_sweep_offers_what_it_says_and_hides_no_request(ready: Stage):
    rows, saturation = load.rows(ready, warm_up_s=0.5, saturation_s=1.0, load_s=1.5, shares=(0.1, 0.3))
    found = {row["name"]: row["value"] for row in rows}
    assert saturation > 20
    for percent in (10, 30):
        figures = {row["what"]: row["value"] for row in rows if row.get("load") == percent}
        assert figures["offered"] == pytest.approx(saturation * percent / 100, rel=0.6)
        assert 0 < figures["latency, p50"] <= figures["latency, p95"] <= figures["latency, p99"]
        assert figures["failed"] == 0
        # Two counts of the same: what answers say, and what the server says of itself.
        assert figures["cache hits by CACHED_TOKENS"] == pytest.approx(
            figures["cache hits by the server's counters"], abs=3
        )
        assert figures["server CPU"] > figures["generator CPU"] > 0
    assert found[f"saturation, {load.NUM_CALLERS} callers who wait"] == saturation


def test_swaps_under_load_fail_no_request_and_give_no_old_score(ready: Stage):
    rows = swap.rows(ready, 100.0, num_swaps=2, warm_up_s=0.5, before_s=1.0, settle_s=1.0)
    found = {row["name"]: row["value"] for row in rows}
    assert found[swap.NAME] == 0
    assert found["swap: from call to served, slowest"] > 0
    assert found["P99 during the swap / before"] > 0
    probes = next(row["against"] for row in rows if row["name"].endswith(": stale"))
    assert int(probes.split()[0]) > 10


def test_perf_analyzer_measures_the_same_server(ready: Stage):
    if settings.perf_analyzer() is None:
        pytest.skip("GR_PERF_ANALYZER is not set: perf_analyzer is no dependency of ours")
    rows = perf.rows(ready, 60.0, seconds=2.0)
    assert len(rows) == 2 * len(perf.PERCENTILES)
    assert all(row["value"] > 0 for row in rows)


def test_a_model_of_the_speed_table_has_its_shape():
    config = models.speed_table(max_events=2048)
    shape = (config.embedding_dim, config.num_layers, config.num_heads, config.qk_dim, config.v_dim)
    assert shape == (256, 4, 4, 64, 64)

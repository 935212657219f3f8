"""The generator keeps its schedule whatever the server does, and counts waits from it."""

import asyncio
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import numpy as np
import pytest

from serving.bench import generator
from serving.bench.generator import EXPIRED, FAILED, OK, REJECTED, Generator, Phase, Plan, cache_counters
from serving.bench.load import latencies
from serving.bench.traffic import Traffic
from serving.client_asyncio import AsyncClient
from tests.serving.scripted_endpoint import SCORED, Endpoint, serving

TRAFFIC = Traffic(
    first_id=1000,
    num_items=9,
    num_actions=1,
    max_events=8,
    chunk=4,
    num_users=5,
    first_events=(2, 8),
    recommend_share=0,
)


class Slow(Endpoint):
    """Answers after `seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.outputs, self.seconds = SCORED, seconds

    def ModelInfer(self, request, context):
        time.sleep(self.seconds)
        return super().ModelInfer(request, context)


@pytest.fixture(autouse=True)
def _no_metrics(monkeypatch):
    monkeypatch.setattr(generator, "cache_counters", lambda address: {"gr_cache_hit_tokens_total": 1.0})
    monkeypatch.setattr(generator, "COUNTERS_LATE_S", 0.0)


def carried_out(servicer: Endpoint, *phases: Phase, num_threads: int = 4, **fields) -> tuple[np.ndarray, list[dict]]:
    async def run(address: str) -> tuple[np.ndarray, list[dict]]:
        fixed = {"grpc_address": address, "metrics_address": "", "server_pid": os.getpid(), "traffic": TRAFFIC}
        plan = Plan(**fixed, phases=phases, **fields)
        async with AsyncClient(address, deadline_s=plan.deadline_s, max_attempts=1) as client:
            await client.metadata()
            return await Generator(plan, client).run(lambda: None)

    with serving(servicer, num_threads=num_threads) as address:
        return asyncio.run(run(address))


def test_a_plan_survives_its_file():
    plan = Plan(
        grpc_address="a:1", metrics_address="a:2", server_pid=7, traffic=TRAFFIC, phases=(Phase(seconds=1, share=0.1),)
    )
    assert Plan.from_json(plan.to_json()) == plan


def test_an_open_phase_sends_what_is_scheduled_and_a_slow_server_shows_in_every_wait_behind_it():
    # One answer at a time, 50 ms each, offered 40 a second: half of them pile up, and each waits for those before it.
    records, (report,) = carried_out(Slow(0.05), Phase(seconds=1.0, rate=40.0), num_threads=1, deadline_s=20.0)
    assert report["rate"] == 40.0
    assert 20 < len(records) < 65
    assert (records["outcome"] == OK).all()
    assert np.quantile(records["sent"] - records["scheduled"], 0.9) < 0.25
    waits = latencies(records[np.argsort(records["scheduled"])])
    assert waits[-1] > 400
    assert np.corrcoef(np.arange(len(waits)), waits)[0, 1] > 0.9


def test_callers_wait_for_their_answer_and_set_the_rate_of_a_later_share():
    records, reports = carried_out(Slow(0.02), Phase(seconds=0.5, callers=2), Phase(seconds=0.5, share=0.5))
    assert 0 < reports[0]["rate"] <= 2 / 0.02
    assert reports[1]["rate"] == reports[0]["rate"] / 2
    assert np.count_nonzero(records["phase"] == 0) == pytest.approx(reports[0]["rate"] * 0.5, rel=0.2)
    assert set(reports[1]) >= {"server_cpu_s", "generator_cpu_s", "gr_cache_hit_tokens_total", "spent_s"}


def test_refusals_are_told_apart():
    servicer = Slow()
    code = grpc.StatusCode
    servicer.failures = [(code.UNAVAILABLE, "full"), (code.DEADLINE_EXCEEDED, ""), (code.INTERNAL, "")]
    records, _ = carried_out(servicer, Phase(seconds=0.2, callers=1))
    assert records["outcome"][:4].tolist() == [REJECTED, EXPIRED, FAILED, OK]
    # A refusal is no wait.
    assert len(latencies(records)) == len(records) - 2
    assert records["cached"][3] == 7


def test_probes_keep_their_scores_and_the_rest_keeps_none():
    fields = {"items": [1], "actions": [1], "times": [5], "offset": 0, "candidates": [1], "request_time": 9}
    records, _ = carried_out(
        Slow(), Phase(seconds=0.3, callers=1), probes=(fields | {"cacheable": 3},) * 2, probe_share=0.5
    )
    probes = records[records["probe"] >= 0]
    assert 0 < len(probes) < len(records)
    assert set(probes["probe"].tolist()) <= {0, 1}
    assert (probes["scores"][:, :2] == [0.5, 0.25]).all()
    assert np.isnan(records[records["probe"] < 0]["scores"]).all()


def test_a_phase_that_is_stopped_still_waits_for_what_it_sent():
    async def run(address: str) -> np.ndarray:
        fixed = {"grpc_address": address, "metrics_address": "", "server_pid": os.getpid(), "traffic": TRAFFIC}
        plan = Plan(**fixed, phases=(Phase(seconds=60, rate=50), Phase(seconds=60, rate=50)))
        async with AsyncClient(address) as client:
            running = Generator(plan, client)
            asyncio.get_running_loop().call_later(0.4, running.stop)
            return (await running.run(lambda: None))[0]

    with serving(Slow(0.2)) as address:
        records = asyncio.run(run(address))
    assert len(records)
    assert (records["outcome"] == OK).all()
    assert set(records["phase"]) == {0}


def test_the_servers_counters_are_summed_over_its_models(monkeypatch):
    monkeypatch.undo()
    text = (
        b'gr_cache_hit_tokens_total{model="a"} 5\ngr_cache_hit_tokens_total{model="b"} 7\n'
        b'gr_cache_prefill_tokens_total{model="a"} 1\ngr_cache_bytes{model="a"} 9\nnv_inference_count 3\n'
    )

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Metrics)
    threading.Thread(target=server.handle_request).start()
    found = cache_counters(f"127.0.0.1:{server.server_port}")
    server.server_close()
    assert found == {"gr_cache_hit_tokens_total": 12.0, "gr_cache_prefill_tokens_total": 1.0}

"""The sensor that has a challenger judged once it has scored enough live requests."""

import time

import dagster as dg
import numpy as np
import pytest

from assets.shadow import shadow
from gr_platform import serving_state, storage
from serving.served_log import LogBounds, ServedLog
from serving.served_rows import Served, ServedBy

DIGEST = "c0ffee"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GR_HOME", str(tmp_path))
    (tmp_path / "lifecycle.toml").write_text("[shadow]\nrequests = 5\n")
    return tmp_path


def load_shadow(home):
    pair = home / "model_repositories" / "pair-1"
    bundle = pair / "gr_ranker_shadow" / "1" / "bundle"
    bundle.mkdir(parents=True)
    facts = {"declaration": {"name": "shop"}, "model_digest": DIGEST}
    storage.write_manifest(bundle, kind="ranking", spec={}, facts=facts)
    (home / "model_repository").symlink_to(pair.relative_to(home))


def serve(home, num, digest=DIGEST):
    by = ServedBy(
        item_id_type="int64", tasks=("buy",), retriever_digest="r", ranker_digest="k", shadow_digest=digest,
        shadow_tasks=("buy",),
    )  # fmt: skip
    log = ServedLog(serving_state.served_folder(home, "shop"), by, hash_user=str, bounds=LogBounds())
    for number in range(num):
        # One of them failed: it was asked all the same.
        scores = None if number == 0 else np.ones((1, 1), np.float32)
        now = time.time_ns() // 1_000_000
        log.record(
            Served(
                request_id="", served_ts=now, request_ts=1, user=None, items=np.array([1]),
                scores=np.ones((1, 1), np.float32), latency_ms=1.0, shadow_scores=scores, shadow_ms=2.0,
            )
        )  # fmt: skip
    log.close()


def look(home):
    with dg.instance_for_test(temp_dir=str(home)) as instance:
        return shadow(dg.build_sensor_context(instance=instance))


def test_without_a_shadow_and_without_a_wish_for_one_it_skips(home):
    assert look(home).skip_message == "no challenger scores live requests"
    load_shadow(home)
    (home / "lifecycle.toml").write_text("")
    assert look(home).skip_message == "no challenger scores live requests"
    (home / "lifecycle.toml").write_text("[shadow")
    assert "is no valid TOML" in look(home).skip_message


def test_it_asks_once_an_hour_when_enough_requests_were_scored(home):
    load_shadow(home)
    serve(home, 3)
    serve(home, 9, digest="another")
    assert look(home).skip_message == "the challenger has scored 3 live requests, 5 are wanted"
    serve(home, 2)
    asked, again = look(home), look(home)
    assert asked.run_key == again.run_key
    assert asked.run_key.startswith(DIGEST)
    assert asked.run_config["ops"]["deployment"]["config"] == {"champion_only": False}
    assert asked.run_config["resources"]["platform"]["config"]["dataset"] == "shop"

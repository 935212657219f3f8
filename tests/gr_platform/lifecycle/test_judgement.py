"""Judgements on real files: what is worse, broken, or has seen the window does not pass, whatever else is right."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from gr_platform import serving_state, storage
from gr_platform.bundle.load import load
from gr_platform.lifecycle import judgement, measures
from gr_platform.lifecycle.folders import bundle_of, run_of
from gr_platform.registry import promotion, versions
from gr_platform.registry.promotion import Contest, Pair
from serving.served_rows import Served, ServedBy, table_of
from tests.gr_platform.lifecycle.spoiling import DS, nan, noise, pair_of, spoiled, weights

# All but what a test is about: on a poisoned day, and on a machine that does other things.
WIDE = """[gates]
max_item_share = 1.0
max_score_drift = 1000.0
max_latency_ratio = 1000.0
max_memory_ratio = 1000.0
max_slice_loss = 1.0
min_catalogue_ratio = 0.0
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "NUM_TURNS", 1)


@pytest.fixture(scope="module")
def copied(replayed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("judged") / "home"
    shutil.copytree(replayed / "home", home, symlinks=True)
    shutil.rmtree(home / "served", ignore_errors=True)
    return home


@pytest.fixture
def home(copied: Path) -> Iterator[Path]:
    """A copy that the tests of this module share: contests are made up, aliases stay."""
    (copied / "lifecycle.toml").write_text(WIDE)
    yield copied
    shutil.rmtree(copied / "served", ignore_errors=True)


@pytest.fixture(scope="module")
def weak(copied: Path) -> Pair:
    """A pair like the champions that has learned nothing."""
    return spoiled(copied, pair_of(copied, "2"), "weak", run=weights(noise))


def judged(home: Path, pair: Pair, reigning: Pair) -> dict[str, Any]:
    return judgement.judge(home, DS, Contest(pair=pair, reigning=reigning)).manifest.facts


def closed(facts: dict[str, Any]) -> dict[str, str]:
    """Return gate -> why of the gates that object."""
    assert facts["passed"] == all(gate["ok"] for gate in facts["gates"])
    return {gate["gate"]: gate["why"] for gate in facts["gates"] if not gate["ok"]}


def test_a_better_challenger_passes_and_the_judgement_is_kept(home: Path, weak: Pair) -> None:
    contest = Contest(pair=pair_of(home, "3"), reigning=weak)
    first = judgement.judge(home, DS, contest)
    assert closed(first.manifest.facts) == {}
    again = judgement.judge(home, DS, contest)
    assert again.reused
    assert again.manifest == first.manifest == judgement.last(home, DS).manifest
    facts = first.manifest.facts
    window = storage.read_manifest(run_of(home, DS, contest.pair["ranking"])).spec["split"]
    assert facts["window"] == {"kind": "time", "cut": window["cut"], "end": window["end"]}
    for side in ("challenger", "champion"):
        assert all(each["trained_until_ms"] < window["cut"] for each in facts[side].values())
    assert {line["figure"] for line in facts["differences"]["retrieval"]} >= {"ndcg_at_10", "hr_at_10"}
    (home / "lifecycle.toml").write_text(WIDE + "min_gain = 1000.0\n")
    stricter = judgement.judge(home, DS, contest)
    assert not stricter.reused
    assert list(closed(stricter.manifest.facts)) == ["quality"]


def test_a_challenger_that_learned_nothing_is_refused_for_quality(home: Path) -> None:
    worse = spoiled(home, pair_of(home, "3"), "worse", run=weights(noise))
    facts = judged(home, worse, pair_of(home, "2"))
    assert "is worse for certain" in closed(facts)["quality"]
    differences = {line["figure"]: line["difference"] for line in facts["differences"]["retrieval"]}
    assert differences["ndcg_at_10"] < 0


def test_the_poisoned_day_alone_closes_the_gate_of_the_window(home: Path, weak: Pair) -> None:
    (home / "lifecycle.toml").write_text(WIDE.replace("max_item_share = 1.0", "max_item_share = 0.3"))
    facts = judged(home, pair_of(home, "3"), weak)
    assert list(closed(facts)) == ["window"]
    assert "one item holds" in closed(facts)["window"]


@pytest.mark.parametrize("kind", versions.KINDS)
def test_a_challenger_with_a_nan_is_refused_and_said_to_be_none(home: Path, weak: Pair, kind: str) -> None:
    sound = pair_of(home, "3")
    broken = spoiled(home, {kind: sound[kind]}, "nan", run=weights(nan))
    facts = judged(home, sound | broken, weak)
    found = closed(facts)
    assert set(found) == {"finite", "window", "popularity", "quality"}
    assert "are NaN or infinite" in found["finite"]
    assert facts["differences"] == {}


def test_bundles_that_are_not_their_models_close_parity(home: Path, weak: Pair) -> None:
    from safetensors.numpy import load_file, save_file

    def mixed_up(folder: Path) -> None:
        vectors = load_file(folder / "item_vectors.safetensors")["item_vectors"]
        save_file({"item_vectors": vectors[::-1].copy()}, folder / "item_vectors.safetensors")

    def undefined(folder: Path) -> None:
        vectors = load_file(folder / "item_vectors.safetensors")["item_vectors"]
        save_file({"item_vectors": np.full_like(vectors, np.nan)}, folder / "item_vectors.safetensors")

    sound = pair_of(home, "3")
    for name, change in (("mixed-up", mixed_up), ("undefined", undefined)):
        broken = spoiled(home, {"retrieval": sound["retrieval"]}, name, bundle=change)
        assert "the retrieval bundle's largest error" in closed(judged(home, sound | broken, weak))["parity"]


def test_whoever_saw_the_window_is_not_judged_on_it(home: Path, weak: Pair) -> None:
    sound = pair_of(home, "3")
    cut = storage.read_manifest(run_of(home, DS, sound["ranking"])).spec["split"]["cut"]
    late = spoiled(home, sound, "late", facts={"trained_until_ms": cut})
    for pair, reigning in ((late, weak), (sound, late)):
        facts = judged(home, pair, reigning)
        found = closed(facts)
        assert {"unseen", "window", "popularity", "quality"} <= set(found)
        assert "-late learned from events up to" in found["unseen"]
        assert "wait for newer data" in found["unseen"]
        assert facts["differences"] == {}


def test_without_a_window_that_neither_has_seen_nothing_passes(home: Path, weak: Pair) -> None:
    by_users = spoiled(home, pair_of(home, "3"), "users", split=False)
    for pair, why in (
        (by_users, "there is no window that neither has seen"),
        (pair_of(home, "3") | {"ranking": by_users["ranking"]}, "trained on different splits of the log"),
        (pair_of(home, "1"), "learned from events up to"),
    ):
        facts = judged(home, pair, weak)
        assert why in closed(facts)["unseen"]
        assert closed(facts)["quality"] == "there is no window to measure it on"
        assert not facts["passed"]


def test_what_was_rolled_back_is_refused_until_somebody_insists(home: Path, weak: Pair) -> None:
    back = {
        kind: replace(version, tags=dict(version.tags) | {promotion.ROLLED_BACK: "2026-11-28T10:00:00+00:00"})
        for kind, version in pair_of(home, "3").items()
    }
    assert list(closed(judged(home, back, weak))) == ["taken_back"]
    assert "gr promote --force" in closed(judged(home, back, weak))["taken_back"]


def _log(home: Path, challenger: Path, count: int, *, failing: int = 0, reverse: bool = False) -> None:
    """Write `count` live requests that a shadow scored, nearly as it was served or the other way round."""
    bundle = load(challenger)
    by = ServedBy(
        item_id_type="int64",
        tasks=bundle.tasks,
        retriever_digest="r",
        ranker_digest="k",
        shadow_digest=bundle.digest,
        shadow_tasks=bundle.tasks,
    )
    rng = np.random.default_rng(5)
    rows = []
    for number in range(count):
        scores = rng.random((10, len(bundle.tasks)), np.float32)
        shadow = scores[::-1] if reverse else scores * 0.99
        entry = Served(
            request_id=str(number),
            served_ts=1_782_000_000_000 + number,
            request_ts=1_782_000_000_000,
            user=None,
            items=np.arange(10),
            scores=scores,
            latency_ms=10.0,
            shadow_scores=None if number < failing else shadow,
            shadow_ms=5.0,
        )
        rows.append((entry, None))
    part = serving_state.served_folder(home, DS) / "date=2026-06-21" / "part-1.parquet"
    part.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table_of(rows, by), part)


def test_live_requests_open_the_gates_of_the_shadow_or_close_them(home: Path, weak: Pair) -> None:
    (home / "lifecycle.toml").write_text(WIDE + "[shadow]\nrequests = 40\n")
    pair = pair_of(home, "3")
    bundle, others = bundle_of(home, DS, "ranking", pair["ranking"]), bundle_of(home, DS, "ranking", weak["ranking"])
    assert closed(judged(home, pair, weak)) == {"live_requests": "it scored 0 live requests, 40 are wanted"}
    _log(home, bundle, 39)
    assert closed(judged(home, pair, weak)) == {"live_requests": "it scored 39 live requests, 40 are wanted"}
    _log(home, others, 60)
    assert closed(judged(home, pair, weak)) == {"live_requests": "it scored 0 live requests, 40 are wanted"}
    _log(home, bundle, 40)
    facts = judged(home, pair, weak)
    assert closed(facts) == {}
    assert "agrees with the served one by 1.00" in next(g["why"] for g in facts["gates"] if g["gate"] == "shadow")
    _log(home, bundle, 40, failing=4)
    assert closed(judged(home, pair, weak)) == {"shadow": "it failed in 10.0% of live requests"}
    _log(home, bundle, 40, reverse=True)
    assert "its order agrees" in closed(judged(home, pair, weak))["shadow"]

"""Two days of the whole platform under load: what `gr replay` promises, on the run that other tests read too."""

import json

import pytest

from gr_platform import storage
from gr_platform.lifecycle import judgement
from gr_platform.registry import promotion, tracking, versions
from gr_platform.replay import report

pytestmark = pytest.mark.e2e
DS = "simulated"


@pytest.fixture(scope="module")
def facts(replayed):
    return json.loads((replayed / report.FACTS).read_text())


def test_no_answer_fails_and_none_is_stale_while_models_are_trained_and_swapped(facts):
    total = facts["load"]["total"]
    assert total["requests"] == total["answered"] > 100
    assert facts["staleness"]["num_stale"] == facts["staleness"]["num_of_no_model"] == 0
    assert facts["staleness"]["num_probes"] > 20


def test_a_better_model_is_promoted_and_the_poisoned_day_s_is_refused(facts):
    assert [day["outcome"] for day in facts["days"]] == ["promoted", "refused"]
    assert facts["days"][0]["deploy_s"] is not None
    (window,) = [why for why in facts["days"][1]["reasons"] if why.startswith("window: ")]
    assert "one item holds" in window
    assert len(facts["load"]["swaps"]) == 1


def test_every_verdict_of_the_page_holds_and_is_on_it(replayed, facts):
    page = (replayed / report.PAGE).read_text()
    assert "2 days" in page
    found = report.verdicts(facts)
    assert [verdict.sentence for verdict in found if not verdict.ok] == []
    assert len(found) >= 4


def test_the_served_pair_is_the_champion_and_it_began_with_the_frozen_one_s_weights(replayed):
    home = replayed / "home"
    champions, before = promotion.champions(home, DS), promotion.previous(home, DS)
    assert {v.version for v in champions.values()} == {"2"}
    assert {v.version for v in before.values()} == {"1"}
    for kind in versions.KINDS:
        run, parent = (
            storage.read_manifest(home / "runs" / DS / v.tags["gr.run_folder"]) for v in (champions[kind], before[kind])
        )
        assert run.spec["warm_start"] == parent.digest
        assert parent.facts["trained_until_ms"] < run.spec["split"]["validation_cut"]
        assert run.facts["trained_until_ms"] < run.spec["split"]["cut"]


def test_the_refused_version_keeps_its_reasons_as_tags_and_the_judgement_says_them(replayed):
    home = replayed / "home"
    facts = judgement.last(home, DS).manifest.facts
    assert not facts["passed"]
    for kind in versions.KINDS:
        refused = versions.by_alias(home, DS, kind, versions.CHALLENGER)
        assert refused is not None
        assert refused.tags[promotion.REASONS].startswith("window: ")
        assert facts["challenger"][kind]["version"] == refused.version == "3"
        assert facts["champion"][kind]["version"] == "2"


def test_mlflow_has_a_parent_run_a_retraining_with_a_child_a_model(replayed):
    home = replayed / "home"
    client = tracking.connect(home)
    runs = client.search_runs([tracking.experiment_id(client, home, DS)], max_results=100)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 3
    of_parent = {run.data.tags["mlflow.parentRunId"] for run in children}
    assert of_parent == {run.info.run_id for run in parents}
    assert len(children) == 6


def test_a_replay_leaves_no_server_behind(replayed):
    from serving.handle import attach

    assert attach(replayed / "home") is None

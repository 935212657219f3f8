"""Drift as the asset checks show it: warnings with figures, a table and a picture, and never a stop."""

from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from assets import deployment, drift_checks, events, served
from assets.materialization import MAX_PLOT_BYTES
from assets.resources import Platform
from gr_platform import storage
from gr_platform.evaluation import plots
from gr_platform.events.ingest import ingest
from gr_platform.events.landing import import_file
from gr_platform.lifecycle.drift import report, served_pair

DS = "log"
Checks = Callable[[], dict[str, dg.AssetCheckEvaluation]]


@pytest.fixture
def checks(tmp_path: Path) -> Checks:
    """Return check(): the outcome of every check of drift, on eight days of which the last is one item's."""
    home, lines = tmp_path / "home", ["user_id,item_id,action,timestamp"]
    for day in range(8):
        for number in range(120):
            item = "the $1 item" if day == 7 and number < 96 else f"item {(number * 7 + day) % 40}"
            lines.append(f"user {number % 30},{item},view,{1_700_006_400 + 86_400 * day + 60 * number}")
    source = tmp_path / "log.csv"
    source.write_text("\n".join(lines) + "\n")
    import_file(source, home=home)
    ingest(home, DS)
    every = [drift_checks.events_drift, drift_checks.served_drift, drift_checks.model_freshness]
    job = dg.define_asset_job("checks", dg.AssetSelection.checks(*every))
    definitions = dg.Definitions(
        assets=[events.events, deployment.deployment, served.served],
        asset_checks=every,
        jobs=[job],
        resources={"platform": Platform(home=str(home), dataset=DS)},
    )

    def check() -> dict[str, dg.AssetCheckEvaluation]:
        done = definitions.resolve_job_def("checks").execute_in_process()
        return {found.check_name: found for found in done.get_asset_check_evaluations()}

    return check


def test_every_measure_is_a_warning_at_most_with_its_figures_and_a_picture(checks: Checks) -> None:
    found = checks()
    assert set(found) == {name for of_asset in drift_checks.CHECKS.values() for name in of_asset}
    assert {name for name, each in found.items() if not each.passed} == {"item_drift", "item_share"}
    assert {each.severity for each in found.values()} == {dg.AssetCheckSeverity.WARN}
    poisoned = found["item_share"]
    assert "item the $1 item has 80 % of the 120 events of 2023-11-22" in str(poisoned.description)
    assert poisoned.metadata["value"].value == pytest.approx(0.8)
    assert poisoned.metadata["bound"].value == 0.3
    assert "| the $1 item | 0 | 0.8 |" in str(poisoned.metadata["shares"].value).replace("0.0 ", "0 ")
    for name in ("item_drift", "item_share", "action_drift"):
        assert str(found[name].metadata["plot"].value).startswith("![plot](data:image/png;base64,")
    assert found["model_age"].passed
    assert "not judged: no models" in str(found["model_age"].description)


def test_the_picture_of_shares_takes_any_name_and_stays_small() -> None:
    png = plots.shares([["$x^{" * 20, 0.5, 0.1], ["naïve 名", 0.0, 0.9]], ("days before", "2026-01-01"))
    assert png.startswith(b"\x89PNG")
    assert len(png) <= MAX_PLOT_BYTES


def test_the_finished_pipeline_knows_until_when_its_served_models_learned(pipeline_home: Path) -> None:
    runs = pipeline_home / "runs" / "simulated"
    until = {
        kind: storage.read_manifest(storage.current(runs, f"{kind}_model")).facts["trained_until_ms"]
        for kind in ("retrieval", "ranking")
    }
    pair = served_pair(pipeline_home, "simulated")
    assert pair is not None
    assert pair.trained_until_ms == min(until.values())
    for kind, model in (("retrieval", "gr_retriever"), ("ranking", "gr_ranker")):
        config = (pipeline_home / "model_repository" / model / "config.pbtxt").read_text()
        assert f'key: "trained_until_ms" value: {{ string_value: "{until[kind]}" }}' in config
    age = report(pipeline_home, "simulated")["model_age"]
    assert age.value is not None
    assert 0 <= age.value < 180
    assert age.ok, "leave-one-out trains on all but the last events"

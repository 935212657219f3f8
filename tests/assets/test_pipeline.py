"""The whole job on a small log: what it leaves behind, what it reuses, what its checks catch."""

import shutil
from pathlib import Path

import dagster as dg
import pytest

from assets import data_checks, model_checks
from assets.resources import Platform
from gr_platform import storage
from gr_platform.commands import pipeline
from gr_platform.errors import UserError
from gr_platform.lifecycle import release
from gr_platform.lifecycle.folders import bundle_of
from gr_platform.registry import promotion, tracking, versions

ASSETS = [
    "bundle",
    "data_card",
    "deployment",
    "evaluation",
    "events",
    "item_vocabulary",
    "ranking_model",
    "registration",
    "retrieval_model",
    "sequences",
    "served",
]
DS = "simulated"


@pytest.fixture
def home(pipeline_home: Path, tmp_path: Path) -> Path:
    """A copy of the finished pipeline that a test may change."""
    copy = tmp_path / "home"
    shutil.copytree(pipeline_home, copy, symlinks=True)
    return copy


def _platform(home: Path) -> Platform:
    return Platform(home=str(home), dataset=DS)


def test_every_asset_is_materialised_on_the_instance_with_its_digest_and_figures(pipeline_home: Path) -> None:
    with dg.DagsterInstance.from_config(str(pipeline_home / "dagster_home")) as instance:
        for name in ASSETS:
            event = instance.get_latest_materialization_event(dg.AssetKey(name))
            assert event is not None, name
            materialization = event.asset_materialization
            assert materialization is not None
            metadata = materialization.metadata
            assert metadata["digest"].value
            assert metadata["reused"].value is False
            for entry in metadata.values():
                assert len(str(entry.value)) < 80_000
        assert len(instance.get_run_records()) == 1


def test_the_deployed_pair_is_champion_and_in_the_model_repository(pipeline_home: Path) -> None:
    champions = promotion.champions(pipeline_home, DS)
    assert {kind: v.version for kind, v in champions.items()} == {"retrieval": "1", "ranking": "1"}
    for kind, version in champions.items():
        folder = bundle_of(pipeline_home, DS, kind, version)
        served = pipeline_home / "model_repository" / f"gr_{'retriever' if kind == 'retrieval' else 'ranker'}"
        digest = storage.read_manifest(folder).digest
        assert storage.read_manifest(served / "1" / "bundle").digest == digest


def test_a_second_run_reuses_every_stage(home: Path) -> None:
    # The fixture's recipe is patched in for its own run only, so training stages are left out.
    finished = pipeline.materialize(
        home,
        home / "dagster_home",
        select=[name for name in ASSETS if name not in ("retrieval_model", "ranking_model")],
    )
    assert {name for name, stage in finished.items() if not stage["reused"]} == set()


def test_a_champion_loads_from_the_registry_without_pickle_and_gives_the_bundles_scores(pipeline_home: Path) -> None:
    import mlflow
    import numpy as np
    import pandas as pd

    from gr_platform.bundle.golden import load as load_golden
    from gr_platform.bundle.load import load

    tracking.connect(pipeline_home)
    for kind in versions.KINDS:
        model = mlflow.pyfunc.load_model(f"models:/{versions.model_name(DS, kind)}@champion")
        champion = promotion.champions(pipeline_home, DS)[kind]
        bundle = load(bundle_of(pipeline_home, DS, kind, champion))
        request, expected = load_golden(bundle.folder / "golden.safetensors")[-1]
        row = {
            "history_items": bundle.vocabulary.ids(request.items).tolist(),
            "history_actions": request.actions.tolist(),
            "history_times": request.times.tolist(),
            "request_time": request.request_time,
            "candidates": bundle.vocabulary.ids(request.candidates).tolist(),
        }
        assert {"history_items", "history_actions", "history_times"} < set(
            model.metadata.get_input_schema().input_names()
        )
        answer = model.predict(pd.DataFrame([row]))[0]
        if kind == "ranking":
            np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-6)
        else:
            assert len(answer) == 10
            assert set(answer) <= set(bundle.vocabulary.item_ids.tolist())


def test_no_registered_artifact_is_a_pickle(pipeline_home: Path) -> None:
    files = [path for path in (pipeline_home / "mlartifacts").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".joblib", ".pt", ".pth")]


def test_a_broken_bundle_is_stopped_before_deployment(home: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = storage.current(home / "bundles" / DS, "ranking")
    tensors = load_file(folder / "golden.safetensors")
    save_file({k: v + 0.5 if v.dtype.kind == "f" else v for k, v in tensors.items()}, folder / "golden.safetensors")
    manifest = storage.read_manifest(folder)
    storage.write_manifest(folder, kind=manifest.kind, spec=manifest.spec, facts=manifest.facts)
    before = (home / "model_repository").readlink()
    with pytest.raises(UserError, match=r"bundle parity .*ranking differs"):
        pipeline.materialize(home, home / "dagster_home", select=["bundle", "deployment"])
    assert (home / "model_repository").readlink() == before


def test_nan_weights_stop_the_pipeline(home: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    folder = storage.current(home / "runs" / DS, "retrieval_model")
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: np.full_like(weights[name], np.nan)}, folder / "model.safetensors")
    result = model_checks.retrieval_finite_weights(_platform(home))
    assert not result.passed
    assert name in (result.description or "")


def test_a_model_that_trained_on_its_test_targets_is_caught(home: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert model_checks.retrieval_no_leakage(_platform(home)).passed
    trained = storage.current(home / "runs" / DS, "retrieval_model") / "trained.parquet"
    table = pq.read_table(trained).to_pydict()
    pq.write_table(pa.table(table | {"num_exposures": [end + 2 for end in table["num_exposures"]]}), trained)
    result = model_checks.retrieval_no_leakage(_platform(home))
    assert not result.passed
    assert "users' test targets are among their training exposures" in (result.description or "")


def test_a_bundle_is_of_the_evaluated_model_on_the_current_sequences(home: Path) -> None:
    from gr_platform.bundle.export import export

    runs = home / "runs" / DS
    folder = storage.current(runs, "ranking_model")
    manifest = storage.read_manifest(folder)
    other = shutil.copytree(folder, runs / "ranking_model-other")
    storage.write_manifest(other, kind=manifest.kind, spec=manifest.spec | {"seed": 2}, facts=manifest.facts)
    storage.point(runs, "ranking_model", other)
    with pytest.raises(UserError, match="ranking model of simulated is not evaluated yet"):
        export(home, DS, "ranking")
    storage.write_manifest(other, kind=manifest.kind, spec=manifest.spec | {"sequences": "x"}, facts=manifest.facts)
    with pytest.raises(UserError, match="ranking model of simulated was trained on other sequences"):
        export(home, DS, "ranking")


def _events_checks(home: Path) -> dict[str, dg.AssetCheckEvaluation]:
    checks = dg.define_asset_job("checks", dg.AssetSelection.checks(data_checks.events_checks))
    definitions = dg.Definitions(
        asset_checks=[data_checks.events_checks],
        jobs=[checks],
        resources={"platform": _platform(home)},
        executor=dg.in_process_executor,
    )
    done = definitions.resolve_job_def("checks").execute_in_process(raise_on_error=False)
    return {found.check_name: found for found in done.get_asset_check_evaluations()}


def test_each_check_shows_its_figures_by_partition(pipeline_home: Path) -> None:
    results = _events_checks(pipeline_home)
    assert {name for name, result in results.items() if not result.passed} == set()
    table = str(results["conservation"].metadata["partitions"].value)
    assert table.splitlines()[0] == "| ingest date | rows in | kept | duplicates | quarantined |"
    assert "nothing before to compare with" in (results["volume"].description or "")


def test_lost_rows_break_conservation(home: Path) -> None:
    import pyarrow.parquet as pq

    file = next((home / "events" / DS).rglob("events-*.parquet"))
    pq.write_table(pq.read_table(file).slice(1), file)
    result = _events_checks(home)["conservation"]
    assert not result.passed
    assert result.severity is dg.AssetCheckSeverity.ERROR


def test_an_undeclared_action_breaks_the_schema(home: Path) -> None:
    toml = home / "landing" / DS / "dataset.toml"
    toml.write_text(toml.read_text().replace('"purchase"', '"return"'))
    assert "action 'purchase' is not declared" in (_events_checks(home)["schema"].description or "")


def _bound(home: Path, text: str) -> None:
    (home / "landing" / DS / "checks.toml").write_text(text)


def test_a_bound_that_may_be_passed_is_a_warning_and_a_broken_contract_an_error(home: Path) -> None:
    _bound(home, "max_quarantined = 0")
    folder = next((home / "events" / DS).glob("ingest_date=*/*"))
    manifest = storage.read_manifest(folder)
    facts = manifest.facts | {"quarantined": {"null_item": 1}}
    storage.write_manifest(folder, kind="events", spec=manifest.spec, facts=facts)
    failed = {name: result.severity for name, result in _events_checks(home).items() if not result.passed}
    assert failed == {"quarantine": dg.AssetCheckSeverity.WARN, "conservation": dg.AssetCheckSeverity.ERROR}


def test_materialize_ends_well_after_a_warning_and_fails_on_an_error(home: Path) -> None:
    seen: list[tuple[str, str]] = []
    _bound(home, "max_user_events = 1")
    folder = next((home / "events" / DS).glob("ingest_date=*/*"))
    manifest = storage.read_manifest(folder)
    storage.write_manifest(folder, kind="events", spec=manifest.spec, facts=manifest.facts | {"max_user_events": 2})

    def run() -> None:
        pipeline.materialize(
            home,
            home / "dagster_home",
            select=["events", "item_vocabulary"],
            on_stage=lambda fields: seen.append((fields["event"], fields["name"])),
        )

    run()
    assert ("check_warned", "events longest_user") in seen
    assert ("finished", "item_vocabulary") in seen
    seen.clear()
    _bound(home, "latest = 2000-01-01")
    with pytest.raises(UserError, match=r"check events time_range .*must lie from 1990-01-01 to before 2000-01-02"):
        run()
    assert ("finished", "item_vocabulary") not in seen
    _bound(home, "misspelt = 1")
    with pytest.raises(UserError, match="unknown entries misspelt"):
        run()


def test_the_card_on_the_asset_page_is_the_one_in_the_state_folder(pipeline_home: Path) -> None:
    with dg.DagsterInstance.from_config(str(pipeline_home / "dagster_home")) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("data_card"))
    assert event is not None
    assert event.asset_materialization is not None
    metadata = event.asset_materialization.metadata
    page = str(metadata["page"].value)
    assert str(pipeline_home) not in page
    assert (pipeline_home / page.split()[0]).is_file()
    preview = str(metadata["preview"].value)
    assert preview.count("data:image/png;base64,") == 2
    assert f"| events | {metadata['num_events'].value:,} |" in preview


def test_failing_user_input_is_one_sentence_and_changes_nothing(home: Path) -> None:
    with pytest.raises(UserError, match="unknown recipe 'huge'"):
        pipeline.materialize(home, home / "dagster_home", recipe="huge", select=["retrieval_model"])
    with pytest.raises(UserError, match="there is no asset nonsense"):
        pipeline.materialize(home, home / "dagster_home", select=["nonsense"])
    assert storage.current(home / "runs" / DS, "retrieval_model").is_dir()


def test_a_pair_without_a_bundle_is_refused_by_name(home: Path) -> None:
    shutil.rmtree(storage.current(home / "bundles" / DS, "ranking"))
    with pytest.raises(UserError, match="simulated-ranking version 1 has no bundle"):
        release.release(home, DS)

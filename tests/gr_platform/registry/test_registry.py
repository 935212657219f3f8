"""MLflow as the registry: idempotence, aliases, one pair at a time. Models are stand-ins: files of the right names."""

import json
import re
from pathlib import Path

import pytest

from gr_platform import storage
from gr_platform.errors import UserError
from gr_platform.models.recipes import tiny
from gr_platform.registry import promotion, tracking, versions

DS = "shop"
PARITY = {"retrieval": True, "ranking": True}


def _train(home: Path, hr: float, *, name: str = "a", sequences: str = "seq-1") -> None:
    """Put a finished pair and its evaluation in place, as training and evaluation leave them."""
    runs, digests = home / "runs" / DS, {}
    for kind in versions.KINDS:

        def build(folder: Path, kind: str = kind) -> dict[str, int]:
            (folder / "model.safetensors").write_bytes(b"")
            (folder / "recipe.json").write_text(json.dumps(tiny(kind).to_json()))
            curves = [{"epoch": e, "loss": 3.0 / e, "hr_at_10": hr * e / 2} for e in (1, 2)]
            (folder / "curves.json").write_text(json.dumps(curves))
            return {}

        made = storage.ensure(runs, f"{kind}_model", {"name": name, "sequences": sequences}, build)
        storage.point(runs, f"{kind}_model", made.folder)
        digests[kind] = made.manifest.digest
    facts = {
        "retrieval": {"hr_at_10": hr, "ndcg_at_10": hr / 2},
        "popularity": {"hr_at_10": 0.1, "ndcg_at_10": 0.05},
        "cooccurrence": {"hr_at_10": 0.15, "ndcg_at_10": 0.07},
        "slices": [
            {"slice": "user_age", "bin": name, "lower": at, "upper": at + 1, "hr_at_10": hr, "hr_at_10_error": 0.01}
            for at, name in enumerate(("young", "old"))
        ],
        "ranking": {"like": {"ne": 0.9, "auc": 0.7}},
        "ranking_calibration": {"like": [{"predicted": 0.2, "observed": 0.25}]},
    }
    made = storage.ensure(runs, "evaluation", {"models": digests, "sequences": sequences}, lambda folder: facts)
    storage.point(runs, "evaluation", made.folder)
    data = home / "sequences" / DS
    made = storage.ensure(data, "vocabulary", {}, lambda f: {"n": (f / "vocabulary.parquet").write_bytes(b"")})
    declared = {"vocabulary_folder": made.folder.name, "declaration": {"item_id_type": "int64"}}
    made = storage.ensure(data, "sequences", declared, lambda f: {})
    storage.point(data, "sequences", made.folder)


def _register(home: Path) -> dict[str, versions.Version]:
    return {kind: versions.register(home, DS, tracking.log_current(home, DS, kind)) for kind in versions.KINDS}


def _promote(home: Path) -> promotion.Verdict:
    verdict = promotion.judge(home, DS, PARITY)
    promotion.settle(home, verdict)
    return verdict


@pytest.fixture(scope="module")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry whose database is made once; tests copy it."""
    home = tmp_path_factory.mktemp("registry")
    tracking.experiment_id(tracking.connect(home), home, "other")
    return home


@pytest.fixture
def home(empty_registry: Path, tmp_path: Path) -> Path:
    (tmp_path / "mlflow.db").write_bytes((empty_registry / "mlflow.db").read_bytes())
    return tmp_path


def test_registering_the_same_model_twice_reuses_run_and_version(home: Path) -> None:
    _train(home, 0.3)
    first, second = _register(home), _register(home)
    assert {k: v.version for k, v in first.items()} == {k: v.version for k, v in second.items()}
    assert all(v.reused for v in second.values())
    client = tracking.connect(home)
    runs = client.search_runs([tracking.experiment_id(client, home, DS)])
    assert len(runs) == 2
    retrieval = client.get_run(first["retrieval"].run_id)
    assert retrieval.data.params["model.embedding_dim"] == "16"
    assert retrieval.data.metrics["test_hr_at_10"] == 0.3
    assert retrieval.data.metrics["popularity_hr_at_10"] == 0.1
    assert retrieval.data.metrics["cooccurrence_hr_at_10"] == 0.15
    history = {
        name: [m.value for m in client.get_metric_history(retrieval.info.run_id, name)]
        for name in ("train_loss", "validation_hr_at_10")
    }
    assert history == {"train_loss": [3.0, 1.5], "validation_hr_at_10": pytest.approx([0.15, 0.3])}
    assert not {"loss", "hr_at_10"} & set(retrieval.data.metrics)
    assert re.fullmatch(r"retrieval-tiny-s1-[0-9a-f]{8}", retrieval.info.run_name)
    assert retrieval.inputs.dataset_inputs[0].dataset.digest == "seq-1"
    assert {f.path for f in client.list_artifacts(retrieval.info.run_id, "plots")} >= {
        "plots/figures.png",
        "plots/learning_curve.png",
        "plots/slices.png",
    }


def test_a_passing_pair_becomes_champion_and_a_better_one_takes_its_place(home: Path) -> None:
    _train(home, 0.3)
    _register(home)
    _promote(home)
    again = _promote(home)
    assert not again.is_new
    assert again.reasons == ()
    _train(home, 0.4, name="b")
    better = _register(home)
    assert better["retrieval"].aliases == (versions.CHALLENGER,)
    assert _promote(home).reasons == ()
    champions = promotion.champions(home, DS)
    assert {kind: v.version for kind, v in champions.items()} == {"retrieval": "2", "ranking": "2"}
    assert champions["retrieval"].aliases == (versions.CHAMPION,)
    before = versions.by_alias(home, DS, "retrieval", versions.PREVIOUS)
    assert before is not None
    assert before.version == "1"


@pytest.mark.parametrize("moves", [1, 2, 3, 4])
def test_a_promotion_killed_half_way_is_finished_by_the_next(
    home: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    _train(home, 0.3)
    _register(home)
    _promote(home)
    _train(home, 0.4, name="b")
    _register(home)
    real, done = versions.move_alias, []

    def until_killed(*arguments: object) -> None:
        if len(done) == moves - 1:
            raise KeyboardInterrupt
        done.append(arguments)
        real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(versions, "move_alias", until_killed)
        with pytest.raises(KeyboardInterrupt):
            _promote(home)
    assert _promote(home).reasons == ()
    champions = promotion.champions(home, DS)
    assert {kind: v.version for kind, v in champions.items()} == {"retrieval": "2", "ranking": "2"}
    for kind in versions.KINDS:
        assert (before := versions.by_alias(home, DS, kind, versions.PREVIOUS))
        assert before.version == "1"
        assert versions.by_alias(home, DS, kind, versions.CHALLENGER) is None


def test_one_champion_without_the_other_is_no_pair(home: Path) -> None:
    _train(home, 0.3)
    registered = _register(home)
    versions.move_alias(home, registered["retrieval"], versions.CHAMPION)
    assert promotion.champions(home, DS) == {}


def test_a_worse_pair_stays_challenger_with_its_reasons(home: Path) -> None:
    _train(home, 0.4)
    _register(home)
    _promote(home)
    champions = promotion.champions(home, DS)
    _train(home, 0.3, name="b")
    _register(home)
    verdict = _promote(home)
    assert verdict.serving == champions == promotion.champions(home, DS)
    refused = versions.by_alias(home, DS, "retrieval", versions.CHALLENGER)
    assert refused is not None
    assert "below the champion's" in refused.tags[promotion.REASONS]


def test_an_older_challenger_is_withdrawn_when_the_champion_is_current_again(home: Path) -> None:
    _train(home, 0.4)
    _register(home)
    _promote(home)
    _train(home, 0.3, name="b")
    _register(home)
    _train(home, 0.4)
    _register(home)
    assert versions.by_alias(home, DS, "retrieval", versions.CHALLENGER) is None


def test_an_evaluation_of_another_model_is_refused(home: Path) -> None:
    _train(home, 0.3)
    stale = storage.current(home / "runs" / DS, "evaluation")
    _train(home, 0.4, name="b")
    storage.point(home / "runs" / DS, "evaluation", stale)
    with pytest.raises(UserError, match="evaluation of shop is not of retrieval_model"):
        tracking.log_current(home, DS, "retrieval")


@pytest.mark.parametrize(
    ("metrics", "parity", "reason"),
    [
        ({"test_hr_at_10": 0.1, "popularity_hr_at_10": 0.1}, True, "not above popularity"),
        ({"test_hr_at_10": float("nan"), "popularity_hr_at_10": 0.1}, True, "test_hr_at_10 is nan"),
        ({"test_hr_at_10": 0.3, "popularity_hr_at_10": 0.1}, False, "bundle's scores differ"),
        ({"test_hr_at_10": 0.2, "popularity_hr_at_10": 0.1}, True, "below the champion's"),
    ],
)
def test_each_rule_objects_by_itself(metrics: dict[str, float], parity: bool, reason: str) -> None:
    champion = promotion.Candidate(
        kind="retrieval", metrics={"test_hr_at_10": 0.25, "popularity_hr_at_10": 0.1}, sequences="s"
    )
    candidate = promotion.Candidate(kind="retrieval", metrics=metrics, sequences="s")
    assert any(reason in r for r in promotion.objections(candidate, champion, parity))


def test_a_champion_measured_on_other_sequences_does_not_block() -> None:
    figures = {"test_hr_at_10": 0.2, "popularity_hr_at_10": 0.1}
    champion = promotion.Candidate(kind="retrieval", metrics=figures | {"test_hr_at_10": 0.9}, sequences="old")
    candidate = promotion.Candidate(kind="retrieval", metrics=figures, sequences="new")
    assert promotion.objections(candidate, champion, parity_ok=True) == []

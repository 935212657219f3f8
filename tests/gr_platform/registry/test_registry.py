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


def _promote(home: Path) -> promotion.Contest:
    """Let whoever contends serve, as a release does whose gates are all open."""
    found = promotion.contest(home, DS)
    if found.is_new:
        promotion.crown(home, found)
    return found


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
    assert not _promote(home).is_new
    _train(home, 0.4, name="b")
    better = _register(home)
    assert better["retrieval"].aliases == (versions.CHALLENGER,)
    _promote(home)
    champions = promotion.champions(home, DS)
    assert {kind: v.version for kind, v in champions.items()} == {"retrieval": "2", "ranking": "2"}
    assert champions["retrieval"].aliases == (versions.CHAMPION,)
    assert promotion.PROMOTED in champions["retrieval"].tags
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
    _promote(home)
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


def test_a_refused_pair_stays_challenger_with_its_reasons(home: Path) -> None:
    _train(home, 0.4)
    _register(home)
    _promote(home)
    champions = promotion.champions(home, DS)
    _train(home, 0.3, name="b")
    _register(home)
    found = promotion.contest(home, DS)
    promotion.refuse(home, found.pair, ["quality: worse", "memory: more"])
    assert promotion.same(promotion.champions(home, DS), champions)
    refused = versions.by_alias(home, DS, "retrieval", versions.CHALLENGER)
    assert refused is not None
    assert refused.tags[promotion.REASONS] == "quality: worse; memory: more"
    promotion.crown(home, promotion.contest(home, DS), against="quality: worse")
    forced = promotion.champions(home, DS)["retrieval"]
    assert promotion.REASONS not in forced.tags
    assert forced.tags[promotion.FORCED] == "quality: worse"


def _two_promotions(home: Path) -> None:
    for number, name in enumerate("ab"):
        _train(home, 0.3 + number / 10, name=name)
        _register(home)
        _promote(home)


def _roll_back(home: Path) -> None:
    reigning, before = promotion.retreat(home, DS)
    promotion.mark_taken_back(home, reigning, before)
    promotion.take_back(home, reigning, before)


def _roles(home: Path) -> dict[str, dict[str, str]]:
    return {
        alias: {kind: v.version for kind in versions.KINDS if (v := versions.by_alias(home, DS, kind, alias))}
        for alias in (versions.CHAMPION, versions.PREVIOUS, versions.CHALLENGER)
    }


def _pair(number: str) -> dict[str, str]:
    return dict.fromkeys(versions.KINDS, number)


def test_a_rollback_exchanges_the_roles_and_marks_what_was_taken_back(home: Path) -> None:
    _two_promotions(home)
    _roll_back(home)
    assert _roles(home) == {"champion": _pair("1"), "previous": _pair("2"), "challenger": {}}
    assert all(promotion.ROLLED_BACK in v.tags for v in promotion.previous(home, DS).values())
    _register(home)
    assert _roles(home)["challenger"] == _pair("2")
    assert all(promotion.ROLLED_BACK in v.tags for v in promotion.contest(home, DS).pair.values())


@pytest.mark.parametrize("moves", [1, 2, 3, 4])
def test_a_rollback_killed_half_way_is_finished_by_the_next(
    home: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    _two_promotions(home)
    real, done = versions.move_alias, []

    def until_killed(*arguments: object) -> None:
        if len(done) == moves - 1:
            raise KeyboardInterrupt
        done.append(arguments)
        real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(versions, "move_alias", until_killed)
        with pytest.raises(KeyboardInterrupt):
            _roll_back(home)
    _roll_back(home)
    assert _roles(home) == {"champion": _pair("1"), "previous": _pair("2"), "challenger": {}}


def test_there_is_nothing_to_go_back_to_before_a_second_promotion(home: Path) -> None:
    with pytest.raises(UserError, match="no pair of shop served before"):
        promotion.retreat(home, DS)
    _train(home, 0.3)
    _register(home)
    _promote(home)
    with pytest.raises(UserError, match="no pair of shop served before"):
        promotion.retreat(home, DS)


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
